"""Verbs on the keys that sign adapters: this user's own, and those that a project trusts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewright.adapters.keys import NAME, TrustedKey, TrustedKeys
from tunewright.adapters.private_keys import PrivateKey, new_private_key, private_key, private_keys
from tunewright.core.errors import UserError
from tunewright.data.versions.version import current_author
from tunewright.open_project import OpenProject


@dataclass(frozen=True)
class KnownKey:
    """A key of this user, or one that the project trusts or has revoked."""

    name: str
    id: str
    own: bool
    encrypted: bool | None
    """Whether the private half is encrypted; None for a key of somebody else."""
    trusted: TrustedKey | None


def create(project: OpenProject, name: str) -> PrivateKey:
    """Create a key for this user, encrypted with a passphrase. The project does not trust it yet.

    The passphrase is that of ``TUNEWRIGHT_KEY_PASSPHRASE`` or of the file that ``TUNEWRIGHT_KEY_PASSPHRASE_FILE``
    names, else the terminal asks for it.

    Raises:
        UserError: an invalid name, a name that is taken, or no passphrase.
    """
    return new_private_key(name, project.reporter)


def passphrase(project: OpenProject, name: str) -> PrivateKey:
    """Encrypt one of this user's keys with a new passphrase, whether or not it has one.

    The new passphrase is that of ``TUNEWRIGHT_KEY_NEW_PASSPHRASE`` or of the file that
    ``TUNEWRIGHT_KEY_NEW_PASSPHRASE_FILE`` names, else the terminal asks for it.

    Raises:
        UserError: no such key, no passphrase, the wrong one, or a new one that is too short.
    """
    private_key(name).change_passphrase(project.reporter)
    return private_key(name)


def list_all(project: OpenProject) -> Sequence[KnownKey]:
    """Return this user's keys, and those that the project trusts or has revoked."""
    trusted = {key.id: key for key in TrustedKeys(project.folder.keys).all}
    own = {key.id: key for key in private_keys()}
    mine = [KnownKey(k.name, k.id, own=True, encrypted=k.is_encrypted, trusted=trusted.get(k.id)) for k in own.values()]
    others = [k for k in trusted.values() if k.id not in own]
    return [*mine, *(KnownKey(k.name, k.id, own=False, encrypted=None, trusted=k) for k in others)]


def show(project: OpenProject, name: str) -> str:
    """Return the public half of a key (PEM): this user's own, else the project's.

    Raises:
        UserError: no such key.
    """
    for key in TrustedKeys(project.folder.keys).all:
        if key.name == name and name not in {own.name for own in private_keys()}:
            return key.public_key
    return private_key(name).public_key


def trust(project: OpenProject, key: str | Path, name: str | None = None) -> TrustedKey:
    """Add a key to those that the project trusts.

    Args:
        key: a name of this user's keys, or a file with a public key (PEM).
        name: its name in the project (None: its own name or the file's).

    Raises:
        UserError: no such key or file, a revoked key, or a name that is taken.
    """
    file = Path(key)
    own = {known.name: known for known in private_keys()}
    if str(key) in own:
        pem, called = own[str(key)].public_key, str(key)
    elif file.is_file():
        pem, called = file.read_text(encoding="utf-8", errors="replace"), file.stem
    else:
        raise UserError(
            f"{str(key)!r} is neither one of your keys nor a file",
            where="KEY",
            fix=f"Your keys: {', '.join(own)}." if own else "Create one with `tunewright keys create NAME`.",
        )
    if name is None and not NAME.fullmatch(called):
        raise UserError(f"The file name {called!r} is not a valid key name", where="KEY", fix="Add --name NAME.")
    return TrustedKeys(project.folder.keys).trust(name or called, pem, current_author(project.folder.root))


def revoke(project: OpenProject, name: str, because: str) -> TrustedKey:
    """Revoke a key: its signatures no longer count.

    Raises:
        UserError: no such key, already revoked, or no reason given.
    """
    return TrustedKeys(project.folder.keys).revoke(name, because, current_author(project.folder.root))
