"""Intervals, paired tests and power on items that come in clusters.

Items of one cluster (near-duplicates, a document, a template) are not independent, so clusters are what is resampled,
what arms are swapped over, and what an item count is discounted by. After Miller, "Adding Error Bars to Evals"
(arXiv 2411.00640); small samples of right and wrong get score intervals and exact tests, never a normal approximation
(Bowyer et al., arXiv 2503.01747).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, norm

from tunewright.evaluation.evidence import Arm, ArmKind, Contrast
from tunewright.evaluation.parts import Interval, Score
from tunewright.metrics import BLEU_COLUMNS, bleu_statistics, corpus_bleu, exact_matches
from tunewright.recipe import Metric

RESAMPLES = 10_000

_Z_INTERVAL = float(norm.ppf(0.975))
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
    """How many independent items these clustered ones are worth for estimating the mean of ``values`` ([items]).

    Items divided by the design effect: the variance of the mean over clusters (Miller, appendix A, with its
    C / (C - 1) correction) by the variance that independent items would give. A design effect below 1 is taken for
    noise, and where nothing varies there is nothing to estimate it from: then each cluster counts as one item.
    """
    items, mean = len(values), float(values.mean())
    table = cluster_sums(np.column_stack([values - mean]), clusters)
    count = len(table)
    independent = float(np.square(values - mean).sum())
    if count == 1 or independent < 1e-12:
        return float(count)
    design_effect = float(np.square(table).sum()) * count / (count - 1) / (independent * items / (items - 1))
    return items / max(design_effect, 1.0)


# Intervals


def wilson(share: float, items: float) -> Interval:
    """Wilson's 95% score interval of a share; ``items`` may be an effective number, so it need not be whole."""
    z2 = _Z_INTERVAL**2
    centre = (share + z2 / (2 * items)) / (1 + z2 / items)
    half = _Z_INTERVAL / (1 + z2 / items) * np.sqrt(share * (1 - share) / items + z2 / (4 * items**2))
    return Interval(low=max(float(centre - half), 0.0), high=min(float(centre + half), 1.0))


def bootstrap_sums(sums: NDArray[Any], seed: int, resamples: int = RESAMPLES) -> NDArray[Any]:
    """Column sums of corpora whose clusters are drawn with replacement.

    Args:
        sums: one row per cluster, [clusters, columns].
        seed: decides the draws.
        resamples: how many corpora.

    Returns:
        [resamples, columns]. Clusters differ in size, so a mean is a ratio of two of these columns.
    """
    rng = np.random.default_rng(seed)
    count = len(sums)
    parts = []
    for rows in _chunks(resamples, count):
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        parts.append(times @ sums)
    return np.concatenate(parts)


def _chunks(rows: int, columns: int) -> Iterator[int]:
    """Split ``rows`` so that no part times ``columns`` is more than memory should hold."""
    step = max(1, _CHUNK_CELLS // columns)
    for start in range(0, rows, step):
        yield min(step, rows - start)


def percentiles(values: Floats) -> Interval:
    """The middle 95% of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(low=float(low), high=float(high))


def exact_match_difference(changes: Floats, clusters: Sequence[str], seed: int, resamples: int = RESAMPLES) -> Interval:
    """95% interval of a difference in exact match: percentile bootstrap over clusters, adjusted for small samples.

    Two made-up clusters of mean size join the resampling, one all fixed and one all broken. That is Bonett and Price's
    adjustment (2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data") in the bootstrap's terms: without it, ten items on which the arms agree would give the interval [0, 0].

    Args:
        changes: treatment minus control, each item +1 (fixed), 0 or -1 (broken); [items].
        clusters: the items' clusters.
        seed: decides the resamples.
        resamples: how many.
    """
    sums = cluster_sums(np.column_stack([changes, np.ones_like(changes)]), clusters)
    size = len(changes) / len(sums)
    drawn = bootstrap_sums(np.vstack([sums, [[size, size], [-size, size]]]), seed, resamples)
    return percentiles(drawn[:, 0] / drawn[:, 1])


# Tests


def exact_mcnemar(changes: Floats, clusters: Sequence[str]) -> float:
    """Exact two-sided p-value of paired right/wrong outcomes, with clusters kept whole.

    Under the null the arms' names mean nothing, so each cluster's net change could as well have had the other sign.
    The sum over all sign patterns is counted exactly: clusters with the same size of net change follow one binomial,
    and the sizes are convolved. With one item per cluster this is McNemar's exact test.

    Args:
        changes: treatment minus control, each item +1 (fixed), 0 or -1 (broken); [items].
        clusters: the items' clusters.
    """
    nets = cluster_sums(np.rint(changes).astype(np.int64)[:, None], clusters)[:, 0]
    sizes, counts = np.unique(np.abs(nets[nets != 0]), return_counts=True)
    chances: NDArray[np.floating[Any]] = np.ones(1)  # of each total from -reach to +reach
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        spread = np.zeros(2 * size * count + 1)
        spread[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, spread)
    reach = len(chances) // 2
    totals = np.abs(np.arange(-reach, reach + 1))
    return min(float(chances[totals >= abs(int(nets.sum()))].sum()), 1.0)


def swapping_test(
    treatment: NDArray[Any],
    control: NDArray[Any],
    score: Callable[[NDArray[Any]], float],
    seed: int,
    trials: int = RESAMPLES,
) -> float:
    """Two-sided p-value of a corpus score by paired approximate randomisation over clusters.

    In every trial each cluster's statistics change sides with chance one half; p is the share of trials (the observed
    one counted in, so never 0) whose difference is at least as large as the observed one. After Riezler and Maxwell
    (2005), as sacrebleu does it, but by cluster.

    Args:
        treatment: statistics summed by cluster, [clusters, columns].
        control: the same for the other arm.
        score: the corpus score of column sums.
        seed: decides the swaps.
        trials: how many.
    """
    rng = np.random.default_rng(seed)
    gain = treatment - control
    treatment_sum, control_sum = treatment.sum(axis=0), control.sum(axis=0)
    # Rounding must not turn a swap that changes nothing into a smaller difference.
    observed = abs(score(treatment_sum) - score(control_sum)) - 1e-12
    reached = 1
    for rows in _chunks(trials, len(gain)):
        moved = rng.integers(2, size=(rows, len(gain))) @ gain
        for shift in moved:
            reached += abs(score(treatment_sum - shift) - score(control_sum + shift)) >= observed
    return reached / (trials + 1)


# Power


def minimum_detectable_effect(items: float, discordant: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true difference in exact match that a paired two-sided test finds with this power.

    Solves Miettinen's (1968) n = (z_(1-alpha/2) sqrt(q) + z_power sqrt(q - d^2))^2 / d^2 for d. A difference is never
    larger than the share of items that changed, so where few changed q grows with d: all of them change one way.

    Args:
        items: number of independent items (`effective_items` of clustered ones).
        discordant: q, the share of items that exactly one arm gets right.
        power: chance of finding the difference.
        alpha: level of the two-sided test.

    Returns:
        A share; 1.0 where no difference could be found.
    """
    z_alpha, z_power = norm.ppf(1 - alpha / 2), norm.ppf(power)

    def excess(d: float) -> float:
        q = max(discordant, d)
        return float(np.sqrt(items) * d - z_alpha * np.sqrt(q) - z_power * np.sqrt(max(q - d * d, 0.0)))

    if excess(1.0) <= 0:
        return 1.0
    return float(brentq(excess, 1e-12, 1.0))


# Parts of the evidence


def score_arm(
    *,
    name: str,
    kind: ArmKind,
    shots: int,
    answers: Sequence[str],
    references: Sequence[str],
    clusters: Sequence[str],
    truncated: int,
    prompt_tokens: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> Arm:
    """Measure one arm by both metrics; ``answers``, ``references`` and ``clusters`` are per item, at least one."""
    right = exact_matches(answers, references)
    worth = effective_items(right.astype(np.float64), clusters)
    share = float(right.mean())
    sums = cluster_sums(bleu_statistics(answers, references), clusters)
    bleus = np.array([corpus_bleu(row) for row in bootstrap_sums(sums, seed, resamples)])
    independent = round(worth) == len(right)
    return Arm(
        name=name,
        kind=kind,
        shots=shots,
        items=len(right),
        exact=int(right.sum()),
        exact_match=Score(
            value=share,
            interval=wilson(share, worth),
            method="Wilson" if independent else f"Wilson, {worth:.0f} effective items",
        ),
        bleu=Score(value=corpus_bleu(sums.sum(axis=0)), interval=percentiles(bleus), method=_bootstrap_name(resamples)),
        truncated=truncated,
        prompt_tokens=prompt_tokens,
    )


def contrast(
    *,
    treatment: str,
    control: str,
    treatment_answers: Sequence[str],
    control_answers: Sequence[str],
    references: Sequence[str],
    clusters: Sequence[str],
    metric: Metric,
    seed: int,
    resamples: int = RESAMPLES,
) -> Contrast:
    """Compare two arms on the same items by ``metric``; fixed and broken are by exact match whatever the metric."""
    right = exact_matches(treatment_answers, references).astype(np.float64)
    changes = right - exact_matches(control_answers, references)
    if metric == "exact_match":
        measured = _exact_match_contrast(changes, clusters, seed, resamples)
    else:
        measured = _bleu_contrast(
            cluster_sums(bleu_statistics(treatment_answers, references), clusters),
            cluster_sums(bleu_statistics(control_answers, references), clusters),
            seed,
            resamples,
        )
    return Contrast(
        treatment=treatment,
        control=control,
        metric=metric,
        fixed=int((changes > 0).sum()),
        broken=int((changes < 0).sum()),
        **measured,
    )


def _exact_match_contrast(changes: Floats, clusters: Sequence[str], seed: int, resamples: int) -> dict[str, Any]:
    worth = effective_items(changes, clusters)
    return {
        "difference": float(changes.mean()),
        "interval": exact_match_difference(changes, clusters, seed, resamples),
        "interval_method": f"{_bootstrap_name(resamples)}, Bonett-Price adjusted",
        "p_value": exact_mcnemar(changes, clusters),
        "test": "exact McNemar" if len(set(clusters)) == len(clusters) else "exact McNemar by cluster",
        "effective_items": worth,
        "minimum_detectable_effect": minimum_detectable_effect(worth, float(np.abs(changes).mean())),
    }


def _bleu_contrast(ours: Integers, theirs: Integers, seed: int, resamples: int) -> dict[str, Any]:
    drawn = bootstrap_sums(np.hstack([ours, theirs]), seed, resamples)
    differences = np.array([corpus_bleu(row[:BLEU_COLUMNS]) - corpus_bleu(row[BLEU_COLUMNS:]) for row in drawn])
    return {
        "difference": corpus_bleu(ours.sum(axis=0)) - corpus_bleu(theirs.sum(axis=0)),
        "interval": percentiles(differences),
        "interval_method": _bootstrap_name(resamples),
        "p_value": swapping_test(ours, theirs, corpus_bleu, seed, resamples),
        "test": f"paired randomisation by cluster, {resamples:,} trials",
        "effective_items": None,
        "minimum_detectable_effect": _bleu_effect(differences, len(ours)),
    }


def _bootstrap_name(resamples: int) -> str:
    return f"percentile bootstrap over clusters, {resamples:,} resamples"


def _bleu_effect(differences: Floats, clusters: int) -> float:
    """Smallest true BLEU difference found with 80% power: 2.8 standard errors of the resampled difference.

    Where nothing varies, it is the share of clusters that would have had to change to be noticed.
    """
    error = float(differences.std())
    if error < 1e-12:
        return minimum_detectable_effect(clusters, 0.0)
    return float(_Z_INTERVAL + norm.ppf(0.8)) * error
