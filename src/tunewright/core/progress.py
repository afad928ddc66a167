"""How long work is followed and warnings are heard, without the library touching a terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

log = logging.getLogger("tunewright")


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count ``steps`` more as done; ``note`` is a short line shown beside the bar."""

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        """Points of curves at ``step`` of the work.

        Of training: ``loss`` and ``eval_loss``, the task's metric, and with replay ``pair_loss`` and ``replay_kl`` (or
        ``replay_loss``).
        """


class Reporter(Protocol):
    """Whoever listens: a terminal, a log, a web page."""

    def say(self, message: str) -> None:
        """Something the user wants to know."""

    def warn(self, message: str) -> None:
        """Something the user must know: nothing is dropped, cut or replaced without one of these."""

    def task(self, title: str, total: int, unit: str) -> AbstractContextManager[Task]:
        """Open a progress display for ``total`` of ``unit`` (a plural: "examples")."""


class LogTask:
    """Progress as debug messages."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count steps as done."""
        log.debug("+%d %s", steps, note)

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        """Points of curves."""
        log.debug("step %d %s", step, dict(numbers))


class LogReporter:
    """The default for callers from Python: everything goes to the logger ``tunewright``."""

    def say(self, message: str) -> None:
        log.info(message)

    def warn(self, message: str) -> None:
        log.warning(message)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        log.info("%s: %d %s", title, total, unit)
        yield LogTask()


def duration(seconds: float) -> str:
    """A time as people say it: ``40 seconds``, ``7 minutes``, ``3.5 hours``."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def minutes_text(seconds: float) -> str:
    """An expected time, no finer than minutes: ``less than a minute``, ``about 7 minutes``, ``about 3.5 hours``."""
    if seconds < 60:
        return "less than a minute"
    minutes = round(seconds / 60)
    if minutes >= 90:
        return f"about {seconds / 3600:.1f} hours"
    return "about 1 minute" if minutes == 1 else f"about {minutes} minutes"
