"""The name that changes are recorded under, where the person is known by another name than git's user.name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

AUTHOR_VARIABLE = "TUNEWRIGHT_AUTHOR"
"""Names the author of what a command records."""

_author: ContextVar[str | None] = ContextVar("tunewright_author", default=None)


@contextmanager
def authored_by(name: str) -> Iterator[None]:
    """Record changes under this name while the block runs, in its thread alone."""
    before = _author.set(name)
    try:
        yield
    finally:
        _author.reset(before)


def stated_author() -> str | None:
    """Return the name of :func:`authored_by`, else that of the variable, else None."""
    return _author.get() or " ".join(os.environ.get(AUTHOR_VARIABLE, "").split()) or None
