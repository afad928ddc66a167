"""API keys: what is shown once, and what is kept of it.

A key is ``tw_PREFIX_SECRET``. The prefix finds its line in the database and may be shown; the secret is 256 random
bits. SHA-256 of the whole key is what is kept. Slow hashes (bcrypt, Argon2) are for passwords, which people choose
from few enough that a thief tries them all; of 2**256 equally likely keys nobody tries any part, however fast the
hash, and a slow one would cost every request its time (NIST SP 800-63B, section 5.1.1.2 asks for it below 112 bits).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

_PREFIX_BYTES = 5
_SECRET_BYTES = 32
_KEY = re.compile(r"(tw_[0-9a-f]{10})_[A-Za-z0-9_-]{43}")
_NOBODYS = hashlib.sha256(secrets.token_bytes(_SECRET_BYTES)).hexdigest()


def new_key() -> tuple[str, str]:
    """Return a fresh key, and its prefix."""
    prefix = f"tw_{secrets.token_hex(_PREFIX_BYTES)}"
    return f"{prefix}_{secrets.token_urlsafe(_SECRET_BYTES)}", prefix


def prefix_of(key: str) -> str | None:
    """Return the part of a key that its line is found by; None of what is no key at all."""
    match = _KEY.fullmatch(key)
    return match.group(1) if match else None


def key_hash(key: str) -> str:
    """Return what is kept of a key: SHA-256 in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_key(key: str, kept: str | None) -> bool:
    """Return whether ``key`` is the one of which ``kept`` was kept (None: of no key); in the same time either way."""
    return hmac.compare_digest(key_hash(key), kept or _NOBODYS) and kept is not None
