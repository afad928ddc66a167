"""``ssh-keygen``, and OpenSSH's format of public keys."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import platformdirs

from tunewright.core.errors import UserError
from tunewright.core.processes import Finished, run

PUBLIC_KEY: Final = r"(?P<key>(?:sk-)?(?:ssh|ecdsa)-[\w@.-]+[ \t]+[A-Za-z0-9+/]+={0,2})(?:[ \t]+(?P<comment>.*))?"
"""Pattern of a public key: its type, the key in base64, and a comment."""


def require_ssh_keygen() -> str:
    """Return the path of ``ssh-keygen``.

    Raises:
        UserError: it is not installed.
    """
    program = shutil.which("ssh-keygen")
    if program is None:
        fix = "Install OpenSSH 8.2 or later (Debian: openssh-client)."
        raise UserError("The program ssh-keygen is not installed", where="PATH", fix=fix)
    return program


def ssh_keygen(*arguments: str, data: bytes = b"", prompt: bool = False) -> Finished:
    """Run ``ssh-keygen``.

    Args:
        arguments: its options.
        data: its standard input.
        prompt: let it ask at the terminal for a passphrase.

    Raises:
        UserError: it is not installed, or too old for signatures.
    """
    command = [require_ssh_keygen(), *arguments]
    # Without a terminal of its own it fails instead of waiting for a person; with one it asks there, although its input
    # is a pipe, for which a desktop's askpass would open a window. A stated SSH_ASKPASS_REQUIRE holds.
    variables = {"SSH_ASKPASS_REQUIRE": "never", **os.environ}
    if prompt and "SSH_ASKPASS" in os.environ:
        variables = dict(os.environ)
    ran = run(command, data=data, env=variables, terminal=prompt)
    if ran.code != 0 and "usage: ssh-keygen" in ran.stderr:
        raise UserError("This ssh-keygen makes no signatures", where=command[0], fix="Install OpenSSH 8.2 or later.")
    return ran


def own_keys() -> Iterator[tuple[Path, str]]:
    """Yield the files of this user's keys, each with its fingerprint: OpenSSH's, and those that an earlier tunewright
    created.
    """
    ssh = Path(os.path.expanduser("~/.ssh"))  # noqa: PTH111 (Path.home fails for a user without a home)
    created = platformdirs.user_data_path("tunewright") / "keys"
    for path in (*sorted(ssh.glob("*.pub")), *sorted(created.glob("*.pem"))):
        try:
            yield path, file_fingerprint(path)
        except (UserError, OSError):  # not a key, not readable, or no ssh-keygen that could tell
            continue


def file_fingerprint(path: Path) -> str:
    """Return the fingerprint of a public or private key's file, which needs no passphrase.

    Raises:
        UserError: not a key.
    """
    if path.suffix == ".pub":
        return key_fingerprint(read_public_key(path), str(path))
    ran = ssh_keygen("-l", "-f", str(path))
    if (found := re.search(r"SHA256:[A-Za-z0-9+/]+", ran.stdout)) is None:
        raise UserError(f"Not a key: {ran.stderr.strip()}", where=str(path))
    return found[0]


def read_public_key(file: Path) -> str:
    """Return the type and the key of a file with one public key.

    Raises:
        UserError: not such a file.
    """
    text = file.read_text(encoding="utf-8", errors="replace")
    fix = f"`ssh-keygen -y -f {file.with_suffix('')}` prints the public half of a key."
    if "PRIVATE KEY-----" in text:
        raise UserError("Not a public key: this is the private half; never share it", where=str(file), fix=fix)
    found = re.fullmatch(PUBLIC_KEY, text.strip())
    if found is None:
        raise UserError("Not one public key in OpenSSH's format", where=str(file), fix=fix)
    return " ".join(found["key"].split())


def key_fingerprint(public: str, where: str) -> str:
    """Return the fingerprint of a public key.

    Raises:
        UserError: its type and its content differ.
    """
    kind, text = public.split()
    try:
        blob = base64.b64decode(text, validate=True)
    except binascii.Error:
        blob = b""
    if not blob.startswith(string(kind.encode())):
        raise UserError("The public key does not match its type", where=where, fix="Copy the whole line again.")
    return fingerprint(blob)


def fingerprint(blob: bytes) -> str:
    """Return the fingerprint of a key in the encoding of the SSH protocol, as ``ssh-keygen -l`` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def string(data: bytes) -> bytes:
    """Return a string of the SSH protocol (RFC 4251): its length in 32 bits, and the bytes."""
    return len(data).to_bytes(4) + data
