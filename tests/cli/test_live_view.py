"""Progress on stderr: the live view of a pipeline, its curves, and lines where neither can be drawn."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from making.command_line import tiny_project, tunewright
from making.terminal import Terminal
from tunewright.cli import live
from tunewright.cli.live import ConsoleReporter, Curves, _BarTask, _Screen, bars
from tunewright.core.progress import downsample
from tunewright.evaluation.time_limit import AnswerRate

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


def test_part_of_a_stage_counts_the_answers_of_all_arms() -> None:
    reporter = ConsoleReporter(_terminal())
    rate = AnswerRate(reporter)
    with reporter.pipeline(STAGES), rate.together(40):
        rate.advance(5, kept=True)
        with rate.arm("zero-shot on dev", 5) as advance:
            for _ in range(5):
                advance()
            assert reporter._screen is not None
            assert (reporter._screen.bars.tasks[0].completed, reporter._screen.bars.tasks[0].total) == (10, 40)


def test_time_left_counts_only_the_work_of_this_process(now: list[float]) -> None:
    screen = _Screen(_terminal(), STAGES)
    now[0] += 1
    screen.done("data", False, "")
    task = _BarTask(screen, "Training", 100)
    task.advance(50, kept=True)  # which leaves a weight of 1
    now[0] += 100
    task.advance(25)
    assert screen.seconds_left() == pytest.approx(100 + 3 * 200, rel=0.02)
    now[0] += 40
    task.advance(10)  # 4 s each since the first batch
    assert screen.seconds_left() == pytest.approx(15 * 4 + 3 * 200, rel=0.02)
    screen.bars.remove_task(task.task_id)
    screen.done("train", True, "")
    now[0] += 60
    assert screen.seconds_left() == pytest.approx(3 * 200, rel=0.02)


def test_bars_show_one_time_left_that_kept_answers_do_not_shorten(now: list[float]) -> None:
    paper, reporter = _terminal(), ConsoleReporter(_terminal())
    with reporter.task("All answers", 100, "answers") as whole, reporter.task("zero-shot", 10, "answers") as arm:
        for _ in range(3):
            now[0] += 10
            whole.advance(10, kept=True)
            arm.advance()
            whole.advance()
        assert reporter._screen is not None
        paper.print(reporter._screen)
    assert re.findall(r"\S+ \S+ \S+ left", _plain(_written(paper))) == ["about 11 min left"]  # 67 answers, 10 s each


def test_loading_is_shown_from_the_start_until_the_first_display() -> None:
    console = _terminal()
    reporter = ConsoleReporter(console)
    reporter.begin_loading()
    with reporter.pipeline(STAGES):
        shown = _plain(_written(console))
        assert reporter._screen is not None and "loading" in _drawn_text(reporter._screen)
    reporter.end_loading()
    assert "Loading torch and the base" in shown
    piped = ConsoleReporter(Console(file=io.StringIO(), width=100))
    piped.begin_loading()
    piped.end_loading()
    assert _written(piped.console) == ""


@pytest.mark.parametrize("command", ["evaluate", "serve", "export merge", "optimize-prompt"])
def test_command_that_loads_the_base_says_so_first(command: str, tmp_path: Path) -> None:
    terminal = Terminal(*command.split(), "-p", tmp_path)
    terminal.wait_for("Loading torch and the base")
    terminal.wait_for("tunewright.yaml")  # the folder has no project
    assert terminal.code() == 2


def _drawn_text(screen: _Screen) -> str:
    paper = _terminal()
    paper.print(screen)
    return _plain(_written(paper))


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


# Lines of a log


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


# Curves


def _drawn(curves: Curves, height: int = 40, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(curves)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _line(text: str) -> int:
    """Return the number of drawn characters in the plot's middle line, the half of the highest loss."""
    return max(sum("⠁" <= character <= "⣿" for character in line) for line in text.splitlines()[4:10])


def test_curves_draw_nothing_before_the_first_point_or_on_a_low_terminal() -> None:
    curves = Curves(10)
    assert _drawn(curves) == ""
    curves.add(1, {"loss": 2.0})
    assert _drawn(curves, height=23) == ""
    assert "Losses by step" in _drawn(curves)


def test_curves_label_each_curve_with_its_latest_value() -> None:
    curves = Curves(10)
    curves.add(1, {"loss": 2.0})
    curves.add(2, {"loss": 1.25})
    assert "train loss 1.250" in _drawn(curves)
    assert "dev loss" not in _drawn(curves)
    curves.add(2, {"eval_loss": 1.5, "exact_match": 0.25})
    curves.add(3, {"loss": 1.0, "pair_loss": 1.75, "replay_kl": 0.125})
    text = _drawn(curves)
    for message in ("train loss 1.000", "dev loss 1.500", "of the pairs 1.750", "replay KL 0.125"):
        assert message in text


def test_curves_show_the_metric_as_bars_with_latest_and_best() -> None:
    curves = Curves(10)
    for step, share in ((2, 0.25), (4, 1.0), (6, 0.5)):
        curves.add(step, {"eval_loss": 1.0, "exact_match": share})
    assert f"{bars([0.25, 1.0, 0.5])} 50.0% exact match on dev (best 100.0%)" in _drawn(curves)
    bleu = Curves(10)
    bleu.add(2, {"eval_loss": 1.0, "bleu": 0.305})
    assert f"{bars([0.305])} BLEU 30.5 on dev (best BLEU 30.5)" in _drawn(bleu)


def test_curves_scale_to_the_whole_run() -> None:
    """A tenth of the run fills a tenth of the width."""
    early, late = Curves(100), Curves(100)
    for step in range(1, 101):
        late.add(step, {"loss": 2.0 if step == 1 else 1.0})
        if step <= 10:
            early.add(step, {"loss": 2.0 if step == 1 else 1.0})
    few, all_of_them = (_line(_drawn(curves)) for curves in (early, late))
    assert 0.05 < few / all_of_them < 0.15


def test_curves_draw_a_loss_of_zero() -> None:
    curves = Curves(2)
    curves.add(1, {"loss": 0.0})
    assert "train loss 0.000" in _drawn(curves)


def test_curves_fit_the_terminal_width() -> None:
    curves = Curves(1_000_000)
    for step in range(1, 1001):
        curves.add(step * 1000, {"loss": 1e6 / step})
    assert max(map(len, _drawn(curves, width=60).splitlines())) <= 60


def test_curves_are_not_redrawn_without_new_points() -> None:
    """The terminal is refreshed four times a second, and a step may take minutes."""
    curves = Curves(10)
    curves.add(1, {"loss": 1.0})
    console = Console(file=io.StringIO(), width=100, height=40)
    (first,) = curves.__rich_console__(console, console.options)
    (again,) = curves.__rich_console__(console, console.options)
    assert again is first
    curves.add(2, {"loss": 0.5})
    (changed,) = curves.__rich_console__(console, console.options)
    assert changed is not first


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 100)), min_size=1, max_size=1500))
def test_curves_average_many_points_into_few(points: list[tuple[int, float]]) -> None:
    shown = downsample(points)
    assert len(shown) <= 200
    size = -(-len(points) // 200)
    sizes = [min(size, len(points) - start) for start in range(0, len(points), size)]
    total = sum(count * value for count, (_, value) in zip(sizes, shown, strict=True))
    assert total / len(points) == pytest.approx(fmean(value for _, value in points), abs=1e-6)
    if len(points) <= 200:
        assert shown == points
