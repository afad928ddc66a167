"""Sizes of memory as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """Return the bytes of a size such as ``24GB`` (10^9 bytes each) or ``24GiB`` (2^30); None if it is none."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS:
        return None
    return int(float(match[1]) * _UNITS[match[2].upper()]) or None


def gigabytes(count: int) -> str:
    """Bytes for people, in units of 10^9: ``13.5 GB``."""
    return f"{count / 1e9:,.{1 if count >= 10**9 else 2}f} GB"
