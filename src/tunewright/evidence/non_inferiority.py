"""Non-inferiority on paired items: one-sided limits of a drop, and the number of items needed.

A drop is acceptable if its one-sided 95% upper limit lies below the margin. "No significant difference" would show
nothing, since few items never show one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, t

from tunewright.evidence.common import Interval
from tunewright.evidence.statistics import RESAMPLES, Floats, bootstrap_sums, cluster_sums, effective_items

Result = Literal["not worse", "worse", "can't tell"]

EXPECTED_CHANGES = 0.1
"""Share of items that change sides, assumed before the measurement and replaced by the observed share after it."""

_Z_ONE_SIDED = float(norm.ppf(0.95))
_Z_INTERVAL = float(norm.ppf(0.975))
_Z_POWER = float(norm.ppf(0.8))


@dataclass(frozen=True)
class ScoreDrop:
    """The drop of a score in its own unit; negative if it rose."""

    value: float
    interval: Interval
    """Two-sided 95% interval."""
    lower: float
    """One-sided 95% lower limit."""
    limit: float
    """One-sided 95% upper limit, which decides non-inferiority."""
    method: str

    def against(self, margin: float) -> Result:
        """Return not worse if the limit is below the margin, worse if the interval is above it."""
        if self.limit < margin:
            return "not worse"
        return "worse" if self.interval.low > margin else "can't tell"


def paired_drop(
    before: Floats, after: Floats, clusters: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> ScoreDrop:
    """Return the drop of a mean over the same items: Tango's score limits for right and wrong, else a paired bootstrap.

    Items of one cluster are not independent. With several per cluster, Tango's limits use the effective number of
    items (as Wilson's do in :mod:`tunewright.evidence.statistics`). Student's t replaces the normal quantiles, with
    the clusters' degrees of freedom, because the effective number is an estimate. The bootstrap resamples clusters.
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
    if count == 1:  # one cluster: the effective number cannot be estimated and may be 1
        return _drop(value, [(-1.0, 1.0)] * 2, "none: a single cluster")
    effective = effective_items(before - after, clusters)
    scale = effective / items
    quantiles = [float(t.ppf(level, count - 1)) for level in (0.975, 0.95)]
    limits = [tango_limits(lost * scale, won * scale, effective, z) for z in quantiles]
    return _drop(value, limits, f"Tango's score limits, {effective:,.0f} effective items")


def ratio_drop(sums: Floats, seed: int, resamples: int = RESAMPLES) -> ScoreDrop:
    """Return the drop of a mean over texts of different lengths, by a bootstrap over the texts.

    ``sums`` are each text's summed drop and its number of units, [texts, 2].
    """
    drawn = bootstrap_sums(sums, seed, resamples)
    means = drawn[:, 0] / drawn[:, 1]
    total, count = sums.sum(axis=0).tolist()
    limits = [
        (float(np.quantile(means, 1 - norm.cdf(z))), float(np.quantile(means, norm.cdf(z))))
        for z in (_Z_INTERVAL, _Z_ONE_SIDED)
    ]
    return _drop(total / count, limits, f"paired percentile bootstrap, {resamples:,} resamples")


def _drop(value: float, limits: list[tuple[float, float]], method: str) -> ScoreDrop:
    (low, high), (lower, limit) = limits
    return ScoreDrop(value, Interval(low=low, high=high), lower, limit, method)


def tango_limits(more: float, less: float, items: float, z: float) -> tuple[float, float]:
    """Return score limits of a difference of paired shares, (more - less) / items (Tango 1998, Statistics in Medicine
    17).

    The limits are the differences d that the score test does not reject. Its variance comes from the
    likeliest table with the difference d, so the interval has a positive width even without discordant
    pairs. For clustered items all three numbers may be effective numbers, which need not be integers.
    """
    observed = (more - less) / items
    rejects = _score(more, less, items)
    # At a difference of 1 or -1 the variance is 0, and the score is undefined.
    edge = 1 - 1e-12
    low = -1.0 if observed <= -edge or rejects(-edge) < z else float(brentq(lambda d: rejects(d) - z, -edge, observed))
    high = 1.0 if observed >= edge or rejects(edge) > -z else float(brentq(lambda d: rejects(d) + z, observed, edge))
    return low, high


def _score(more: float, less: float, items: float) -> Callable[[float], float]:
    def score(difference: float) -> float:
        surplus = more - less - items * difference
        if surplus == 0:
            return 0.0
        # The likeliest share of the second kind of discordant pair, given the difference of the two.
        b = -more - less + (2 * items - more + less) * difference
        c = -less * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 8 * items * c, 0.0)) - b) / (4 * items)
        return surplus / math.sqrt(max(items * (2 * share + difference * (1 - difference)), 1e-300))

    return score


def items_needed(margin: float, changes: float = EXPECTED_CHANGES) -> int:
    """Return the items that show non-inferiority with 80% power if nothing changed: (1.645 + 0.842)^2 q / margin^2.

    q (``changes``) is the share of items that change sides, half of them each way.
    """
    return math.ceil((_Z_ONE_SIDED + _Z_POWER) ** 2 * changes / margin**2)


def smallest_margin(items: int, changes: float = EXPECTED_CHANGES) -> float:
    """Return the smallest margin for which this number of items suffices; inverse of :func:`items_needed`."""
    return min((_Z_ONE_SIDED + _Z_POWER) * math.sqrt(changes / items), 1.0)
