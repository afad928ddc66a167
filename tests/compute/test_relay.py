"""Reports of a process on another machine, as the command shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tunewright.compute.relay import Display, Inbox, RelayReporter
from tunewright.core.progress import LogReporter, Task


class _Screen(LogReporter):
    """Keeps every report, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(f"Warning: {message}")

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        self.lines.append(f"{title}: {total} {unit}")
        yield _Bar(self.lines)
        self.lines.append(f"{title} closed")


class _Bar:
    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
        self.lines.append(f"+{steps} {note}")

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        self.lines.append(f"step {step}: {dict(numbers)}")


def test_reports_arrive_in_their_order() -> None:
    inbox, screen = Inbox(), _Screen()
    reporter = RelayReporter(inbox.put)
    with reporter.task("Training", 9, "steps") as task:
        reporter.say("Loading")
        task.advance(1, "loss 2.0")
        with reporter.task("answering", 3, "rows") as inner:
            inner.advance(3)
        task.measured(1, {"loss": 2.0})
        reporter.warn("It is slow.")
    display = Display(screen, "again")
    display.show(inbox.take())
    assert screen.lines == [
        "Training: 9 steps",
        "Loading",
        "+1 loss 2.0",
        "answering: 3 rows",
        "+3 ",
        "answering closed",
        "step 1: {'loss': 2.0}",
        "Warning: It is slow.",
        "Training closed",
    ]
    assert inbox.take() == []


def test_process_that_begins_again_closes_what_the_lost_one_left_open() -> None:
    inbox, screen = Inbox(), _Screen()
    display = Display(screen, "The cluster lost a process.")
    left_open = RelayReporter(inbox.put).task("Training", 9, "steps")
    left_open.__enter__()
    assert not inbox.stop_asked()
    display.show(inbox.take())
    assert display.stoppable
    inbox.stop()
    assert inbox.stop_asked()
    RelayReporter(inbox.put)
    display.show(inbox.take())
    assert screen.lines == ["Training: 9 steps", "Training closed", "Warning: The cluster lost a process."]
    assert not display.stoppable
