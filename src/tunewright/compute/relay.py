"""Messages of processes on other machines to the command that started them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tunewright.core.progress import LogReporter, Reporter, Task

Event = tuple[Any, ...]
"""A kind of message, and its values."""


class KeptMessages(LogReporter):
    """A reporter that keeps its messages; another process reports them when it receives them with a result."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bool]] = []

    def say(self, message: str) -> None:
        """Keep the message."""
        self.messages.append((message, False))

    def warn(self, message: str) -> None:
        """Keep the warning."""
        self.messages.append((message, True))

    def report_to(self, reporter: Reporter, prefix: str) -> None:
        """Report all kept messages."""
        for message, is_warning in self.messages:
            (reporter.warn if is_warning else reporter.say)(prefix + message)


class Inbox:
    """Messages that the command has not yet taken. One process keeps it; all others call it over the network."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = False

    def put(self, *event: Any) -> None:
        """Add a message."""
        self._events.append(event)

    def take(self) -> list[Event]:
        """Return the messages since the last call."""
        taken, self._events = self._events, []
        return taken

    def stop(self) -> None:
        """Ask the processes to stop."""
        self._stopping = True

    def stop_asked(self) -> bool:
        """Return whether the command was asked to stop. The first call shows that the process can stop at a step."""
        self._events.append(("stoppable",))
        return self._stopping


class RelayReporter:
    """The reporter of a process on another machine: ``put`` sends a message, which the command's `Display` reports."""

    def __init__(self, put: Callable[..., object]) -> None:
        self._put = put
        self._tasks = 0
        put("begin")

    def say(self, message: str) -> None:
        """Send the message."""
        self._put("say", message)

    def warn(self, message: str) -> None:
        """Send the warning."""
        self._put("warn", message)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        """Open the display of the command."""
        self._tasks += 1
        number = self._tasks
        self._put("open", number, title, total, unit)
        try:
            yield _RelayTask(self._put, number)
        finally:
            self._put("close", number)


class _RelayTask:
    def __init__(self, put: Callable[..., object], number: int) -> None:
        self._put, self._number = put, number

    def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
        self._put("advance", self._number, steps, note, kept)

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        self._put("measured", self._number, step, dict(numbers))


class Display:
    """The command's side: reports what a process elsewhere reported.

    ``resumes`` is the warning when a process begins again, after the cluster lost one.
    """

    def __init__(self, reporter: Reporter, resumes: str) -> None:
        self._reporter, self._resumes = reporter, resumes
        self._open: dict[int, tuple[ExitStack, Task]] = {}
        self._begun = False
        self.stoppable = False
        """True once the process stops at a step by itself when it is asked to."""

    def show(self, events: Sequence[Event]) -> None:
        """Report messages in their order."""
        for kind, *values in events:
            if kind in ("say", "warn"):
                getattr(self._reporter, kind)(*values)
            elif kind == "advance":
                number, steps, note, kept = values
                self._open[number][1].advance(steps, note, kept=kept)
            elif kind == "measured":
                self._open[values[0]][1].measured(*values[1:])
            elif kind == "open":
                bars = ExitStack()
                self._open[values[0]] = bars, bars.enter_context(self._reporter.task(*values[1:]))
            elif kind == "close":
                self._open.pop(values[0])[0].close()
            elif kind == "stoppable":
                self.stoppable = True
            else:
                self.close()
                if self._begun:
                    self._reporter.warn(self._resumes)
                self._begun, self.stoppable = True, False

    def close(self) -> None:
        """Close displays that a lost process left open."""
        for number in sorted(self._open, reverse=True):
            self._open.pop(number)[0].close()
