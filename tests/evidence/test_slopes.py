"""The slope per doubling: what it is, and that its interval holds the truth about as often as it says."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from making.evidence import pair, scorers
from tunewright.evidence.learning_curve import corpus_slope, share_slope, slope_weights
from tunewright.metrics import score_all

ROWS = np.array([[100, 200, 400]] * 3)


def test_slope_weights_equal_a_fitted_line() -> None:
    rng = np.random.default_rng(3)
    rows, scores = np.array([97.0, 205, 391, 800]), rng.random(4)
    expected, _ = np.polyfit(np.log2(rows), scores, 1)
    assert slope_weights(rows.tolist()) @ scores == pytest.approx(expected)


def test_slope_of_exact_match_is_the_mean_of_the_seeds_fitted_lines() -> None:
    rng = np.random.default_rng(5)
    right = (rng.random((3, 3, 50)) < 0.5).astype(np.float64)
    rows = np.array([[101, 198, 400], [97, 203, 400], [100, 200, 400]])
    slope = share_slope(right, rows, [str(n // 2) for n in range(50)], seed=0, resamples=200)
    lines = [np.polyfit(np.log2(r), s.mean(axis=1), 1)[0] for r, s in zip(rows, right, strict=True)]
    assert slope.per_doubling == pytest.approx(np.mean(lines))
    assert slope.interval.low < slope.per_doubling < slope.interval.high


def test_slope_of_bleu_is_the_mean_of_the_seeds_fitted_lines() -> None:
    words = ["the", "court", "of", "appeals", "for", "the", "county", "held", "that", "this", "was", "so"]
    rng = np.random.default_rng(7)
    references = [" ".join(rng.choice(words, size=8)) for _ in range(20)]

    def answers(keep: float) -> list[str]:
        return [" ".join(w if rng.random() < keep else "x" for w in r.split()) for r in references]

    given = [[answers(keep) for keep in (0.3, 0.6, 0.9)] for _ in range(2)]
    (bleu,) = scorers(["bleu"])
    examples = [pair(f"question {n}", r) for n, r in enumerate(references)]
    scored = [[score_all(bleu, a, examples) for a in sizes] for sizes in given]
    statistics = np.array([[each.statistics for each in sizes] for sizes in scored])
    slope = corpus_slope(statistics, bleu.corpus, ROWS[:2], [str(n) for n in range(20)], seed=0, resamples=200)
    lines = [np.polyfit(np.log2(ROWS[0]), [each.total() for each in sizes], 1)[0] for sizes in scored]
    assert slope.per_doubling == pytest.approx(np.mean(lines))
    assert 0 < slope.interval.low < slope.per_doubling < slope.interval.high


def test_corpus_slope_of_a_mean_has_the_interval_of_the_share() -> None:
    """Seeds that answer equally leave the items' spread alone."""
    rng = np.random.default_rng(13)
    once = rng.random((3, 400)) < np.array([[0.3], [0.5], [0.7]])
    right = np.array([once, once], dtype=np.float64)
    clusters = [str(n) for n in range(400)]
    columns = np.stack([right, np.ones_like(right)], axis=-1)
    of_sums = corpus_slope(columns, lambda sums: sums[..., 0] / sums[..., 1], ROWS[:2], clusters, 0, 1_000)
    of_share = share_slope(right, ROWS[:2], clusters, 0, 1_000)
    assert of_sums.per_doubling == pytest.approx(of_share.per_doubling)
    widths = [slope.interval.high - slope.interval.low for slope in (of_sums, of_share)]
    assert widths[0] == pytest.approx(widths[1], rel=0.15)


def test_items_that_are_always_wrong_do_not_prove_a_flat_curve() -> None:
    clusters = [str(n) for n in range(10)]
    slope = share_slope(np.zeros((3, 3, 10), dtype=np.float64), ROWS, clusters, seed=0)
    assert slope.per_doubling == 0
    assert slope.interval.high > 0.05
    many = share_slope(
        np.zeros((3, 3, 1000), dtype=np.float64), ROWS, [str(n) for n in range(1000)], seed=0, resamples=500
    )
    assert many.interval.high < 0.01


def _draw(rng: np.random.Generator, truth: float, items: int, cluster: int, of_seed: float) -> NDArray[np.float64]:
    """Right answers of three seeds' adapters; items of a cluster and answers of a seed go together."""
    ability = rng.normal(size=items // cluster).repeat(cluster)
    right = []
    for _ in range(3):
        shift = rng.normal(scale=of_seed, size=3)[:, None]  # the luck of each adapter
        chance = np.clip(0.3 + truth * np.arange(3)[:, None] + 0.1 * ability + shift, 0.0, 1.0)
        right.append(rng.random((3, items)) < chance)
    return np.array(right, dtype=np.float64)


@pytest.mark.parametrize(("cluster", "of_seed"), [(1, 0.0), (1, 0.05), (4, 0.03)])
def test_slope_interval_has_its_stated_coverage(cluster: int, of_seed: float) -> None:
    rng = np.random.default_rng(11)
    truth, items, runs = 0.05, 120, 300
    names = [str(n // cluster) for n in range(items)]
    held = 0
    for run in range(runs):
        interval = share_slope(_draw(rng, truth, items, cluster, of_seed), ROWS, names, run, 200).interval
        held += interval.low <= truth <= interval.high
    assert held / runs >= 0.93
