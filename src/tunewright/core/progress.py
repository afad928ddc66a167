"""Progress, measured curves and warnings, reported without writing to a terminal."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from statistics import fmean
from typing import Protocol

from tunewright.core.text import count_of, visible

log = logging.getLogger("tunewright")


class Task(Protocol):
    """A piece of work in progress."""

    def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
        """Count ``steps`` more as done; ``note`` is a short text shown next to the bar.

        ``kept`` steps were done by an earlier run, so they say nothing about the speed.
        """

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record values at ``step`` of the work.

        Training records ``loss`` and ``eval_loss``, the task's metric, and with replay ``pair_loss`` and
        ``replay_kl`` (or ``replay_loss``).
        """


class Reporter(Protocol):
    """The receiver of messages: a terminal, a log or a web page."""

    def say(self, message: str) -> None:
        """Report progress or a result."""

    def warn(self, message: str) -> None:
        """Report a problem: nothing is dropped, cut or replaced without a warning."""

    def task(self, title: str, total: int, unit: str) -> AbstractContextManager[Task]:
        """Open a progress display for ``total`` of ``unit`` (a plural: "examples")."""


class LogTask:
    """Progress as debug messages."""

    def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
        """Log the steps."""
        log.debug("+%d%s %s", steps, " kept" if kept else "", note)

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the values."""
        log.debug("step %d %s", step, dict(numbers))


class LogReporter:
    """A reporter that logs to the logger ``tunewright``: the default in programs that configure logging."""

    def say(self, message: str) -> None:
        log.info(message)

    def warn(self, message: str) -> None:
        log.warning(message)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        log.info("%s: %d %s", title, total, unit)
        yield LogTask()


_SLOW_S = 2.0
_EVERY_S = 10.0


@contextmanager
def slow(reporter: Reporter, what: str) -> Iterator[None]:
    """Report what is being done, if it takes more than two seconds."""
    timer = threading.Timer(_SLOW_S, reporter.say, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Pace:
    """The speed of a task in this process, without kept steps and the first batch, which includes a warm-up."""

    burst_s = 1.0  # advances this soon after the first count as part of it

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = self.kept = self._first = 0
        self._began: float | None = None
        self._since = 0.0

    def advance(self, steps: int, *, kept: bool) -> None:
        """Count steps."""
        self.done += steps
        self.kept += steps if kept else 0
        now = time.monotonic()
        if not kept and self._began is None:
            self._began = now
        if self._began is not None and now - self._began < self.burst_s:
            self._first, self._since = self.done - self.kept, now

    def left(self) -> float | None:
        """Return the seconds left, or None until there are steps after the first ones."""
        timed = self.done - self.kept - self._first
        if self.done >= self.total:  # GEPA ends its last round beyond its limit
            return 0.0
        if not timed:
            return None
        return (time.monotonic() - self._since) / timed * (self.total - self.done)


class PrintTask(LogTask):
    """Progress as a line on stderr every ten seconds, the first one after two."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.unit, self.pace = title, unit, Pace(total)
        self.began = time.monotonic()
        self.due = self.began + _SLOW_S

    def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
        """Count the steps, and print a line if one is due or these are the last."""
        self.pace.advance(steps, kept=kept)
        now = time.monotonic()
        if now < self.due and not (self.pace.done == self.pace.total and now - self.began > _SLOW_S):
            return
        self.due, left = now + _EVERY_S, self.pace.left()
        parts = [f"{self.title}: {self.pace.done:,} of {self.pace.total:,} {self.unit}", note]
        parts.append(f"{duration(left)} left" if left else "")
        _print(", ".join(filter(None, parts)))


class PrintReporter(LogReporter):
    """The default reporter in Python, unless the program configures logging: lines on stderr."""

    def say(self, message: str) -> None:
        _print(message)

    def warn(self, message: str) -> None:
        _print(f"Warning: {message}")

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        yield PrintTask(title, total, unit)


def _print(line: str) -> None:
    sys.stderr.write(f"{visible(line)}\n")
    sys.stderr.flush()


class WithoutBars:
    """A reporter of the steps inside a larger task: it passes messages on and shows no displays."""

    def __init__(self, reporter: Reporter) -> None:
        self.say, self.warn = reporter.say, reporter.warn

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        log.debug("%s: %d %s", title, total, unit)
        yield LogTask()


def duration(seconds: float) -> str:
    """Return a duration in words, at least a second: ``40 seconds``, ``7 minutes``, ``3.5 hours``."""
    if seconds < 90:
        return count_of(max(1, round(seconds)), "second")
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


_MOST_POINTS = 200


def downsample(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `_MOST_POINTS` points: means of neighbours if there are more."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if points else []
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups]
