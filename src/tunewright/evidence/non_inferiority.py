"""Whether a score has fallen by less than a margin: paired items, one-sided limits, and how many items that takes.

A drop is not worse than the margin where its one-sided 95% upper limit lies below it (non-inferiority); "no significant
difference" would show nothing, since few items never show one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm, t

from tunewright.evidence.base import Interval
from tunewright.evidence.statistics import RESAMPLES, bootstrap_sums, cluster_sums, effective_items

Result = Literal["not worse", "worse", "can't tell"]

EXPECTED_CHANGES = 0.1
"""Share of items that change sides: assumed before anything is measured, replaced by what was observed afterwards."""

_Z_ONE_SIDED = float(norm.ppf(0.95))
_Z_INTERVAL = float(norm.ppf(0.975))
_Z_POWER = float(norm.ppf(0.8))

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Drop:
    """By how much a score fell, in its own unit; negative where it rose."""

    value: float
    interval: Interval
    """95%, two-sided."""
    lower: float
    """One-sided 95% limit from below."""
    limit: float
    """One-sided 95% limit from above: what non-inferiority goes by."""
    method: str

    def against(self, margin: float) -> Result:
        """Not worse where the limit lies below the margin, worse where the whole interval lies above it."""
        if self.limit < margin:
            return "not worse"
        return "worse" if self.interval.low > margin else "can't tell"


def paired_drop(before: Floats, after: Floats, clusters: Sequence[str], seed: int, resamples: int = RESAMPLES) -> Drop:
    """Return the drop of a mean over the same items: Tango's score limits for right and wrong, else a paired bootstrap.

    Items of one cluster are not independent. Then Tango's limits are those of the effective number of items (as
    Wilson's are in :mod:`tunewright.evidence.statistics`), with quantiles of Student's t of as many clusters, from
    which that number is estimated; the bootstrap is over clusters.

    Args:
        before, after: each item's score, [items], at least one.
        clusters: the items'.
        seed: decides the resamples.
        resamples: how many.
    """
    if not (np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all()):
        return ratio_drop(
            cluster_sums(np.column_stack([before - after, np.ones_like(before)]), clusters), seed, resamples
        )
    items, count = len(before), len(set(clusters))
    lost, won = int((before > after).sum()), int((before < after).sum())
    value = (lost - won) / items
    if count == items:
        limits = [tango_limits(lost, won, items, z) for z in (_Z_INTERVAL, _Z_ONE_SIDED)]
        return _drop(value, limits, "Tango's score limits")
    if count == 1:  # nothing to estimate the effective number from: it may be one
        return _drop(value, [(-1.0, 1.0)] * 2, "none: a single cluster")
    effective = effective_items(before - after, clusters)
    scale = effective / items
    quantiles = [float(t.ppf(level, count - 1)) for level in (0.975, 0.95)]
    limits = [tango_limits(lost * scale, won * scale, effective, z) for z in quantiles]
    return _drop(value, limits, f"Tango's score limits, {effective:,.0f} effective items")


def ratio_drop(sums: Floats, seed: int, resamples: int = RESAMPLES) -> Drop:
    """Return the drop of a mean over units of unlike size, such as texts of some tokens, by a bootstrap over the texts.

    Args:
        sums: each text's summed drop and its number of units, [texts, 2].
        seed: decides the resamples.
        resamples: how many.
    """
    drawn = bootstrap_sums(sums, seed, resamples)
    means = drawn[:, 0] / drawn[:, 1]
    total, count = sums.sum(axis=0).tolist()
    limits = [
        (float(np.quantile(means, 1 - norm.cdf(z))), float(np.quantile(means, norm.cdf(z))))
        for z in (_Z_INTERVAL, _Z_ONE_SIDED)
    ]
    return _drop(total / count, limits, f"paired percentile bootstrap, {resamples:,} resamples")


def _drop(value: float, limits: list[tuple[float, float]], method: str) -> Drop:
    (low, high), (lower, limit) = limits
    return Drop(value, Interval(low=low, high=high), lower, limit, method)


def tango_limits(more: float, less: float, items: float, z: float) -> tuple[float, float]:
    """Score limits of a difference of paired shares, (more - less) / items (Tango 1998, Statistics in Medicine 17).

    The limits are the differences d that the score test does not reject: its variance is that of the likeliest table
    with the difference d, so that also tables without a discordant pair have limits of some width.

    Args:
        more, less: items that only the first, and only the second, gets right.
        items: all items; of clustered ones all three may be effective numbers, so they need not be whole.
        z: how many standard errors, such as 1.645 for one-sided 95%.
    """
    observed = (more - less) / items
    rejects = _score(more, less, items)
    # At a difference of 1 in size the table leaves nothing to chance, and the score has no variance.
    edge = 1 - 1e-12
    low = -1.0 if observed <= -edge or rejects(-edge) < z else float(brentq(lambda d: rejects(d) - z, -edge, observed))
    high = 1.0 if observed >= edge or rejects(edge) > -z else float(brentq(lambda d: rejects(d) + z, observed, edge))
    return low, high


def _score(more: float, less: float, items: float) -> Callable[[float], float]:
    def score(difference: float) -> float:
        surplus = more - less - items * difference
        if surplus == 0:
            return 0.0
        # The likeliest share of the second kind of discordant pair, where the difference of the two is given.
        b = -more - less + (2 * items - more + less) * difference
        c = -less * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 8 * items * c, 0.0)) - b) / (4 * items)
        return surplus / math.sqrt(max(items * (2 * share + difference * (1 - difference)), 1e-300))

    return score


def items_needed(margin: float, changes: float = EXPECTED_CHANGES) -> int:
    """Items that show non-inferiority with 80% power if nothing has changed in truth: (1.645 + 0.842)^2 q / margin^2.

    Args:
        margin: above 0, as a share.
        changes: q, the share of items that change sides, half of them each way.
    """
    return math.ceil((_Z_ONE_SIDED + _Z_POWER) ** 2 * changes / margin**2)


def smallest_margin(items: int, changes: float = EXPECTED_CHANGES) -> float:
    """Return the margin that so many items are enough for, as of :func:`items_needed`."""
    return min((_Z_ONE_SIDED + _Z_POWER) * math.sqrt(changes / items), 1.0)
