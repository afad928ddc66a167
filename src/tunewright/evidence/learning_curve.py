"""A learning curve: its schema, its slope per doubling of the rows, and the answer to *would more data help?*"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import t

from tunewright.config import MetricName
from tunewright.core.errors import UserError
from tunewright.core.log import parse_line
from tunewright.evidence.common import Interval, Part
from tunewright.evidence.power import FEWEST_CLUSTERS
from tunewright.evidence.schema import Evidence
from tunewright.evidence.statistics import RESAMPLES, Floats, bootstrap_sums, cluster_sums
from tunewright.metrics import axis_label, points_text, score_text
from tunewright.render.blocks import Column, Lead, Line, Lines, Notes, Row, Section, row, table

CURVE_FILE = "curve.json"


class Point(Part):
    """One adapter of the curve."""

    share: float
    seed: Annotated[int, Field(description="Seed of the row sample and of the training.")]
    rows: Annotated[int, Field(description="Training rows of the domain.")]
    score: Annotated[float, Field(description="Score on all dev rows, as a share from 0 to 1.")]
    dev_loss: Annotated[float, Field(description="Loss of the selected epoch.")]
    adapter: Annotated[str, Field(description="The adapter's digest.")]


class Curve(Part):
    """A learning curve; ``curve.json``."""

    schema_version: Literal[1] = 1
    id: str
    project: str
    metric: MetricName
    margin: float
    items: int
    clusters: int
    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    points: list[Point]
    slope: Annotated[float, Field(description="Gain per doubling of the training rows, as a share from 0 to 1.")]
    interval: Annotated[Interval, Field(description="95% interval of the slope.")]
    method: str
    lineage: dict[str, Any]

    def mean(self, share: float) -> float:
        """Return the mean score of all seeds at one share."""
        scores = [point.score for point in self.points if point.share == share]
        return sum(scores) / len(scores)


def find_curve(curves: Path, evidence: Evidence) -> Curve | None:
    """Return the newest learning curve on an evaluation's data and base, by its metric; None if none was measured."""
    found = [
        curve
        for curve in map(load_curve, sorted(curves.glob(f"[!.]*/{CURVE_FILE}")))
        if all(curve.lineage.get(key) == evidence.lineage.get(key) for key in ("dataset", "base"))
        and curve.metric == evidence.metric
    ]
    return max(found, key=lambda curve: str(curve.lineage.get("created", "")), default=None)


def load_curve(file: Path) -> Curve:
    """Load a learning curve from its ``curve.json``."""
    if not file.exists():
        fix = "Run `tunewright train --curve`."
        raise UserError("There is no such learning curve", where=str(file), fix=fix)
    fix = "Remove its folder; `tunewright train --curve` measures it again."
    return parse_line(Curve.model_validate_json, file.read_bytes(), str(file), "Invalid learning curve", fix)


@dataclass(frozen=True)
class MoreData:
    """An answer with its reasons."""

    answer: Literal["yes", "no", "can't tell"]
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0: more data would help, 3: it would not, 4: can't tell."""
        return {"yes": 0, "no": 3, "can't tell": 4}[self.answer]


def more_data(curve: Curve) -> MoreData:
    """Answer, only from the curve, whether more data would help.

    The answer is no if the whole interval of the gain per doubling lies at or below the margin. Otherwise it is yes if
    the interval lies above zero. Else, or with fewer than `FEWEST_CLUSTERS` dev clusters, it is can't tell.
    """
    points = f"{points_text(curve.slope)} points"
    interval = f"95% interval {curve.interval.points}"
    margin = f"{100 * curve.margin:g} points"
    before, whole = curve.shares[-2:]
    rows = max(point.rows for point in curve.points)
    last = (
        f"The last step, from {before:.0%} to all {rows:,} rows, brought "
        f"{points_text(curve.mean(whole) - curve.mean(before))} points: {score_text(curve.metric, curve.mean(before))} "
        f"to {score_text(curve.metric, curve.mean(whole))} on dev."
    )
    measured = f"each doubling of the training rows brought {points} ({interval})"
    answer: Literal["yes", "no", "can't tell"]
    if curve.clusters < FEWEST_CLUSTERS:
        answer = "can't tell"
        why = f"{measured}, but {curve.clusters} independent dev clusters are too few"
    elif curve.interval.high <= curve.margin:
        answer, why = "no", f"{measured}: not more than the margin of {margin} that is worth shipping"
    elif curve.interval.low > 0:
        answer, why = "yes", f"{measured}. Twice the rows would bring about as much again, if the curve continues"
    else:
        answer, why = "can't tell", f"{measured}: the interval includes both no gain and more than {margin}"
        why += ". More dev rows or --seeds would narrow it"
    return MoreData(answer, (f"Would more data help? {answer[0].upper()}{answer[1:]}: {why}.", last))


@dataclass(frozen=True)
class Slope:
    """Mean gain per doubling of the training rows over the measured sizes, as a share."""

    per_doubling: float
    interval: Interval
    method: str


def slope_weights(rows: Sequence[float]) -> Floats:
    """Return weights that turn scores at these row counts into their least-squares slope per doubling; [sizes].

    They sum to 0.
    """
    x: Floats = np.log2(np.asarray(rows, dtype=np.float64))
    x -= x.mean()
    weights: Floats = x / (x @ x)
    return weights


def share_slope(
    right: Floats, rows: NDArray[np.int64], clusters: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> Slope:
    """Return the slope of a share of right answers.

    Two artificial clusters of mean size join the resampling, as in `statistics.difference_interval`. One is all wrong
    with the fewest rows and all right with the most, the other the reverse. Without them ten items that no adapter gets
    right would give the interval [0, 0]. ``right`` is 1 where an adapter got an item right, else 0:
    [seeds, sizes, items]; ``rows`` are each adapter's training rows, [seeds, sizes].
    """
    weights = np.array([slope_weights(row) for row in rows])
    by_item: Floats = np.einsum("rsi,rs->ri", right, weights)  # [seeds, items]
    sums = cluster_sums(np.column_stack([by_item.mean(axis=0), np.ones(by_item.shape[1])]), clusters)
    steepest = float(np.maximum(weights, 0).sum(axis=1).mean())
    size = by_item.shape[1] / len(sums)
    drawn = bootstrap_sums(np.vstack([sums, [[size * steepest, size], [-size * steepest, size]]]), seed, resamples)
    return _combined(by_item.mean(axis=1), drawn[:, 0] / drawn[:, 1], len(sums))


def corpus_slope(
    statistics: Floats,
    corpus: Callable[[Floats], Floats],
    rows: NDArray[np.int64],
    clusters: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> Slope:
    """Return the slope of a mean of graded scores, or of a corpus metric.

    ``statistics`` are of each answer, [seeds, sizes, items, columns]; ``corpus`` scores their sums.
    """
    seeds, sizes, items, width = statistics.shape
    weights = np.array([slope_weights(row) for row in rows])
    columns = np.moveaxis(statistics, 2, 0).reshape(items, seeds * sizes * width)
    sums = cluster_sums(columns, clusters)

    def slopes(drawn: Floats) -> Floats:
        """Return slopes by seed: [..., seeds * sizes * columns] to [..., seeds]."""
        scores = corpus(drawn.reshape(*drawn.shape[:-1], seeds, sizes, width))
        each: Floats = (weights * scores).sum(axis=-1)
        return each

    drawn = slopes(bootstrap_sums(sums, seed, resamples)).mean(axis=-1)
    return _combined(slopes(sums.sum(axis=0)), drawn, len(sums))


def _combined(by_seed: Floats, drawn: Floats, clusters: int) -> Slope:
    """Return the mean slope with a t interval over both sources of variance.

    One source is the choice of dev items: the spread of the slope over resampled clusters (``drawn``). The other is the
    choice of rows and the training noise: the spread over seeds, which are too few to resample. The variances are
    added, with Satterthwaite's degrees of freedom (1946). Interactions of items and seeds are in both, so the interval
    is conservative.
    """
    seeds = len(by_seed)
    assert seeds > 1
    of_items, of_seeds = float(drawn.var(ddof=1)), float(by_seed.var(ddof=1)) / seeds
    variance = of_items + of_seeds
    freedom = variance**2 / (of_items**2 / max(clusters - 1, 1) + of_seeds**2 / (seeds - 1)) if variance else 1.0
    half = float(t.ppf(0.975, freedom)) * variance**0.5
    slope = float(by_seed.mean())
    return Slope(
        per_doubling=slope,
        interval=Interval(low=slope - half, high=slope + half),
        method=f"t over {seeds} seeds and a bootstrap over {clusters} clusters, {freedom:.0f} degrees of freedom",
    )


def curve_section(curve: Curve) -> Section:
    """Return the answer, and the scores on dev by share of the training rows and seed."""
    seeds = (f"Seed {seed}" for seed in curve.seeds)
    head: tuple[str | Column, ...] = (Column("Share"), "Training rows", *seeds, "Mean", "Dev loss")
    return Section(
        "more-data",
        "Would more data help?",
        (
            Notes(more_data(curve).reasons),
            Lead(
                f"{curve.items:,} dev items in {curve.clusters:,} clusters, answered after training on nested parts of "
                "the rows."
            ),
            table("Table of scores by share and seed", head, (_share_row(curve, share) for share in curve.shares)),
            curve_lines(curve),
        ),
    )


def curve_lines(curve: Curve) -> Lines:
    """Return the mean score by training rows, and each training's score."""
    means = tuple((fmean(p.rows for p in curve.points if p.share == s), 100 * curve.mean(s)) for s in curve.shares)
    measured = sorted((p.rows, 100 * p.score, p.seed) for p in curve.points)
    trainings = (
        Line(f"seed {seed}", tuple((rows, score) for rows, score, s in measured if s == seed), dots=True, joined=False)
        for seed in curve.seeds
    )
    return Lines(
        f"curve-{curve.id}",
        f"Score on {curve.items} dev items by training rows",
        (Line(f"mean of {len(curve.seeds)} seeds", means, "tuned"), *trainings),
        axis_label(curve.metric),
        below="training rows",
        doubling=True,
        caption=f"Each point is an adapter trained on a part of the rows; {curve.method}.",
    )


def _share_row(curve: Curve, share: float) -> Row:
    points = {point.seed: point for point in curve.points if point.share == share}
    rows = sorted({point.rows for point in points.values()})
    scores = (score_text(curve.metric, points[seed].score) if seed in points else "" for seed in curve.seeds)
    loss = sum(point.dev_loss for point in points.values()) / len(points)
    return row(
        f"{share:.0%}",
        " to ".join(f"{count:,}" for count in dict.fromkeys((rows[0], rows[-1]))),
        *scores,
        score_text(curve.metric, curve.mean(share)),
        f"{loss:.3f}",
    )
