"""Numbers of training as charts: lines of few points, which `charts.js` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunewright.config import MetricName
from tunewright.core.progress import downsample
from tunewright.evaluation.training_runs import TrainingRun
from tunewright.metrics import axis_label
from tunewright.render.blocks import Line, Lines
from tunewright.training.history import DEV_LOSS, DEV_METRIC, PAIR_LOSS, REPLAY_KL, REPLAY_LOSS

_LOSSES = {
    "loss": "training loss",
    DEV_LOSS: "dev loss",
    PAIR_LOSS: "loss of the pairs",
    REPLAY_KL: "replay KL",
    REPLAY_LOSS: "loss of replay",
}


_OF_100 = (0.0, 100.0)
"""Bounds of every metric's axis: shares, and scores of 100."""


def run_charts(history: Sequence[Mapping[str, Any]], metric: MetricName | None) -> list[Lines]:
    """Return the charts of a run; those without a point are there too while it may get some."""
    charts = [_chart("Loss", *(_line(history, key, label) for key, label in _LOSSES.items()))]
    if metric is not None:
        score = _line(history, DEV_METRIC, "dev score", 100)
        charts.append(_chart(f"Dev: {axis_label(metric)}", score, scale=100, bounds=_OF_100))
    for key, (title, scale) in _NUMBERS.items():
        charts.append(_chart(title, _line(history, key, title, scale), scale=scale))
    return charts


def _chart(axis: str, *lines: Line, scale: float = 1.0, bounds: tuple[float, float] | None = None) -> Lines:
    return Lines(axis, f"{axis} by step", lines, axis, scale=scale, bounds=bounds)


_GIB = 1 / 2**30
_NUMBERS = {
    "learning_rate": ("Learning rate", 1.0),
    "tokens_per_s": ("Tokens per second", 1.0),
    "memory_bytes": ("Memory, GiB", _GIB),
}


def comparison_charts(runs: Sequence[TrainingRun]) -> list[Lines]:
    """Return the losses of several runs, and their dev scores by each metric."""
    charts = [
        _chart("Training loss", *(_line(run.history, "loss", run.name) for run in runs)),
        _chart("Dev loss", *(_line(run.history, DEV_LOSS, run.name) for run in runs)),
    ]
    for metric in dict.fromkeys(run.metric for run in runs):
        if metric is not None:
            lines = (_line(run.history, DEV_METRIC, run.name, 100) for run in runs if run.metric == metric)
            charts.append(_chart(f"Dev: {axis_label(metric)}", *lines, bounds=_OF_100))
    return charts


def _line(history: Sequence[Mapping[str, Any]], key: str, label: str, scale: float = 1.0) -> Line:
    points = downsample([(float(row["step"]), scale * row[key]) for row in history if key in row])
    rounded = tuple((step, float(f"{value:.5g}")) for step, value in points)
    return Line(label, rounded, key=key, dots=key in {DEV_LOSS, DEV_METRIC})
