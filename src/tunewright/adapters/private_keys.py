"""This user's private keys, outside any project and encrypted with a passphrase.

  DATA/keys/NAME.pem  OpenSSH's private key format, readable by its owner only; DATA is the user's data folder

The format has the public half in clear text, so only signing asks for the passphrase. It comes from the environment
variable ``TUNEWRIGHT_KEY_PASSPHRASE``, from the file that ``TUNEWRIGHT_KEY_PASSPHRASE_FILE`` names, or from the
terminal.
"""

from __future__ import annotations

import base64
import os
import re
import stat
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import platformdirs

from tunewright.adapters.keys import key_id, public_pem, require_name
from tunewright.core.errors import UserError
from tunewright.core.io import writing
from tunewright.core.progress import Reporter

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PASSPHRASE: Final = "TUNEWRIGHT_KEY_PASSPHRASE"
NEW_PASSPHRASE: Final = "TUNEWRIGHT_KEY_NEW_PASSPHRASE"

MIN_LENGTH: Final = 12
"""Characters of the shortest passphrase. A guess costs a sixth of a second, so a short one would not last."""
_ROUNDS: Final = 24
"""Rounds of bcrypt_pbkdf: the default of ssh-keygen."""
_ATTEMPTS: Final = 3
_OPENSSH = re.compile(rb"-----BEGIN OPENSSH PRIVATE KEY-----\s(.+?)-----END OPENSSH PRIVATE KEY-----", re.DOTALL)


@dataclass(frozen=True)
class PrivateKey:
    """One of the user's private keys. It signs once it is unlocked."""

    path: Path
    _decrypted: Ed25519PrivateKey | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The key's name."""
        return self.path.stem

    @cached_property
    def _public(self) -> tuple[Ed25519PublicKey, bool]:
        return _public_half(_read_secret(self.path), str(self.path))

    @property
    def public_key(self) -> str:
        """The public half: SubjectPublicKeyInfo, PEM."""
        return public_pem(self._public[0])

    @property
    def id(self) -> str:
        """The SHA-256 of the public half, 64 hex digits."""
        return key_id(self._public[0])

    @property
    def is_encrypted(self) -> bool:
        """Return whether the file needs a passphrase."""
        return self._public[1]

    def unlock(self, reporter: Reporter) -> PrivateKey:
        """Return the key ready to sign. The reporter asks for the passphrase if no variable states it.

        Raises:
            UserError: not encrypted, no passphrase, or the wrong one.
        """
        if self._decrypted is not None:
            return self
        if not self.is_encrypted:
            raise UserError(
                f"Your key {self.name!r} is not encrypted",
                where=str(self.path),
                fix=f"Encrypt it: tunewright keys passphrase {self.name}",
            )
        if (stated := _stated(PASSPHRASE)) is not None:
            if (key := self._decrypt(stated)) is None:
                fix = f"Correct {PASSPHRASE} or the file that {PASSPHRASE}_FILE names."
                raise UserError(f"Wrong passphrase for your key {self.name!r}", where=str(self.path), fix=fix)
            return PrivateKey(self.path, key)
        for attempt in range(_ATTEMPTS):
            if attempt > 0:
                reporter.warn("Wrong passphrase; try again.")
            text = _asked(f"Passphrase of your key {self.name}: ", reporter, PASSPHRASE, str(self.path))
            if (key := self._decrypt(text)) is not None:
                return PrivateKey(self.path, key)
        raise UserError(f"Wrong passphrase for your key {self.name!r}, {_ATTEMPTS} times", where=str(self.path))

    def sign(self, message: bytes) -> bytes:
        """Return the signature (64 bytes) over a message. The key must be unlocked."""
        assert self._decrypted is not None
        return self._decrypted.sign(message)

    def change_passphrase(self, reporter: Reporter) -> None:
        """Encrypt the key's file with a new passphrase. A file that is not encrypted needs no passphrase before.

        Raises:
            UserError: no passphrase, the wrong one, or a new one that is too short.
        """
        key = self.unlock(reporter)._decrypted if self.is_encrypted else self._decrypt(None)
        assert key is not None
        text = _encrypted(key, _new_passphrase(NEW_PASSPHRASE, reporter, str(self.path)))
        with writing(self.path):
            temporary = _written(self.path, text)
            temporary.replace(self.path)

    def _decrypt(self, passphrase: str | None) -> Ed25519PrivateKey | None:
        """Return the private half; None if the passphrase is wrong.

        Raises:
            UserError: a damaged file, or private and public halves of different keys.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

        if passphrase == "":  # the package takes it for none
            return None
        content = _read_secret(self.path)
        load = load_ssh_private_key if _OPENSSH.search(content) else load_pem_private_key
        try:
            key = load(content, None if passphrase is None else _bytes(passphrase))
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            if str(error) == "Corrupt data: broken checksum":  # the format's check of the passphrase
                return None
            raise UserError(f"Not a private key: {error}", where=str(self.path)) from None
        if not isinstance(key, Ed25519PrivateKey) or key_id(key.public_key()) != self.id:
            raise UserError("The private and the public half are of different keys", where=str(self.path))
        return key


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


def new_private_key(name: str, reporter: Reporter) -> PrivateKey:
    """Create a key, encrypted with a passphrase from the environment or the reporter, and return it unlocked.

    Raises:
        UserError: an invalid name, one that a key has already, or no passphrase.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    require_name(name)
    path = private_folder() / f"{name}.pem"
    taken = UserError(f"You have a key {name!r} already", where=str(path), fix="Choose another name.")
    if path.exists():
        raise taken
    key = Ed25519PrivateKey.generate()
    text = _encrypted(key, _new_passphrase(PASSPHRASE, reporter, str(path)))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)
        temporary = _written(path, text)
        try:
            os.link(temporary, path)  # unlike a rename, a link never replaces a file
        except FileExistsError:
            raise taken from None
        finally:
            temporary.unlink()
    return PrivateKey(path, key)


def _written(path: Path, text: bytes) -> Path:
    """Write the text to a temporary file next to ``path`` and return its path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # Created with its mode: setting it afterwards would leave a moment in which others can read the key.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink()
        raise
    return temporary


def _encrypted(key: Ed25519PrivateKey, passphrase: str) -> bytes:
    """Return the file of a key. PKCS #8 is not used, since the package hashes a passphrase for it 2,048 times only."""
    from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat

    encryption = PrivateFormat.OpenSSH.encryption_builder().kdf_rounds(_ROUNDS).build(_bytes(passphrase))
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, encryption)


def _public_half(content: bytes, where: str) -> tuple[Ed25519PublicKey, bool]:
    """Return a private key's public half, which needs no passphrase, and whether the private half is encrypted.

    Raises:
        UserError: not an Ed25519 key, or a format in which the public half is encrypted too.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_public_key

    try:
        if (found := _OPENSSH.search(content)) is None:
            public, encrypted = load_pem_private_key(content, None).public_key(), False
        else:
            # PROTOCOL.key of OpenSSH: magic, cipher, KDF, its options, number of keys, public half, private half.
            rest = base64.b64decode(found[1]).removeprefix(b"openssh-key-v1\0")
            cipher, rest = _string(rest)
            for _ in range(2):
                _, rest = _string(rest)
            half, _ = _string(rest[4:])
            kind, _ = _string(half)
            public = load_ssh_public_key(kind + b" " + base64.b64encode(half))
            encrypted = cipher != b"none"
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(f"Not a private key: {error}", where=where) from None
    if not isinstance(public, Ed25519PublicKey):
        raise UserError("Not an Ed25519 key", where=where)
    return public, encrypted


def _string(data: bytes) -> tuple[bytes, bytes]:
    """Return the first string of OpenSSH's format (a 32-bit length and the bytes), and the rest."""
    end = 4 + int.from_bytes(data[:4])
    if len(data) < max(4, end):
        raise ValueError("the file is cut")
    return data[4:end], data[end:]


def _new_passphrase(variable: str, reporter: Reporter, where: str) -> str:
    text = _stated(variable)
    again = text
    if text is None:
        text = _asked(f"New passphrase (at least {MIN_LENGTH} characters): ", reporter, variable, where)
    if len(text) < MIN_LENGTH:
        raise UserError(f"The passphrase must have at least {MIN_LENGTH} characters (got {len(text)})", where=where)
    if again is None:
        again = _asked("The same passphrase again: ", reporter, variable, where)
    if text != again:
        raise UserError("The two passphrases differ", where=where, fix="Run the same command again.")
    return text


def _asked(prompt: str, reporter: Reporter, variable: str, where: str) -> str:
    text = reporter.secret(prompt)
    if text is None:
        fix = f"Run this on a terminal, or let {variable}_FILE name a file with the passphrase."
        raise UserError("The key's passphrase is needed, and there is no terminal to ask for it", where=where, fix=fix)
    return text


def _stated(variable: str) -> str | None:
    """Return the passphrase that the environment states, in the variable or in the file that it names."""
    value, file = os.environ.get(variable), os.environ.get(f"{variable}_FILE")
    if file is not None:
        if value is not None:
            raise UserError(f"{variable} and {variable}_FILE are mutually exclusive", fix="Unset one of them.")
        try:
            value = Path(file).read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            problem = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UserError(f"The passphrase cannot be read: {problem}", where=f"{variable}_FILE, {file}") from None
        value = value.removesuffix("\n").removesuffix("\r")
    if value == "":
        raise UserError("The passphrase is empty", where=f"{variable}_FILE, {file}" if file else variable)
    return value


def _bytes(passphrase: str) -> bytes:
    return passphrase.encode("utf-8", "surrogateescape")


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
