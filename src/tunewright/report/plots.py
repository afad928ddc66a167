"""Drawings of a training run, of a learning curve and of a break-even."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tunewright.advisor.signals import BreakEven
from tunewright.config import MetricName
from tunewright.evidence.learning_curve import Curve
from tunewright.metrics import axis_label
from tunewright.render.plots import (
    FILE_COLOURS,
    FOOT,
    INK,
    LINE,
    PAGE_COLOURS,
    PLAIN,
    PROMPTING,
    STYLE,
    TUNED,
    WIDTH,
    inline,
)
from tunewright.training.checkpoint_selection import best_evaluation, evaluations, pairs_loss

_LOSS_HEIGHT, _METRIC_HEIGHT, _TOP = 230.0, 120.0, 18.0  # heights of a run's panels and of the space above them


def training_plot(name: str, title: str, history: Sequence[dict[str, Any]], metric: MetricName) -> str:
    """Plot a run by step: train and dev loss, the dev metric below, and the selected step.

    Args:
        name: prefix of the SVG's ids, unique on the page.
        title: the accessible title, read by screen readers.
        history: the run's rows: ``step`` with ``loss`` (and ``pair_loss``, which is then drawn instead) or with
            ``epoch``, ``eval_loss`` and, if dev rows were answered, ``eval_metric``.
        metric: the metric in ``eval_metric``.

    Returns:
        An ``<svg>`` element.
    """
    train = [(row["step"], loss) for row in history if (loss := pairs_loss(row)) is not None]
    evaluated = evaluations(history)
    dev = [(e.step, e.dev_loss) for e in evaluated]
    scores = [(e.step, 100 * e.dev_metric) for e in evaluated if e.dev_metric is not None]
    height = _LOSS_HEIGHT + (_METRIC_HEIGHT if scores else 0)
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        low = (height - _LOSS_HEIGHT + FOOT) / height
        axes = figure.add_axes((0.11, low, 0.87, 1 - low - _TOP / height))
        axes.set_ylabel("loss (nats per token)")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if train:
            axes.plot(*zip(*train, strict=True), color=PLAIN, linewidth=1.5, label="train")
        if dev:
            axes.plot(*zip(*dev, strict=True), color=TUNED, linewidth=2, marker="o", markersize=6, label="dev")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper center", labelcolor=INK)
        panels = [axes]
        if scores:
            below = figure.add_axes((0.11, FOOT / height, 0.87, (_METRIC_HEIGHT - FOOT) / height), sharex=axes)
            below.set_ylabel("dev score, %" if axis_label(metric).endswith("%") else "dev score")
            below.yaxis.set_major_locator(MaxNLocator(4))
            below.plot(*zip(*scores, strict=True), color=TUNED, linewidth=2, marker="o", markersize=6, clip_on=False)
            below.set_ylim(0, 1.08 * max(score for _, score in scores) or 1)
            panels.append(below)
        for panel in panels:
            panel.grid(axis="y", linewidth=0.7)
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panels[-1].set_xlabel("optimizer step")
        if evaluated:
            _mark_kept(panels, best_evaluation(evaluated).step)
        return inline(figure, name, title)


def _mark_kept(panels: Sequence[Axes], step: int) -> None:
    """Draw a line through all panels at the step of the selected adapter, labelled above the first panel."""
    for panel in panels:
        panel.axvline(step, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    panels[0].text(step, 1.02, "kept", ha="center", va="bottom", fontsize=11, transform=panels[0].get_xaxis_transform())


def curve_plot(curve: Curve) -> str:
    """Return a learning curve as a standalone SVG file."""
    return curve_figure(f"curve-{curve.id}", curve, FILE_COLOURS) + "\n"


def curve_figure(name: str, curve: Curve, colours: Mapping[str, str] = PAGE_COLOURS) -> str:
    """Plot a learning curve as an ``<svg>`` element: dev scores and their mean over seeds, by training rows."""
    title = f"Score on {curve.items} dev items by training rows"
    means = [
        (fmean(p.rows for p in curve.points if p.share == share), 100 * curve.mean(share)) for share in curve.shares
    ]
    with mpl.rc_context(STYLE | {"svg.hashsalt": curve.id}):
        figure = Figure(figsize=(WIDTH / 72, 260 / 72))
        axes = figure.add_axes((0.12, 0.19, 0.85, 0.74))
        axes.set_xscale("log", base=2)
        axes.set_xlabel("training rows")
        axes.set_ylabel(axis_label(curve.metric))
        axes.grid(axis="y", linewidth=0.7)
        axes.plot(*zip(*means, strict=True), color=TUNED, linewidth=2, label=f"mean of {len(curve.seeds)} seeds")
        rows, scores = [p.rows for p in curve.points], [100 * p.score for p in curve.points]
        axes.plot(rows, scores, color=PLAIN, linestyle="", marker="o", markersize=5, label="one training")
        axes.set_xticks([rows for rows, _ in means], [f"{rows:,.0f}" for rows, _ in means])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.legend(loc="best", labelcolor=INK)
        return inline(figure, name, title, colours)


def break_even_figure(name: str, even: BreakEven) -> str:
    """Plot the total cost by number of calls, prompted and tuned, with the break-even point, as an ``<svg>`` element.

    Args:
        name: prefix of the SVG's ids, unique on the page.
        even: a break-even with a finite number of calls.
    """
    assert even.calls is not None and even.calls_low is not None
    money = even.unit == "money"
    title = f"Costs of {even.prompting.arm} and of training by the number of calls"
    end = 2 * even.calls
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH / 72, 250 / 72))
        axes = figure.add_axes((0.14, 0.2, 0.76, 0.7))
        axes.set_xlabel("calls")
        axes.set_ylabel("cost" if money else "machine time, hours")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda calls, _: f"{calls:,.0f}")
        axes.grid(axis="y", linewidth=0.7)
        axes.axvspan(even.calls_low, min(even.calls_high or end, end), color=LINE, alpha=0.5, linewidth=0)
        axes.plot([0, end], [0, end * even.prompting.cost], PROMPTING, linewidth=2, label=even.prompting.arm)
        tuned = [even.once.total, even.once.total + end * even.tuned.cost]
        axes.plot([0, end], tuned, TUNED, linewidth=2, label="training, then tuned")
        axes.axvline(even.calls, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        above = axes.get_xaxis_transform()
        axes.text(even.calls, 1.02, f"{even.calls:,.0f}", ha="center", va="bottom", fontsize=11, transform=above)
        axes.set_xlim(0, end)
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right", labelcolor=INK)  # both lines end in the upper half
        return inline(figure, name, title)
