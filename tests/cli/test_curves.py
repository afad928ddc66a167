"""The live curves: what stands in the terminal after each point."""

from __future__ import annotations

import io
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tunewright.cli.live import ConsoleReporter, Curves, bars
from tunewright.core.progress import downsample


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


def test_points_of_a_task_are_drawn_above_its_bar() -> None:
    console = Console(file=io.StringIO(), width=100, height=40, force_terminal=True, color_system=None)
    with ConsoleReporter(console).task("Training it", 4, "steps") as task:
        task.measured(1, {"loss": 3.25})
        task.advance(1, "loss 3.250")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert shown.rindex("train loss 3.250") < shown.rindex("Training it")


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


@given(st.lists(st.floats(0, 1), max_size=60))
def test_bars_are_the_latest_shares_and_higher_for_more(shares: list[float]) -> None:
    drawn = bars(shares)
    assert len(drawn) == min(len(shares), 24)
    heights = ["▁▂▃▄▅▆▇█".index(bar) for bar in drawn]
    for height, share in zip(heights, shares[-24:], strict=True):
        assert height <= 8 * share <= height + 1
