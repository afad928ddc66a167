"""Intervals and paired tests on clustered items.

Items of one cluster (near-duplicates, a document, a template) are not independent. So resampling, swaps of arms and the
effective number of items are all by cluster (Miller, "Adding Error Bars to Evals", arXiv 2411.00640). Small samples of
right and wrong get score intervals and exact tests, never a normal approximation (Bowyer et al., arXiv 2503.01747).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm

from tunewright.evidence.common import Interval

RESAMPLES = 10_000

_CHUNK_CELLS = 4_000_000  # clusters times resamples held at once: 32 MB of int64

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


# Clusters


def cluster_sums(values: NDArray[Any], clusters: Sequence[str]) -> NDArray[Any]:
    """Sum the rows of each cluster: [items, columns] to [clusters, columns], clusters in sorted order."""
    names, codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]), dtype=values.dtype)
    np.add.at(sums, codes, values)
    return sums


def effective_items(values: Floats, clusters: Sequence[str]) -> float:
    """Return the effective number of independent items for estimating the mean of ``values`` ([items]).

    It is the number of items divided by the design effect. The design effect is the variance of the mean over
    clusters (Miller, appendix A, with its C / (C - 1) correction) over the variance for independent items. A design
    effect below 1 is treated as noise. If nothing varies it cannot be estimated, and each cluster counts as one item.
    """
    items, mean = len(values), float(values.mean())
    table = cluster_sums(np.column_stack([values - mean]), clusters)
    count = len(table)
    independent = float(np.square(values - mean).sum())
    # One cluster has no variance between clusters; identical values have none at all.
    if count == 1 or independent < 1e-12:
        return float(count)
    # design effect = C / (C - 1) * sum over clusters of (sum of deviations)^2 / (N / (N - 1) * sum of deviations^2)
    design_effect = float(np.square(table).sum()) * count / (count - 1) / (independent * items / (items - 1))
    return items / max(design_effect, 1.0)


# Intervals


def wilson(share: float, items: float, level: float = 0.95) -> Interval:
    """Return Wilson's score interval of a share; ``items`` may be an effective number, so it need not be an integer."""
    z = float(norm.ppf((1 + level) / 2))
    z2 = z**2
    centre = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = z / (1 + z2 / items) * np.sqrt(share * (1 - share) / items + z2 / (4 * items**2))
    return Interval(low=max(float(centre - half), 0.0), high=min(float(centre + half), 1.0))


def bootstrap_sums(sums: NDArray[Any], seed: int, resamples: int = RESAMPLES) -> NDArray[Any]:
    """Return column sums of resampled corpora, whose clusters are drawn with replacement.

    Args:
        sums: one row per cluster, [clusters, columns].
        seed: decides the draws.
        resamples: number of corpora.

    Returns:
        [resamples, columns]. Clusters differ in size, so a mean is a ratio of two of these columns.
    """
    rng = np.random.default_rng(seed)
    count = len(sums)
    parts = []
    for rows in _chunks(resamples, count):
        # Offsets of ``count`` per resample let one bincount count the draws of all resamples.
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)  # [rows, clusters]
        parts.append(times @ sums)
    return np.concatenate(parts)


def _chunks(rows: int, columns: int) -> Iterator[int]:
    """Split ``rows`` into parts whose size times ``columns`` fits the memory limit."""
    step = max(1, _CHUNK_CELLS // columns)
    for start in range(0, rows, step):
        yield min(step, rows - start)


def percentiles(values: Floats) -> Interval:
    """Return the middle 95% of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(low=float(low), high=float(high))


def difference_interval(
    changes: Floats, clusters: Sequence[str], seed: int, resamples: int = RESAMPLES, *, reach: float = 1.0
) -> Interval:
    """Return the 95% interval of a mean difference: percentile bootstrap over clusters, adjusted for small samples.

    Two artificial clusters of mean size join the resampling: in one every item gains ``reach``, in the other every item
    loses it. For right and wrong this is Bonett and Price's adjustment in bootstrap form (2012, "Adjusted Wald
    confidence interval for a difference of binomial proportions based on paired data"). Without it, ten items on which
    the arms agree would give the interval [0, 0].

    Args:
        changes: treatment minus control, each item from -1 to 1; [items].
        clusters: the items' clusters.
        seed: decides the resamples.
        resamples: number of resamples.
        reach: change of each item in the artificial clusters.
    """
    sums = cluster_sums(np.column_stack([changes, np.ones_like(changes)]), clusters)
    size = len(changes) / len(sums)
    made_up = [[size * reach, size], [-size * reach, size]]
    drawn = bootstrap_sums(np.vstack([sums, made_up]), seed, resamples)
    # A ratio of sums: resampled corpora differ in their number of items.
    return percentiles(drawn[:, 0] / drawn[:, 1])


def largest_item_change(changes: Floats) -> float:
    """Return the largest absolute change of an item, which is the ``reach`` of graded scores; 1 if no item changes."""
    return float(np.abs(changes).max()) or 1.0


# Tests


def exact_mcnemar(changes: Floats, clusters: Sequence[str]) -> float:
    """Return the exact two-sided p-value of paired right/wrong outcomes, with clusters kept whole.

    Under the null hypothesis the arms are exchangeable, so each cluster's net change may have either sign. The sum over
    all sign patterns is counted exactly: clusters with the same size of net change follow one binomial, and the sizes
    are convolved. With one item per cluster this is McNemar's exact test.

    Args:
        changes: treatment minus control, each item +1 (fixed), 0 or -1 (broken); [items].
        clusters: the items' clusters.
    """
    # Clusters without a net change carry no sign, like concordant pairs in McNemar's test.
    nets = cluster_sums(np.rint(changes).astype(np.int64)[:, None], clusters)[:, 0]
    sizes, counts = np.unique(np.abs(nets[nets != 0]), return_counts=True)
    chances: NDArray[np.floating[Any]] = np.ones(1)  # probability of each total from -reach to +reach
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        spread = np.zeros(2 * size * count + 1)
        # k of ``count`` clusters positive gives the total size * (2k - count): steps of 2 * size.
        spread[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, spread)
    reach = len(chances) // 2
    totals = np.abs(np.arange(-reach, reach + 1))
    return min(float(chances[totals >= abs(int(nets.sum()))].sum()), 1.0)


def permutation_test(
    treatment: NDArray[Any],
    control: NDArray[Any],
    score: Callable[[Floats], Floats],
    seed: int,
    trials: int = RESAMPLES,
) -> float:
    """Return the two-sided p-value of a metric by paired approximate randomisation over clusters.

    In every trial each cluster's statistics swap arms with probability one half. p is the share of trials whose
    difference is at least the observed one, which counts as a trial, so p is never 0. The method is Riezler and
    Maxwell's (2005), as in sacrebleu, but by cluster.

    Args:
        treatment: statistics summed by cluster, [clusters, columns].
        control: the same for the other arm.
        score: the score of column sums: [..., columns] to [...].
        seed: decides the swaps.
        trials: number of trials.
    """
    rng = np.random.default_rng(seed)
    gain = treatment - control
    treatment_sum, control_sum = treatment.sum(axis=0), control.sum(axis=0)
    # Rounding must not turn a swap that changes nothing into a smaller difference.
    observed = abs(float(score(treatment_sum) - score(control_sum))) - 1e-12
    # The observed difference counts as one trial.
    reached = 1
    for rows in _chunks(trials, len(gain)):
        # Swapping a cluster moves its gain from one arm to the other: both sums follow from one product.
        moved = rng.integers(2, size=(rows, len(gain))) @ gain
        reached += int((np.abs(score(treatment_sum - moved) - score(control_sum + moved)) >= observed).sum())
    return reached / (trials + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests (Holm 1979), which bounds the family-wise error rate at 5%.

    The smallest p-value is multiplied by their number, the next by one less, and so on. An adjusted value is never
    smaller than one whose original was smaller.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        # The running maximum keeps adjusted p-values in the order of the original p-values.
        highest = max(highest, min((len(p_values) - rank) * p_values[place], 1.0))
        adjusted[place] = highest
    return adjusted
