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
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import platformdirs

from tunewright.adapters.manifest import Record, parse_record
from tunewright.core.clock import now, without_milliseconds
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.core.processes import Finished, run
from tunewright.data.versions.version import current_author

NAMESPACE: Final = "tunewright-adapter@1"
"""The purpose of signatures: one made for anything else never counts for an adapter."""

_PUBLIC_KEY = r"(?P<key>(?:sk-)?(?:ssh|ecdsa)-[\w@.-]+[ \t]+[A-Za-z0-9+/]+={0,2})(?:[ \t]+(?P<comment>.*))?"
"""A public key: its type, the key in base64, and a comment."""
_OPTIONS = f'namespaces="{NAMESPACE}"'
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,62}")
_SIGNER = re.compile(r'"?(?P<names>[^\s"]+)"?[ \t]+(?:(?P<options>(?:[^\s"]|"[^"]*")+)[ \t]+)?' + _PUBLIC_KEY)
_EVENT = re.compile(r"(?:trusted|revoked) on (?P<at>\S+?)(?: by (?P<by>.*?))?(?:: (?P<because>.*))?")
_RESTORE = "Correct it, or restore the file, from git for example."


def require_ssh_keygen() -> str:
    """Return the path of ``ssh-keygen``."""
    program = shutil.which("ssh-keygen")
    if program is None:
        fix = "Install OpenSSH 8.2 or later (Debian: openssh-client)."
        raise UserError("The program ssh-keygen is not installed", where="PATH", fix=fix)
    return program


def ssh_keygen(*arguments: str, data: bytes = b"", prompt: bool = False) -> Finished:
    """Run ``ssh-keygen`` with this input; with ``prompt`` it may ask at the terminal for a passphrase."""
    command = [require_ssh_keygen(), *arguments]
    # Without a terminal, ssh-keygen fails instead of waiting for a person. With one, it asks there
    # although its input is a pipe; a desktop's askpass would open a window. The user's
    # SSH_ASKPASS_REQUIRE wins.
    variables = {"SSH_ASKPASS_REQUIRE": "never", **os.environ}
    if prompt and "SSH_ASKPASS" in os.environ:
        variables = dict(os.environ)
    ran = run(command, data=data, env=variables, terminal=prompt)
    if ran.code != 0 and "usage: ssh-keygen" in ran.stderr:
        raise UserError("This ssh-keygen makes no signatures", where=command[0], fix="Install OpenSSH 8.2 or later.")
    return ran


def user_path(path: str | Path) -> Path:
    """Return a path with ``~`` replaced; Path.expanduser fails for a user without a home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def own_keys() -> Iterator[tuple[Path, str]]:
    """Yield the files and fingerprints of this user's keys: OpenSSH's keys and keys of an earlier tunewright."""
    created = platformdirs.user_data_path("tunewright") / "keys"
    for path in (*sorted(user_path("~/.ssh").glob("*.pub")), *sorted(created.glob("*.pem"))):
        try:
            yield path, file_fingerprint(path)
        except (UserError, OSError):  # not a key, not readable, or no ssh-keygen to ask
            continue


def file_fingerprint(path: Path) -> str:
    """Return the fingerprint of a public or private key's file; no passphrase is needed."""
    if path.suffix == ".pub":
        return _read_public_key(path)[1]
    ran = ssh_keygen("-l", "-f", str(path))
    if (found := re.search(r"SHA256:[A-Za-z0-9+/]+", ran.stdout)) is None:
        raise UserError(f"Not a key: {ran.stderr.strip()}", where=str(path))
    return found[0]


def _read_public_key(file: Path) -> tuple[str, str]:
    """Return the one public key in a file (type and key), and its fingerprint."""
    text = file.read_text(encoding="utf-8", errors="replace")
    fix = f"`ssh-keygen -y -f {file.with_suffix('')}` prints the public half of a key."
    if "PRIVATE KEY-----" in text:
        raise UserError("Not a public key: this is the private half; never share it", where=str(file), fix=fix)
    if (found := re.fullmatch(_PUBLIC_KEY, text.strip())) is None:
        raise UserError("Not one public key in OpenSSH's format", where=str(file), fix=fix)
    return _checked(found["key"], str(file))


def _checked(key: str, where: str) -> tuple[str, str]:
    """Return a public key and its fingerprint; its type and content must agree."""
    kind, text = key.split()
    try:
        blob = base64.b64decode(text, validate=True)
    except binascii.Error:
        blob = b""
    # The key begins with its type, as a string of the SSH protocol (RFC 4251): the length in 32 bits, and the bytes.
    if not blob.startswith(len(kind).to_bytes(4) + kind.encode()):
        raise UserError("The public key does not match its type", where=where, fix="Copy the whole line again.")
    return f"{kind} {text}", fingerprint(blob)


def fingerprint(blob: bytes) -> str:
    """Return the fingerprint of a key in the encoding of the SSH protocol, as ``ssh-keygen -l`` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


class KeyEvent(Record):
    """An action on a key, from the comment of its line: its time (UTC, ISO 8601), its author, and its reason."""

    at: str | None
    by: str | None = None
    because: str | None = None

    def __str__(self) -> str:
        """Return what follows the word *trusted* or *revoked*, in a line and in messages."""
        at, by = f" on {self.at}" if self.at else "", f" by {self.by}" if self.by else ""
        return f"{at}{by}: {self.because}" if self.because else f"{at}{by}"

    @classmethod
    def of(cls, comment: str | None) -> KeyEvent:
        """Return the action that a line's comment records; another comment is its reason."""
        found = _EVENT.fullmatch(comment or "")
        return cls(at=None, because=comment or None) if found is None else cls(**found.groupdict())


class TrustedKey(Record):
    """A public key that the project trusts or has revoked."""

    name: str
    id: str
    """The key's fingerprint, as ``ssh-keygen -l`` prints it. For a key of keys/NAME.json, which an
    earlier tunewright wrote, the SHA-256 of its DER, which its DSSE signatures name."""
    public_key: str
    """The type and the key in OpenSSH's format."""
    trusted: KeyEvent
    revoked: KeyEvent | None = None
    options: str = ""
    """The options of the key's line, such as ``valid-before="20270101"``."""

    @property
    def fingerprint(self) -> str:
        """The key's fingerprint."""
        return fingerprint(base64.b64decode(self.public_key.split()[1]))


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
        self.has_krl = self.revocations.exists() and self.revocations.read_bytes().startswith(b"SSHKRL\n\0")
        """True if the revoked keys are a KRL, OpenSSH's binary format."""
        self._allowed = folder / "allowed_signers"
        self._revoked: dict[str, KeyEvent] = {}
        """Revocations by fingerprint; empty for a KRL, which only ``ssh-keygen`` reads."""
        for line, where in () if self.has_krl else _lines(self.revocations):
            if (found := re.fullmatch(_PUBLIC_KEY, line)) is None:
                raise UserError("Not a public key in OpenSSH's format", where=where, fix=_RESTORE)
            self._revoked[_checked(found["key"], where)[1]] = KeyEvent.of(found["comment"])
        signers = [self._signer(line, where) for line, where in _lines(self._allowed)]
        self.all = [*signers, *(self._former(path) for path in sorted(folder.glob("*.json")))]

    @property
    def required(self) -> bool:
        """Return whether adapters need a trusted signature: from the first key on, even if all keys are revoked."""
        return bool(self.all) or self.revocations.exists()

    @property
    def allowed_signers(self) -> str:
        """The file for ``ssh-keygen``: the project's file, and the keys of keys/NAME.json."""
        former = (key for key in self.all if not key.id.startswith("SHA256:") and key.revoked is None)
        return _text(self._allowed) + "".join(f"{key.name} {_OPTIONS} {key.public_key}\n" for key in former)

    def find(self, mark: str) -> TrustedKey | None:
        """Return the key with this fingerprint."""
        return next((key for key in self.all if key.fingerprint == mark), None)

    def revocation(self, mark: str) -> KeyEvent | None:
        """Return the revocation of the key with this fingerprint, unless it is in a KRL.

        A key may be in several files: one revocation is enough.
        """
        found = [self._revoked.get(mark), *(key.revoked for key in self.all if key.fingerprint == mark)]
        return next((each for each in found if each is not None), None)

    def list(self) -> Sequence[KnownKey]:
        """Return the keys that the project trusts or has revoked."""
        own = {mark for _, mark in own_keys()}
        return [KnownKey(key.name, key.id, key.fingerprint in own, key) for key in self.all]

    def trust(self, key: str | Path, name: str | None = None) -> TrustedKey:
        """Add a key to the project's trusted keys.

        Args:
            key: a file with a public key in OpenSSH's format.
            name: its name in the project (None: the file's).

        Raises:
            UserError: not such a file, a revoked key, or a name or key that is known already.
        """
        file = user_path(key)
        if not file.is_file():
            fix = "Give the file of a public key, such as ~/.ssh/id_ed25519.pub; `ssh-keygen -t ed25519` creates it."
            raise UserError("No such file", where=str(key), fix=fix)
        public, mark = _read_public_key(file)
        name = file.stem if name is None else name
        if not _NAME.fullmatch(name):
            what = f"Invalid name {name!r}: use up to 63 letters, digits, and . _ - + @ after the first"
            raise UserError(what, where="--name", fix="Choose another with --name NAME.")
        where = str(self.folder)
        if (revoked := self.revocation(mark)) is not None:
            raise UserError(f"This key was revoked{revoked}", where=where, fix="Use another key.")
        if (known := self.find(mark)) is not None:
            raise UserError(f"The project trusts this key already, as {known.name}", where=where)
        if any(known.name == name for known in self.all):
            raise UserError(f"Another key is named {name}", where=where, fix="Choose another with --name.")
        event = self._event()
        write_text(self._allowed, _text(self._allowed) + f"{name} {_OPTIONS} {public} trusted{event}\n")
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
        event = self._event(" ".join(because.split()))
        lines = "".join(f"{key.public_key} revoked{event}\n" for key in valid)
        write_text(self.revocations, _text(self.revocations) + lines)
        return valid[0].model_copy(update={"revoked": event})

    def _event(self, because: str | None = None) -> KeyEvent:
        author = current_author(self.folder.parent)
        return KeyEvent(at=without_milliseconds(now()), by=author, because=because)

    def _signer(self, line: str, where: str) -> TrustedKey:
        found = _SIGNER.fullmatch(line)
        if found is None:
            raise UserError("Not a line of allowed_signers (name, options, key)", where=where, fix=_RESTORE)
        public, mark = _checked(found["key"], where)
        name, options, trusted = found["names"].split(",")[0], found["options"] or "", KeyEvent.of(found["comment"])
        revoked = self._revoked.get(mark)
        return TrustedKey(name=name, id=mark, public_key=public, trusted=trusted, revoked=revoked, options=options)

    def _former(self, path: Path) -> TrustedKey:
        """Return the key of keys/NAME.json, a file of an earlier tunewright: an Ed25519 key as PEM."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

        key = parse_record(TrustedKey, path.read_bytes(), str(path))
        try:
            public = load_pem_public_key(key.public_key.encode())
            der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            openssh = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        except (ValueError, UnsupportedAlgorithm):
            der, openssh = b"", ""
        # The loader skips text before the PEM block: such a file has another origin.
        pem = key.public_key.startswith("-----BEGIN") and openssh.startswith("ssh-ed25519 ")
        ours = pem and key.id == hashlib.sha256(der).hexdigest()
        if not ours or key.name != path.stem:
            raise UserError("The file's name or ID does not match its key", where=str(path), fix=_RESTORE)
        key = key.model_copy(update={"public_key": openssh})
        return key.model_copy(update={"revoked": self._revoked.get(key.fingerprint, key.revoked)})


def _text(path: Path) -> str:
    """Return a file's text, with a line end after the last line; empty without the file."""
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
