"""Progress without a terminal: what is slow is said, and Python prints on stderr."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest

from making.command_line import tiny_project
from tunewright.core import progress
from tunewright.core.progress import LogReporter, PrintTask, slow


class _Said(LogReporter):
    def __init__(self) -> None:
        self.event = Event()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)
        self.event.set()


def test_slow_work_is_reported_while_it_lasts_and_quick_work_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    said = _Said()
    with slow(said, "Encoding the rows"):
        pass
    monkeypatch.setattr(progress, "_SLOW_S", 0.001)
    with slow(said, "Loading"):
        assert said.event.wait(60)
    assert said.lines == ["Loading"]


def test_print_task_prints_a_line_every_ten_seconds_and_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: seconds[0])
    task = PrintTask("Training tiny", 8, "steps")
    for seconds[0] in (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.5, 14.0):
        task.advance(note="loss 2.1")
    assert capsys.readouterr().err.splitlines() == [
        "Training tiny: 2 of 8 steps, loss 2.1, 12 seconds left",
        "Training tiny: 7 of 8 steps, loss 2.1, 2 seconds left",
        "Training tiny: 8 of 8 steps, loss 2.1",
    ]


PROGRAM = """
import logging, sys, tunewright
tunewright.open(sys.argv[1]).data.add([sys.argv[1] + "/pairs.jsonl"])
print("silent from here", file=sys.stderr)
logging.getLogger("tunewright").addHandler(logging.NullHandler())
tunewright.open(sys.argv[1]).data.check_files([sys.argv[1] + "/pairs.jsonl"])
"""


def test_python_prints_messages_on_stderr_until_logging_is_configured(tmp_path: Path) -> None:
    folder = tiny_project(tmp_path / "project", tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM, folder], capture_output=True, text=True, check=True)
    said, after = done.stderr.split("silent from here\n")
    assert "Independent clusters: 96 train, 12 dev, 12 test." in said
    assert "Warning: 12 test clusters" in said
    assert (done.stdout, after) == ("", "")
