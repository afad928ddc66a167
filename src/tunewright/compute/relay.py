"""Messages of processes on other machines to the command that started them, and its request to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tunewright.core.progress import LogReporter, Reporter, Task

_SEND_S = 0.25
"""Time between two messages to the command, so that a process with fast steps sends few large ones."""

Event = tuple[str, tuple[Any, ...]]
"""A kind of message, and its values."""


class KeptMessages(LogReporter):
    """A reporter whose messages another process reports, once it has them with a result."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bool]] = []

    def say(self, message: str) -> None:
        """Keep the message."""
        self.messages.append((message, False))

    def warn(self, message: str) -> None:
        """Keep the warning."""
        self.messages.append((message, True))

    def report_to(self, reporter: Reporter) -> None:
        """Report all of them."""
        for message, is_warning in self.messages:
            (reporter.warn if is_warning else reporter.say)(message)


class Inbox:
    """Messages that the command has not yet taken. One process keeps it; all others call it over the network."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = False

    def put(self, events: Sequence[Event]) -> bool:
        """Add messages; return whether the command was asked to stop."""
        self._events += events
        return self._stopping

    def take(self) -> list[Event]:
        """Return the messages since the last call."""
        taken, self._events = self._events, []
        return taken

    def stop(self) -> None:
        """Ask the processes to stop."""
        self._stopping = True


class RelayReporter:
    """The reporter of a process on another machine: what it reports, the command reports.

    ``send`` sends messages to the inbox, and returns its answer.
    """

    def __init__(self, send: Callable[[Sequence[Event]], bool]) -> None:
        self._send = send
        self._events: list[Event] = [("begin", ())]
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._tasks = 0
        self._stopping = self._listens = False

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send messages while the block runs, and the last ones at its end."""
        sender = threading.Thread(target=self._send_often, name="tunewright-relay", daemon=True)
        sender.start()
        try:
            yield
        finally:
            self._ended.set()
            sender.join()
            self._send_now()

    def stop_asked(self) -> bool:
        """Return whether the command was asked to stop. The first call says that this process can stop at a step."""
        if not self._listens:
            self._listens = True
            self._add("stoppable")
        return self._stopping

    def say(self, message: str) -> None:
        """Send the message."""
        self._add("say", message)

    def warn(self, message: str) -> None:
        """Send the warning."""
        self._add("warn", message)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        """Open the display of the command."""
        self._tasks += 1
        number = self._tasks
        self._add("open", number, title, total, unit)
        try:
            yield _RelayTask(lambda kind, *values: self._add(kind, number, *values))
        finally:
            self._add("close", number)

    def _add(self, kind: str, *values: Any) -> None:
        with self._lock:
            self._events.append((kind, values))

    def _send_often(self) -> None:
        while not self._ended.wait(_SEND_S):
            self._send_now()

    def _send_now(self) -> None:
        with self._lock:
            events, self._events = self._events, []
        self._stopping = self._send(events)


class _RelayTask:
    def __init__(self, add: Callable[..., None]) -> None:
        self._add = add

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._add("advance", steps, note)

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        self._add("measured", step, dict(numbers))


class Display:
    """The command's side: reports what a process elsewhere reported.

    ``resumes`` is the warning when a process begins again, after the cluster lost one.
    """

    def __init__(self, reporter: Reporter, resumes: str) -> None:
        self._reporter = reporter
        self._resumes = resumes
        self._open: dict[int, tuple[AbstractContextManager[Task], Task]] = {}
        self._begun = False
        self.stoppable = False
        """True once the process stops at a step by itself when it is asked to."""

    def show(self, events: Sequence[Event]) -> None:
        """Report messages in their order."""
        for event in events:
            match event:
                case "say", (message,):
                    self._reporter.say(message)
                case "warn", (message,):
                    self._reporter.warn(message)
                case "open", (number, title, total, unit):
                    context = self._reporter.task(title, total, unit)
                    self._open[number] = context, context.__enter__()
                case "advance", (number, steps, note):
                    self._open[number][1].advance(steps, note)
                case "measured", (number, step, numbers):
                    self._open[number][1].measured(step, numbers)
                case "close", (number,):
                    self._close(number)
                case "stoppable", ():
                    self.stoppable = True
                case "begin", ():
                    self.close()
                    if self._begun:
                        self._reporter.warn(self._resumes)
                    self._begun, self.stoppable = True, False

    def close(self) -> None:
        """Close what a lost process left open."""
        for number in sorted(self._open, reverse=True):
            self._close(number)

    def _close(self, number: int) -> None:
        context, _ = self._open.pop(number)
        context.__exit__(None, None, None)
