"""The time left that a log shows: nothing before it can be known, and the speed without the first batch."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from tunewright.cli import live


def _lines(monkeypatch: pytest.MonkeyPatch, total: int, advances: Sequence[tuple[float, int]]) -> list[str]:
    """Return what a log shows of a task that begins at 0 s and advances at these times by these steps."""
    now = [0.0]
    monkeypatch.setattr("tunewright.cli.live.time.monotonic", lambda: now[0])
    written = io.StringIO()
    task = live.LineTask(Console(file=written, width=120), "Scoring", total, "rows")
    for at, steps in advances:
        now[0] = at
        task.advance(steps)
    return written.getvalue().splitlines()


def test_line_task_gives_no_time_left_when_only_the_first_batch_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _lines(monkeypatch, 877, [(60, 23)]) == ["Scoring: 23/877 rows"]
    assert _lines(monkeypatch, 877, [(10, 1), *[(10.01, 1)] * 22, (25, 0)]) == ["Scoring: 23/877 rows"]


def test_line_task_leaves_the_first_batch_out_of_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _lines(monkeypatch, 120, [(60, 20), (70, 10), (80, 10), (85, 80)])
    assert lines == ["Scoring: 20/120 rows", "Scoring: 40/120 rows, 80 s left", "Scoring: 120/120 rows, 0 s left"]


def test_line_task_leaves_resumed_steps_out_of_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _lines(monkeypatch, 150, [(0, 100), (10, 10), (20, 10)]) == ["Scoring: 120/150 rows, 30 s left"]


def test_line_task_prints_its_last_line_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _lines(monkeypatch, 4, [(10, 4), (11, 0)])
    assert lines == ["Scoring: 4/4 rows, 0 s left"]
