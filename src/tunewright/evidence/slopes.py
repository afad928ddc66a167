"""Slope of a score per doubling of the training rows, with an interval over dev items and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from tunewright.evidence.common import Interval
from tunewright.evidence.statistics import RESAMPLES, Floats, bootstrap_sums, cluster_sums


@dataclass(frozen=True)
class Slope:
    """Mean gain per doubling of the training rows over the measured sizes, as a share from 0 to 1."""

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
    right would give the interval [0, 0].

    Args:
        right: 1 where an adapter got an item right, else 0, [seeds, sizes, items]; at least two seeds.
        rows: training rows of each adapter, [seeds, sizes].
        clusters: the items' clusters.
        seed: decides the resamples.
        resamples: number of resamples.
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

    Args:
        statistics: statistics of each item's answer by each adapter, [seeds, sizes, items, columns].
        corpus: the score of column sums, [..., columns] to [...].
        rows, clusters, seed, resamples: as for `share_slope`.
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
