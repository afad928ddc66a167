"""Numbers of training as charts: lines of few points, which `charts.js` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunewright.config import MetricName
from tunewright.core.downsample import downsample
from tunewright.evaluation.training_runs import TrainingRun
from tunewright.evidence.learning_curve import Curve
from tunewright.metrics import axis_label
from tunewright.training.checkpoint_selection import DEV_LOSS, DEV_METRIC, PAIR_LOSS, REPLAY_KL, REPLAY_LOSS
from tunewright.training.sweep.ledger import Ledger

_LOSSES = {
    "loss": "training loss",
    DEV_LOSS: "dev loss",
    PAIR_LOSS: "loss of the pairs",
    REPLAY_KL: "replay KL",
    REPLAY_LOSS: "loss of replay",
}


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    label: str
    points: list[tuple[float, float]]
    key: str = ""
    """The key of new points in the metrics file; empty: the line does not grow."""
    dots: bool = False
    """Mark each point: there are few."""


@dataclass(frozen=True)
class Chart:
    """A chart with its heading and axes."""

    title: str
    lines: list[Line]
    below: str = "step"
    scale: float = 1.0
    """Factor of values that are added from the metrics file."""
    bounds: tuple[float, float] | None = None
    """Values that the axis may not go beyond; None: no limits."""

    def as_dict(self) -> dict[str, Any]:
        """Return the chart for the page's script."""
        return asdict(self)


_OF_100 = (0.0, 100.0)
"""Bounds of every metric's axis: shares, and scores of 100."""


def run_charts(history: Sequence[Mapping[str, Any]], metric: MetricName | None) -> list[Chart]:
    """Return the charts of a run; those without a point are there too while it may get some."""
    charts = [Chart("Loss", [_line(history, key, label) for key, label in _LOSSES.items()])]
    if metric is not None:
        charts.append(
            Chart(
                f"Dev: {axis_label(metric)}", [_line(history, DEV_METRIC, "dev score", 100)], scale=100, bounds=_OF_100
            )
        )
    for key, (title, scale) in _NUMBERS.items():
        charts.append(Chart(title, [_line(history, key, title, scale)], scale=scale))
    return charts


_GIB = 1 / 2**30
_NUMBERS = {
    "learning_rate": ("Learning rate", 1.0),
    "tokens_per_s": ("Tokens per second", 1.0),
    "memory_bytes": ("Memory, GiB", _GIB),
}


def comparison_charts(runs: Sequence[TrainingRun]) -> list[Chart]:
    """Return the losses of several runs, and their dev scores by each metric."""
    charts = [
        Chart("Training loss", [_line(run.history, "loss", run.name) for run in runs]),
        Chart("Dev loss", [_line(run.history, DEV_LOSS, run.name) for run in runs]),
    ]
    for metric in dict.fromkeys(run.metric for run in runs):
        if metric is not None:
            lines = [_line(run.history, DEV_METRIC, run.name, 100) for run in runs if run.metric == metric]
            charts.append(Chart(f"Dev: {axis_label(metric)}", lines, bounds=_OF_100))
    return charts


def curve_chart(curve: Curve) -> Chart:
    """Return a learning curve: the score by training rows, one line for each seed."""
    lines = [
        Line(
            f"seed {seed}",
            [(float(p.rows), 100 * p.score) for p in sorted(curve.points, key=lambda p: p.rows) if p.seed == seed],
            dots=True,
        )
        for seed in curve.seeds
    ]
    return Chart(f"Dev: {axis_label(curve.metric)}", lines, below="training rows", bounds=_OF_100)


def sweep_chart(ledger: Ledger) -> Chart:
    """Return the dev score of each trial at each rung, or the dev loss if no dev rows were answered."""
    head = ledger.head
    lines = []
    for name in head.trials:
        results = [ledger.result(name, number) for number in range(1, len(head.rungs) + 1)]
        values = [(each.step, each.dev_loss if head.metric is None else each.dev_metric) for each in results if each]
        scale = 1 if head.metric is None else 100
        lines.append(
            Line(name, [(float(step), scale * value) for step, value in values if value is not None], dots=True)
        )
    if head.metric is None:
        return Chart("Dev loss", lines)
    return Chart(f"Dev: {axis_label(head.metric)}", lines, bounds=_OF_100)


def _line(history: Sequence[Mapping[str, Any]], key: str, label: str, scale: float = 1.0) -> Line:
    points = downsample([(float(row["step"]), scale * row[key]) for row in history if key in row])
    rounded = [(step, float(f"{value:.5g}")) for step, value in points]
    return Line(label, rounded, key, dots=key in {DEV_LOSS, DEV_METRIC})
