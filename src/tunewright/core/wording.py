"""Counts with their nouns."""

from __future__ import annotations


def count_of(number: int, thing: str) -> str:
    """Return a count with its noun: ``1 row``, ``1,200 rows``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
