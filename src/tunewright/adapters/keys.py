"""Signing keys: private keys outside any project, and the public keys that a project trusts.

  DATA/keys/NAME.pem      private, PKCS #8, readable by its owner only; DATA is the user's data folder for tunewright
  PROJECT/keys/NAME.json  public, with the author and time of the trust; meant to be committed to git

Ed25519 (RFC 8032) from the package cryptography. A key's ID is the SHA-256 of its SubjectPublicKeyInfo (RFC 5280) in
DER.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from tunewright.adapters.manifest import Digest, Name, Record, parse_record
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import write_json, writing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

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
            _read_public(self.public_key, self.name).verify(signature, message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class PrivateKey:
    """One of the user's private keys."""

    path: Path

    @property
    def name(self) -> str:
        """The key's name."""
        return self.path.stem

    @cached_property
    def _key(self) -> Ed25519PrivateKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(_read_secret(self.path), password=None)
        except (ValueError, TypeError) as error:
            raise UserError(f"Not a private key: {error}", where=str(self.path)) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise UserError("Not an Ed25519 key", where=str(self.path))
        return key

    @property
    def public_key(self) -> str:
        """The public half: SubjectPublicKeyInfo, PEM."""
        return _pem(self._key.public_key())

    @property
    def id(self) -> str:
        """The SHA-256 of the public half, 64 hex digits."""
        return _identity(self._key.public_key())

    def sign(self, message: bytes) -> bytes:
        """Return the signature (64 bytes) over a message."""
        return self._key.sign(message)


def private_folder() -> Path:
    """Return the folder of this user's private keys, outside any project so that none is committed."""
    return platformdirs.user_data_path("tunewright") / "keys"


def private_keys() -> list[PrivateKey]:
    """Return this user's private keys, by name."""
    return [PrivateKey(path) for path in sorted(private_folder().glob("*.pem"))]


def private_key(name: str) -> PrivateKey:
    """Return this user's key of that name.

    Raises:
        UserError: no such key.
    """
    known = {key.name: key for key in private_keys()}
    if name not in known:
        fix = f"Your keys: {', '.join(known)}." if known else f"`tunewright keys create {name}` creates it."
        raise UserError(f"You have no key {name!r}", where=str(private_folder()), fix=fix)
    return known[name]


def new_private_key(name: str) -> PrivateKey:
    """Create a key.

    Raises:
        UserError: an invalid name, or one that a key has already.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    _require_name(name)
    path = private_folder() / f"{name}.pem"
    text = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        # Created with its mode: setting it afterwards would leave a moment in which others can read the key.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike a rename, a link never replaces a file
        except FileExistsError:
            raise UserError(f"You have a key {name!r} already", where=str(path), fix="Choose another name.") from None
        finally:
            temporary.unlink(missing_ok=True)
    return PrivateKey(path)


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
        _require_name(name)
        identity = _identity(_read_public(public_key, name))
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
    if key.name != path.stem or key.id != _identity(_read_public(key.public_key, str(path))):
        raise UserError("The file's name or ID does not match its key", where=str(path), fix=fix)
    return key


def _read_secret(path: Path) -> bytes:
    """Return a private key's file if only its owner can read it, as ssh requires."""
    handle = os.open(path, os.O_RDONLY)
    with os.fdopen(handle, "rb") as file:
        facts = os.fstat(file.fileno())
        if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
            raise UserError(
                f"Other users can read this private key (mode {stat.S_IMODE(facts.st_mode):o})",
                where=str(path),
                fix=f"Run chmod 600 {path}. If somebody may have read it, revoke it and create another.",
            )
        return file.read()


def _read_public(pem: str, where: str) -> Ed25519PublicKey:
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
    return _pem(_read_public(pem, where))


def _pem(key: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _identity(key: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _require_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise UserError(
            f"Invalid name {name!r}: use up to 63 lowercase letters, digits, and . _ - after the first", where="NAME"
        )
