"""What a stop by Ctrl-C or SIGTERM waits for, and who else takes signals: shared by long work and the command line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_finishing: list[str] = []


@contextmanager
def finishing(what: str) -> Iterator[None]:
    """Have a stop wait for this block, which itself takes care to end soon. ``what`` says what it does first."""
    _finishing.append(what)
    try:
        yield
    finally:
        _finishing.pop()


def waits_for() -> str | None:
    """Return what a stop would wait for now; None if it waits for nothing."""
    return _finishing[-1] if _finishing else None


@contextmanager
def handled_elsewhere() -> Iterator[None]:
    """Hide signals from the command line while a server handles and reports them itself; from the main thread only."""
    before = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
