"""The public keys that a project trusts.

  PROJECT/keys/NAME.json  with the author and time of the trust; meant to be committed to git

Ed25519 (RFC 8032) from the package cryptography. A key's ID is the SHA-256 of its SubjectPublicKeyInfo (RFC 5280) in
DER.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.adapters.manifest import Digest, Name, Record, parse_record
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import write_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class KeyEvent(Record):
    """An action on a key: its author, time (UTC, ISO 8601), and the reason if one is required."""

    at: str
    by: str | None
    because: str | None = None


class TrustedKey(Record):
    """A public key in a project. A revoked key stays on record, so that it is not trusted again by mistake."""

    name: Name
    id: Digest
    public_key: str
    """SubjectPublicKeyInfo, PEM."""
    trusted: KeyEvent
    revoked: KeyEvent | None = None

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Return whether this key made the signature (64 bytes) over the message."""
        from cryptography.exceptions import InvalidSignature

        try:
            read_public(self.public_key, self.name).verify(signature, message)
        except InvalidSignature:
            return False
        return True


class TrustedKeys:
    """The keys that a project trusts or has revoked.

    Raises:
        UserError: a key's file has changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all = [_read_trusted(path) for path in sorted(folder.glob("*.json"))]

    @property
    def valid(self) -> list[TrustedKey]:
        """The keys that are not revoked; without any, adapters need no signature."""
        return [key for key in self.all if key.revoked is None]

    def find(self, identity: str) -> TrustedKey | None:
        """Return the key of this ID."""
        return next((key for key in self.all if key.id == identity), None)

    def trust(self, name: str, public_key: str, by: str | None) -> TrustedKey:
        """Add a key (PEM).

        Raises:
            UserError: not a key, or the name or the key is known already.
        """
        require_name(name)
        identity = key_id(read_public(public_key, name))
        for known in self.all:
            if known.id == identity and known.revoked:
                raise UserError(
                    f"This key was revoked on {known.revoked.at} as {known.name}: {known.revoked.because}",
                    where=str(self.folder),
                    fix="Create another: tunewright keys create NAME",
                )
            if known.id == identity or known.name == name:
                what = (
                    f"The project trusts this key already, as {known.name}"
                    if known.id == identity
                    else f"Another key is named {known.name}"
                )
                raise UserError(what, where=str(self.folder / f"{known.name}.json"))
        return self._write(
            TrustedKey(name=name, id=identity, public_key=_normal(public_key, name), trusted=KeyEvent(at=now(), by=by))
        )

    def revoke(self, name: str, because: str, by: str | None) -> TrustedKey:
        """Revoke a key: all of its signatures become invalid, whenever they were made.

        Raises:
            UserError: no such key, no reason, or a key that is revoked already.
        """
        key = next((known for known in self.all if known.name == name), None)
        if key is None:
            known_names = ", ".join(known.name for known in self.all)
            fix = f"Its keys: {known_names}." if known_names else "The project has no keys."
            raise UserError(f"The project trusts no key {name!r}", where=str(self.folder), fix=fix)
        if key.revoked is not None:
            raise UserError(f"The key was revoked on {key.revoked.at}", where=str(self.folder / f"{name}.json"))
        if not because.strip():
            raise UserError("The reason must not be empty", where="--because")
        return self._write(key.model_copy(update={"revoked": KeyEvent(at=now(), by=by, because=because.strip())}))

    def _write(self, key: TrustedKey) -> TrustedKey:
        write_json(self.folder / f"{key.name}.json", key.model_dump(mode="json"))
        self.all = [*(known for known in self.all if known.id != key.id), key]
        return key


def _read_trusted(path: Path) -> TrustedKey:
    fix = "Restore it, from git for example."
    key = parse_record(TrustedKey, path.read_bytes(), str(path))
    if key.name != path.stem or key.id != key_id(read_public(key.public_key, str(path))):
        raise UserError("The file's name or ID does not match its key", where=str(path), fix=fix)
    return key


def read_public(pem: str, where: str) -> Ed25519PublicKey:
    """Return the key of a PEM text.

    Raises:
        UserError: not an Ed25519 public key; ``where`` names its place.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        problem = "this is the private half; never share it" if "PRIVATE KEY" in pem else f"{error}"
        fix = "`tunewright keys show NAME` prints the public half."
        raise UserError(f"Not a public key: {problem}", where=where, fix=fix) from None
    if not isinstance(key, Ed25519PublicKey):
        raise UserError("Not an Ed25519 key", where=where)
    return key


def _normal(pem: str, where: str) -> str:
    return public_pem(read_public(pem, where))


def public_pem(key: Ed25519PublicKey) -> str:
    """Return the key's SubjectPublicKeyInfo in PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def key_id(key: Ed25519PublicKey) -> str:
    """Return the key's ID (64 hex digits)."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def require_name(name: str) -> None:
    """Raise a UserError unless this is a valid key name."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"Invalid name {name!r}: use up to 63 lowercase letters, digits, and . _ - after the first", where="NAME"
        )
