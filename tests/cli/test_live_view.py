"""The live view of a pipeline: stages, the current task, the time left; and lines where it cannot be drawn."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from command_line import tiny_project, tunewright
from terminal import Terminal
from tunewright.cli.live import ConsoleReporter, _BarTask, _Screen

STAGES = {"data": 1.0, "train": 2.0, "evaluate": 3.0}


def _plain(text: str) -> str:
    """Return text as it stands on a terminal, without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def _terminal(**environment: str) -> Console:
    file = io.StringIO()
    return Console(file=file, width=100, height=40, force_terminal=True, _environ={"TERM": "xterm"} | environment)


def _written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the view sees, in seconds."""
    clock = [1000.0]
    monkeypatch.setattr("tunewright.cli.live.time.monotonic", lambda: clock[0])
    return clock


def test_pipeline_view_lists_finished_current_and_coming_stages() -> None:
    paper, reporter = _terminal(), ConsoleReporter(_terminal())
    with reporter.pipeline(STAGES) as done:
        assert done is not None
        done("data", False, "version 4f1c02a9")
        with reporter.task("Training legal", 4, "steps") as task:
            task.advance(1, "loss 3.250")
            assert reporter._screen is not None
            paper.print(reporter._screen)
    shown = _plain(_written(paper))
    lines = [re.sub(r" {2,}", "  ", line.strip()) for line in shown.splitlines()]
    assert lines[0] == "=  data  unchanged  version 4f1c02a9"
    assert re.fullmatch(r"●  train  \d s  Training legal", lines[1])
    assert lines[2] == "·  evaluate"
    assert "Training legal" in lines[4] and "1/4" in lines[4] and "loss 3.250" in lines[4]


def test_pipeline_view_keeps_notes_and_warnings_above_it() -> None:
    console = _terminal()
    reporter = ConsoleReporter(console)
    with reporter.pipeline(STAGES) as done:
        assert done is not None
        done("data", True, "version 4f1c02a9")
        reporter.say("Noted in passing")
        reporter.warn("and something odd")
        done("train", True, "legal")
        done("evaluate", True, "evidence 1")
    shown = _plain(_written(console))
    assert shown.count("Noted in passing") == shown.count("Warning: and something odd") == 1
    assert shown.rindex("Warning: and something odd") < shown.rindex("✓  data")
    assert all(re.search(rf"✓  {stage} ", shown) for stage in STAGES)


def test_time_left_follows_the_stages_so_far_and_the_part_of_the_current_one(now: list[float]) -> None:
    screen = _Screen(_terminal(), STAGES)
    assert screen.seconds_left() is None
    now[0] += 60
    screen.done("data", True, "")
    task = _BarTask(screen, "Training", 10)
    now[0] += 60
    task.advance(5)  # 120 s for weights of 1 and half of 2, so 60 s for one
    assert screen.seconds_left() == pytest.approx(1 * 60 + 3 * 60)


def test_time_left_ignores_reused_stages(now: list[float]) -> None:
    screen = _Screen(_terminal(), STAGES)
    now[0] += 1
    screen.done("data", False, "")
    task = _BarTask(screen, "Training", 10)
    now[0] += 100
    task.advance(5)
    assert screen.seconds_left() == pytest.approx(100 + 3 * 100)
    screen.bars.remove_task(task.task_id)
    screen.done("train", True, "")
    now[0] += 1
    assert screen.seconds_left() == pytest.approx(3 * 101 / 2, rel=0.02)
    screen.done("evaluate", True, "")
    assert screen.seconds_left() is None


@pytest.mark.parametrize(
    "reporter",
    [
        ConsoleReporter(Console(file=io.StringIO(), width=100)),
        ConsoleReporter(_terminal(TERM="dumb")),
        ConsoleReporter(_terminal(), live=False),
    ],
    ids=["log", "dumb terminal", "with --json"],
)
def test_progress_is_lines_without_a_terminal_that_can_redraw(
    reporter: ConsoleReporter, monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    with reporter.pipeline(STAGES) as done:
        assert done is None
        with reporter.task("Training", 4, "steps") as task:
            now[0] += 20
            task.advance(2)
    assert _plain(_written(reporter.console)) == "Training: 2/4 steps\n"


def test_view_has_no_colours_when_disabled() -> None:
    console = _terminal(NO_COLOR="1")
    with ConsoleReporter(console).pipeline(STAGES) as done:
        assert done is not None
        done("data", True, "version 4f1c02a9")
    assert "✓  data" in _plain(_written(console))
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", _written(console))


@pytest.mark.slow
def test_run_shows_one_view_on_a_terminal_and_lines_with_json(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    first = Terminal("run", "-p", folder)
    first.wait_for("not reviewed", seconds=240)  # the last line of all
    assert first.code() in {0, 3, 4}
    shown = _plain(first.screen)
    for stage in ("data", "advise", "train", "evaluate", "report"):
        assert re.search(rf"● +{stage} ", shown), stage
        assert re.search(rf"✓ +{stage} ", shown), stage
    assert re.search(r"● +advise +\d+ s +\w", shown)
    assert "data: done" not in shown

    again = Terminal("run", "-p", folder, "--json")
    again.wait_for("not reviewed", seconds=120)
    assert again.code() in {0, 3, 4}
    assert "train: unchanged" in again.screen
    assert "●" not in again.screen and "\x1b[1A" not in again.screen

    piped = tunewright("run", "-p", folder)
    assert "evaluate: unchanged" in piped.stderr
