"""The verbs on keys that sign adapters: ``tunewright keys …``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.adapters.keys import (
    NAME,
    PrivateKey,
    TrustedKey,
    TrustedKeys,
    new_private_key,
    private_key,
    private_keys,
)
from tunewright.api.context import ProjectContext
from tunewright.core.errors import UserError
from tunewright.data.versions.author import current_author


@dataclass(frozen=True)
class KnownKey:
    """A key that this user has, the project trusts or did, or both."""

    name: str
    id: str
    own: bool
    trusted: TrustedKey | None

    def as_dict(self) -> dict[str, Any]:
        """Return the key as ``--json`` prints it."""
        trusted = None if self.trusted is None else self.trusted.model_dump(mode="json")
        return {**asdict(self), "trusted": trusted}


class SigningKeysApi:
    """What can be done with keys."""

    def __init__(self, opened: ProjectContext) -> None:
        self._project = opened.folder

    def new(self, name: str) -> PrivateKey:
        """Make a key of one's own. The project does not trust it yet.

        Raises:
            UserError: a name that is none, or that a key has already.
        """
        return new_private_key(name)

    def list(self) -> Sequence[KnownKey]:
        """This user's own keys, and those that the project trusts or did."""
        trusted = {key.id: key for key in TrustedKeys(self._project.keys).all}
        own = {key.id: key for key in private_keys()}
        mine = [KnownKey(key.name, key.id, own=True, trusted=trusted.get(key.id)) for key in own.values()]
        return [*mine, *(KnownKey(k.name, k.id, own=False, trusted=k) for k in trusted.values() if k.id not in own)]

    def show(self, name: str) -> str:
        """Return the public half of a key (PEM): this user's own, else the project's.

        Raises:
            UserError: neither has one of that name.
        """
        for key in TrustedKeys(self._project.keys).all:
            if key.name == name and name not in {own.name for own in private_keys()}:
                return key.public_key
        return private_key(name).public_key

    def trust(self, key: str | Path, name: str | None = None) -> TrustedKey:
        """Let the project trust a key from now on.

        Args:
            key: one of this user's own by name, or a file with a public key (PEM).
            name: what the project calls it (None: as it is called, or as the file is).

        Raises:
            UserError: no such key or file, a key that was revoked, or a name that is another's.
        """
        file = Path(key)
        own = {known.name: known for known in private_keys()}
        if str(key) in own:
            pem, called = own[str(key)].public_key, str(key)
        elif file.is_file():
            pem, called = file.read_text(encoding="utf-8", errors="replace"), file.stem
        else:
            raise UserError(
                f"{str(key)!r} is neither a key of yours nor a file",
                where="KEY",
                fix=f"Yours are: {', '.join(own)}." if own else "Make one: tunewright keys new NAME",
            )
        if name is None and not NAME.fullmatch(called):
            raise UserError(f"the file's name, {called!r}, is no name for a key", where="KEY", fix="Add --name NAME.")
        return TrustedKeys(self._project.keys).trust(name or called, pem, current_author(self._project.root))

    def revoke(self, name: str, because: str) -> TrustedKey:
        """Let the project trust a key no longer: what it signed counts for nothing from now on.

        Raises:
            UserError: the project has no such key, it was revoked before, or no reason is given.
        """
        return TrustedKeys(self._project.keys).revoke(name, because, current_author(self._project.root))
