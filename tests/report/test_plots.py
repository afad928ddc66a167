"""Figures: marks stand where the numbers are."""

import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from making.signals import break_even
from tunewright.render.blocks import Bar, Figure
from tunewright.render.plots import forest_plot, lines_plot
from tunewright.report import training
from tunewright.report.training import break_even_lines


def _ends(svg: str, colour: str) -> list[tuple[float, float]]:
    """First and last x of every horizontal line drawn in ``colour``."""
    paths = re.findall(rf'd="M ([\d.]+) [\d.]+ ?\s*L ([\d.]+) [\d.]+ ?\s*" [^>]*stroke="{re.escape(colour)}"', svg)
    return [(float(a), float(b)) for a, b in paths]


def test_intervals_are_drawn_to_scale() -> None:
    bars = (Bar("a", 50, 0, 100, "50", "tuned"), Bar("b", 30, 25, 50, "30", "plain"))
    svg = forest_plot(Figure("f", "title", bars, "%", limits=(0, 100)))
    (whole,) = _ends(svg, "var(--tuned)")
    (part,) = _ends(svg, "var(--plain)")
    width = whole[1] - whole[0]
    assert (part[0] - whole[0]) / width == pytest.approx(0.25, abs=1e-4)
    assert (part[1] - whole[0]) / width == pytest.approx(0.5, abs=1e-4)


def test_plot_labels_are_text_elements() -> None:
    bars = (Bar("$x^2$ <b>", 1, 0, 2, "1.0", "tuned"),)
    svg = forest_plot(Figure("f", "a <title> & more", bars, "points", margin=2.5))
    texts = [
        "".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"$x^2$ <b>", "1.0", "points", "margin +2.5"} <= set(texts)
    assert ElementTree.fromstring(svg)[0].text == "a <title> & more"


RUN = [
    {"step": 10, "loss": 9.0, "pair_loss": 2.0, "replay_kl": 16.0},
    {"step": 10, "epoch": 1, "eval_loss": 1.5, "eval_metric": 0.5},
    {"step": 20, "loss": 9.0, "pair_loss": 1.0, "replay_kl": 17.0},
    {"step": 20, "epoch": 2, "eval_loss": 3.0, "eval_metric": 1.0},
    {"step": 30, "loss": 9.0, "pair_loss": 0.5, "replay_kl": 17.5},
    {"step": 30, "epoch": 3, "eval_loss": 1.0, "eval_metric": 0.5},
]


def _lines(svg: str, colour: str, points: int = 3) -> list[list[tuple[float, float]]]:
    """Return the corners of every line of this many corners in ``colour``, in order; a legend's are level."""
    paths = re.findall(rf'd="(M [^"z]*)" [^>]*stroke="{re.escape(colour)}"', svg)
    lines = [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)] for path in paths]
    return [line for line in lines if len(line) == points and len({y for _, y in line}) > 1]


def test_training_plot_shows_losses_dev_score_and_kept_step() -> None:
    svg = lines_plot(training.run_lines(RUN, "exact_match"))
    (train,) = _lines(svg, "var(--plain)")
    losses, scores = _lines(svg, "var(--tuned)")
    kept = _lines(svg, "currentColor", points=2)
    assert [x for x, _ in train] == [x for x, _ in losses] == [x for x, _ in scores]
    # Heights on one axis: 2.0, 1.0, 0.5 of the pairs, and 1.5, 3.0, 1.0 on dev.
    (_, a), (_, b), (_, c) = train
    (_, d), (_, e), (_, f) = losses
    assert [d - a, e - a, f - b] == pytest.approx([(b - a) * 0.5, (a - b), 0], abs=1e-3)
    assert (c - b) == pytest.approx((b - a) / 2, abs=1e-3)
    assert scores[0][1] == scores[2][1] > scores[1][1]
    assert min(y for _, y in scores) > max(y for _, y in losses), "below the losses"
    assert len(kept) == 2, "through both panels"
    assert {x for line in kept for x, _ in line} == {scores[1][0]}
    assert "dev score, %" in svg
    assert ">kept<" in svg


def test_training_plot_without_dev_scores_shows_only_losses() -> None:
    run = [{key: value for key, value in row.items() if key != "eval_metric"} for row in RUN]
    svg = lines_plot(training.run_lines(run, "exact_match"))
    (losses,) = _lines(svg, "var(--tuned)")
    (kept,) = _lines(svg, "currentColor", points=2)
    assert kept[0][0] == kept[1][0] == losses[2][0]
    assert "dev score" not in svg


def test_plot_does_not_change_the_global_style() -> None:
    before = dict(mpl.rcParams)
    lines_plot(training.run_lines(RUN, "bleu"))
    assert dict(mpl.rcParams) == before


def test_break_even_lines_cross_at_the_break_even() -> None:
    even = break_even((45_000, 50_000, 56_000))
    svg = lines_plot(break_even_lines(even)[0])
    (prompting,) = _lines(svg, "var(--prompting)", points=2)
    (tuned,) = _lines(svg, "var(--tuned)", points=2)
    (mark,) = _upright(svg)

    def at(line: list[tuple[float, float]], x: float) -> float:
        (x0, y0), (x1, y1) = line
        return y0 + (x - x0) / (x1 - x0) * (y1 - y0)

    assert at(prompting, mark) == pytest.approx(at(tuned, mark), abs=0.01)
    assert (mark - prompting[0][0]) / (prompting[1][0] - prompting[0][0]) == pytest.approx(0.5, abs=1e-4)
    assert ">50,000<" in svg
    # 100 against 50 + 50 at the end: heights from the axis, where y grows downwards.
    base = prompting[0][1]
    assert (base - tuned[0][1]) / (base - prompting[1][1]) == pytest.approx(50 / 200, abs=1e-3)


def _upright(svg: str) -> list[float]:
    """Return the positions of dashed vertical lines."""
    dashed = re.findall(r'd="M ([\d.]+) [\d.]+ ?\s*L ([\d.]+) [\d.]+ ?\s*" [^>]*stroke-dasharray', svg)
    return [float(a) for a, b in dashed if a == b]
