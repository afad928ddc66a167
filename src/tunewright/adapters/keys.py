"""The public keys that a project trusts or has revoked, in OpenSSH's formats and meant to be committed to git.

  PROJECT/keys/allowed_signers  names, options and a public key in each line (ALLOWED SIGNERS in ssh-keygen(1))
  PROJECT/keys/revoked_keys     public keys in lines, or a KRL

``ssh-keygen`` decides by these files (signing.py). Here they are edited, and read for names and reasons.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tunewright.adapters.manifest import Record, parse_record
from tunewright.adapters.openssh import PUBLIC_KEY, fingerprint, key_fingerprint, own_keys, read_public_key, string
from tunewright.core.clock import now, without_milliseconds
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.data.versions.version import current_author

NAMESPACE: Final = "tunewright-adapter@1"
"""The purpose of signatures: one made for anything else never counts for an adapter."""

_OPTIONS = f'namespaces="{NAMESPACE}"'
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,62}")
_SIGNER = re.compile(r'"?(?P<names>[^\s"]+)"?[ \t]+(?:(?P<options>(?:[^\s"]|"[^"]*")+)[ \t]+)?' + PUBLIC_KEY)
_EVENT = re.compile(r"(?:trusted|revoked) on (?P<at>\S+?)(?: by (?P<by>.*?))?(?:: (?P<because>.*))?")
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----\s+([A-Za-z0-9+/=]+)\s+-----END PUBLIC KEY-----\s*")
_ED25519 = bytes.fromhex("302a300506032b6570032100")
"""DER of an Ed25519 SubjectPublicKeyInfo (RFC 8410), up to the 32 bytes of the key."""
_RESTORE = "Correct it, or restore the file, from git for example."


class KeyEvent(Record):
    """An action on a key, from the comment of its line: its time (UTC, ISO 8601), its author, and its reason."""

    at: str | None
    by: str | None = None
    because: str | None = None

    def __str__(self) -> str:
        """Return what follows the word *trusted* or *revoked*, in a line and in messages."""
        at, by = f" on {self.at}" if self.at else "", f" by {self.by}" if self.by else ""
        return f"{at}{by}: {self.because}" if self.because else f"{at}{by}"


class TrustedKey(Record):
    """A public key that the project trusts or has revoked."""

    name: str
    id: str
    """Its fingerprint, as ``ssh-keygen -l`` prints it; for a key of keys/NAME.json, the SHA-256 of its DER."""
    public_key: str
    """Its type and the key in OpenSSH's format; for a key of keys/NAME.json, PEM."""
    trusted: KeyEvent
    revoked: KeyEvent | None = None
    options: str = ""
    """The options of its line, such as ``valid-before="20270101"``."""

    @property
    def is_former(self) -> bool:
        """Return whether it is from a file keys/NAME.json, which an earlier tunewright wrote."""
        return self.public_key.startswith("-----BEGIN")

    @property
    def openssh(self) -> str:
        """The public key in OpenSSH's format."""
        if not self.is_former:
            return self.public_key
        kind = "ssh-ed25519"
        return f"{kind} {base64.b64encode(string(kind.encode()) + string(_raw(self.public_key))).decode()}"

    @property
    def fingerprint(self) -> str:
        """The key's fingerprint."""
        return fingerprint(base64.b64decode(self.openssh.split()[1]))


@dataclass(frozen=True)
class KnownKey:
    """A key in the list of a project's keys."""

    name: str
    id: str
    own: bool
    """True if it is one of this user's keys."""
    trusted: TrustedKey


class TrustedKeys:
    """The keys that a project trusts or has revoked.

    Raises:
        UserError: a file or line that is not in its format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.revocations = folder / "revoked_keys"
        """Revoked keys, if the file exists."""
        self._allowed = folder / "allowed_signers"
        self._revoked = dict(self._revoked_keys())
        """Revocations by fingerprint; none of a KRL, which only ``ssh-keygen`` reads."""
        signers = [self._signer(line, where) for line, where in _lines(self._allowed)]
        self.all = [*signers, *(self._former(path) for path in sorted(folder.glob("*.json")))]

    @property
    def required(self) -> bool:
        """Return whether adapters need a trusted signature: from the first key on, even if all keys are revoked."""
        return bool(self.all) or self.revocations.exists()

    @property
    def has_krl(self) -> bool:
        """Return whether the revoked keys are a KRL, OpenSSH's binary format."""
        return self.revocations.exists() and self.revocations.read_bytes().startswith(b"SSHKRL\n\0")

    @property
    def allowed_signers(self) -> str:
        """The file for ``ssh-keygen``: the project's, and the keys of keys/NAME.json."""
        former = (key for key in self.all if key.is_former and key.revoked is None)
        return _text(self._allowed) + "".join(_line(key.name, key.openssh) for key in former)

    def find(self, mark: str) -> TrustedKey | None:
        """Return the key with this fingerprint."""
        return next((key for key in self.all if key.fingerprint == mark), None)

    def revocation(self, mark: str) -> KeyEvent | None:
        """Return the revocation of the key with this fingerprint, unless a KRL has it.

        A key may be in several files: one revocation is enough.
        """
        found = [self._revoked.get(mark), *(key.revoked for key in self.all if key.fingerprint == mark)]
        return next((each for each in found if each is not None), None)

    def list(self) -> Sequence[KnownKey]:
        """Return the keys that the project trusts or has revoked."""
        own = {mark for _, mark in own_keys()}
        return [KnownKey(key.name, key.id, key.fingerprint in own, key) for key in self.all]

    def trust(self, key: str | Path, name: str | None = None) -> TrustedKey:
        """Add a key to those that the project trusts.

        Args:
            key: a file with a public key in OpenSSH's format.
            name: its name in the project (None: the file's).

        Raises:
            UserError: not such a file, a revoked key, or a name or key that is known already.
        """
        file = Path(os.path.expanduser(key))  # noqa: PTH111 (Path.expanduser fails for an unknown user)
        if not file.is_file():
            fix = "Give the file of a public key, such as ~/.ssh/id_ed25519.pub; `ssh-keygen -t ed25519` creates it."
            raise UserError("No such file", where=str(key), fix=fix)
        public = read_public_key(file)
        mark = key_fingerprint(public, str(file))
        name = file.stem if name is None else name
        if not _NAME.fullmatch(name):
            what = f"Invalid name {name!r}: use up to 63 letters, digits, and . _ - + @ after the first"
            raise UserError(what, where="--name", fix="Choose another with --name NAME.")
        if (revoked := self.revocation(mark)) is not None:
            raise UserError(f"This key was revoked{revoked}", where=str(self.folder), fix="Use another key.")
        for known in self.all:
            if known.fingerprint == mark:
                raise UserError(f"The project trusts this key already, as {known.name}", where=str(self.folder))
            if known.name == name:
                raise UserError(
                    f"Another key is named {name}", where=str(self.folder), fix="Choose another with --name."
                )
        event = KeyEvent(at=without_milliseconds(now()), by=current_author(self.folder.parent))
        write_text(self._allowed, _text(self._allowed) + _line(name, public, f"trusted{event}"))
        return TrustedKey(name=name, id=mark, public_key=public, trusted=event, options=_OPTIONS)

    def revoke(self, name: str, because: str) -> TrustedKey:
        """Revoke a key: all of its signatures become invalid, whenever they were made.

        Raises:
            UserError: no such key, no reason, a key that is revoked already, or a project that revokes keys by a KRL.
        """
        found = [key for key in self.all if key.name == name]
        if not found:
            names = ", ".join(known.name for known in self.all)
            fix = f"Its keys: {names}." if names else "The project has no keys."
            raise UserError(f"The project trusts no key {name!r}", where=str(self.folder), fix=fix)
        valid = [key for key in found if key.revoked is None]
        if not valid:
            raise UserError(f"The key was revoked{found[0].revoked}", where=str(self.folder))
        if not because.strip():
            raise UserError("The reason must not be empty", where="--because")
        if self.has_krl:
            fix = f"Add the key to it: ssh-keygen -k -u -f {self.revocations} FILE.pub"
            raise UserError("The project revokes keys by a KRL", where=str(self.revocations), fix=fix)
        at, by = without_milliseconds(now()), current_author(self.folder.parent)
        event = KeyEvent(at=at, by=by, because=" ".join(because.split()))
        lines = "".join(f"{key.openssh} revoked{event}\n" for key in valid)
        write_text(self.revocations, _text(self.revocations) + lines)
        return valid[0].model_copy(update={"revoked": event})

    def _revoked_keys(self) -> Iterator[tuple[str, KeyEvent]]:
        for line, where in () if self.has_krl else _lines(self.revocations):
            found = re.fullmatch(PUBLIC_KEY, line)
            if found is None:
                raise UserError("Not a public key in OpenSSH's format", where=where, fix=_RESTORE)
            yield key_fingerprint(found["key"], where), _event_of(found["comment"])

    def _signer(self, line: str, where: str) -> TrustedKey:
        found = _SIGNER.fullmatch(line)
        if found is None:
            raise UserError("Not a line of allowed_signers (name, options, key)", where=where, fix=_RESTORE)
        mark = key_fingerprint(found["key"], where)
        return TrustedKey(
            name=found["names"].split(",")[0],
            id=mark,
            public_key=" ".join(found["key"].split()),
            trusted=_event_of(found["comment"]),
            revoked=self._revoked.get(mark),
            options=found["options"] or "",
        )

    def _former(self, path: Path) -> TrustedKey:
        """Return the key of a file of an earlier tunewright, keys/NAME.json."""
        key = parse_record(TrustedKey, path.read_bytes(), str(path))
        if key.name != path.stem or key.id != hashlib.sha256(_ED25519 + _raw(key.public_key)).hexdigest():
            raise UserError("The file's name or ID does not match its key", where=str(path), fix=_RESTORE)
        return key.model_copy(update={"revoked": self._revoked.get(key.fingerprint, key.revoked)})


def _raw(pem: str) -> bytes:
    """Return the 32 bytes of an Ed25519 key in PEM; nothing for another text."""
    found = _PEM.fullmatch(pem)
    try:
        der = base64.b64decode(found[1]) if found else b""
    except binascii.Error:
        der = b""
    return der[-32:] if der[:-32] == _ED25519 else b""


def _text(path: Path) -> str:
    """Return a file's lines, the last one ended too; nothing without the file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text if text.endswith("\n") or not text else text + "\n"


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of a file that are not comments, each with its place."""
    try:
        text = _text(path)
    except UnicodeDecodeError:
        raise UserError("Not UTF-8", where=str(path), fix=_RESTORE) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if (stripped := line.strip()) and not stripped.startswith("#"):
            yield stripped, f"{path}:{number}"


def _line(name: str, public: str, comment: str = "") -> str:
    return f"{name} {_OPTIONS} {public} {comment}".rstrip() + "\n"


def _event_of(comment: str | None) -> KeyEvent:
    """Return the action that a line's comment records; another comment is its reason."""
    found = _EVENT.fullmatch(comment or "")
    return KeyEvent(at=None, because=comment or None) if found is None else KeyEvent(**found.groupdict())
