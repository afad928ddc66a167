"""What a search of a text finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunewright.data.pii.secret_patterns import Category


@dataclass(frozen=True)
class Finding:
    """A secret or a piece of personal data at ``text[start:end]``; the value itself is never kept."""

    kind: str
    category: Category
    start: int
    end: int


Finder = Callable[[str], Sequence[Finding]]
"""Searches a text for what patterns cannot tell; what it finds is told and replaced like the rest."""
