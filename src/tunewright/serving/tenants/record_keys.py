"""The keys of recorded requests: derived for each tenant, by HKDF, from the 256 random bits in the key file.

A tenant's records are encrypted with AES-256-GCM. Its end users, conversations and personal data become keyed digests
(HMAC-SHA-256), which nobody can guess without the file and which differ between tenants.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, write_bytes, write_text

_HEAD = "tunewright-record-key-1 "
_FILE = re.compile(_HEAD + r"([0-9a-f]{64})\n?")
_NONCE_BYTES = 12
_LOWEST = 100_000
"""The first number of a placeholder: all have six digits."""


class RecordKeys:
    """The keys of one tenant's records."""

    def __init__(self, master: bytes, tenant: str) -> None:
        self._master = master
        self._tenant = tenant

    @cached_property
    def id(self) -> str:
        """An id of the key file, which reveals nothing about the key."""
        return self._derived("id")[:8].hex()

    def digest(self, *parts: str) -> str:
        """Return the keyed digest of texts."""
        return hmac.digest(self._digests, canonical_json(parts).encode(), hashlib.sha256).hex()

    def placeholder(self, unit: str, kind: str, value: str) -> int:
        """Return the number of a value's placeholder, the same in all records of a unit."""
        return _LOWEST + int(self.digest("placeholder", unit, kind, value)[:16], 16) % (10 * _LOWEST - _LOWEST)

    def encrypt(self, document: Any, request: int) -> bytes:
        """Return a request's record, encrypted."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        text: bytes = self._cipher.encrypt(nonce, json.dumps(document).encode(), str(request).encode())
        return nonce + text

    def decrypt(self, body: bytes, request: int) -> Any:
        """Return a request's record.

        Raises:
            UserError: it was changed, or belongs to another request.
        """
        from cryptography.exceptions import InvalidTag

        try:
            text = self._cipher.decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], str(request).encode())
        except InvalidTag:
            fix = f"`tunewright tenant forget {self._tenant} --all` deletes all records of the tenant."
            raise UserError(f"The record of request {request} was changed after it was written", fix=fix) from None
        return json.loads(text)

    def _derived(self, purpose: str) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = canonical_json(["tunewright records", purpose, self._tenant]).encode()
        return HKDF(SHA256(), 32, None, info).derive(self._master)

    @cached_property
    def _digests(self) -> bytes:
        return self._derived("digests")

    @cached_property
    def _cipher(self) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(self._derived("records"))


class KeyFile:
    """The file with the key of all tenants' records, readable by its owner only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tenants: dict[str, RecordKeys] = {}

    def create(self) -> None:
        """Create the file with a new key, if it does not exist."""
        if self.path.exists():
            return
        if not self.path.parent.exists():
            write_text(self.path.parent / ".gitignore", "*\n")
        write_bytes(self.path, f"{_HEAD}{secrets.token_hex(32)}\n".encode(), 0o600)

    def keys(self, tenant: str, key_id: str | None = None) -> RecordKeys:
        """Return a tenant's keys; ``key_id`` is the id of the file that its records need.

        Raises:
            UserError: the file is missing, no key file, readable by others, or not the one that the records need.
        """
        if tenant not in self._tenants:
            self._tenants[tenant] = RecordKeys(self._read(), tenant)
        keys = self._tenants[tenant]
        if key_id not in (None, keys.id):
            del self._tenants[tenant]  # the right file may be put back while a server runs
            fix = "Put back the file that they were recorded with, from a backup or from another server."
            raise UserError(f"The key file is not that of {tenant}'s records", where=str(self.path), fix=fix)
        return keys

    def _read(self) -> bytes:
        where = str(self.path)
        try:
            mode, text = self.path.stat().st_mode, self.path.read_text(errors="replace")
        except OSError as error:
            fix = "Copy it from a backup or from another server: without it, recorded requests can only be deleted."
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise UserError(f"The key file of recorded requests {what}", where=where, fix=fix) from None
        if mode & 0o077:
            raise UserError("Other users can read the key file", where=where, fix=f"Run `chmod 600 {where}`.")
        if (found := _FILE.fullmatch(text)) is None:
            fix = "Put back the key file from a backup or from another server."
            raise UserError("This is not a key file of recorded requests", where=where, fix=fix)
        return bytes.fromhex(found[1])
