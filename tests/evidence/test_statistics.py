"""Intervals, tests and power against scipy, sacrebleu, brute force, published numbers and simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from making.property_examples import examples
from tunewright.evidence.statistics import (
    bootstrap_sums,
    cluster_sums,
    difference_interval,
    effective_items,
    exact_mcnemar,
    holm,
    permutation_test,
    wilson,
)

CHANGES = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=60).map(np.array)


def _alone(count: int) -> list[str]:
    """A cluster name per item: none alike."""
    return [str(i) for i in range(count)]


# Intervals


@given(st.integers(1, 3000), st.floats(0, 1))
def test_wilson_equals_scipy(items: int, share: float) -> None:
    successes = round(items * share)
    ours = wilson(successes / items, items)
    theirs = binomtest(successes, items).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_bootstrap_resamples_whole_clusters() -> None:
    sums = np.array([[1, 10], [2, 100], [4, 1000]])
    possible = {
        tuple(sums[list(drawn)].sum(axis=0).tolist()) for drawn in itertools.combinations_with_replacement(range(3), 3)
    }
    drawn = bootstrap_sums(sums, seed=0, resamples=2000)
    assert {tuple(row) for row in drawn.tolist()} == possible
    assert drawn.mean(axis=0) == pytest.approx(sums.sum(axis=0), rel=0.05)


def test_resamples_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.arange(40).reshape(20, 2)
    whole = bootstrap_sums(sums, seed=3, resamples=100)
    monkeypatch.setattr("tunewright.evidence.statistics._CHUNK_CELLS", 140)
    np.testing.assert_array_equal(bootstrap_sums(sums, seed=3, resamples=100), whole)


def test_difference_interval_equals_a_plain_loop() -> None:
    """One fixed and one broken cluster of mean size join, then clusters are drawn: written out here item by item."""
    rng = np.random.default_rng(5)
    groups = [rng.choice([-1.0, 0.0, 1.0], size=size, p=[0.1, 0.5, 0.4]).tolist() for size in rng.integers(1, 5, 40)]
    items = [c for group in groups for c in group]
    names = [f"g{i}" for i, group in enumerate(groups) for _ in group]
    size = len(items) / len(groups)
    pool = [(sum(g), float(len(g))) for g in groups] + [(size, size), (-size, size)]
    means = []
    for _ in range(4000):
        drawn = [pool[i] for i in rng.integers(len(pool), size=len(pool))]
        means.append(sum(d[0] for d in drawn) / sum(d[1] for d in drawn))
    ours = difference_interval(np.array(items), names, seed=0)
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.02)


@pytest.mark.parametrize(
    ("clusters", "size", "difference", "changed", "likeness"),
    [(200, 1, 0.0, 0.1, 0.0), (88, 2, 0.35, 0.45, 0.5), (20, 5, 0.2, 0.4, 0.6), (30, 1, 0.02, 0.02, 0.0)],
)
def test_difference_interval_covers_the_truth(
    clusters: int, size: int, difference: float, changed: float, likeness: float
) -> None:
    """A cluster's items share one outcome in ``likeness`` of the cases. 95% nominal; 300 runs scatter by 1.3 points."""
    rng = np.random.default_rng(1)
    covered = 0
    for run in range(300):
        changes, names = _simulated(rng, clusters, size, difference, changed, likeness)
        interval = difference_interval(changes, names, seed=run, resamples=500)
        covered += interval.low <= difference <= interval.high
    assert covered / 300 > 0.92


def _simulated(
    rng: np.random.Generator, clusters: int, size: int, difference: float, changed: float, likeness: float
) -> tuple[NDArray[np.float64], list[str]]:
    chances = [(changed - difference) / 2, 1 - changed, (changed + difference) / 2]
    codes = np.repeat(np.arange(clusters), size)
    shared = rng.choice([-1.0, 0.0, 1.0], size=clusters, p=chances)
    own = rng.choice([-1.0, 0.0, 1.0], size=len(codes), p=chances)
    return np.where(rng.random(len(codes)) < likeness, shared[codes], own), [str(c) for c in codes]


# Clusters


def test_cluster_sums_add_up_what_belongs_together() -> None:
    values = np.array([[1, 10], [2, 20], [3, 30]])
    assert cluster_sums(values, ["b", "a", "b"]).tolist() == [[2, 20], [4, 40]]


def test_copied_items_add_no_effective_items() -> None:
    values = np.random.default_rng(0).choice([0.0, 1.0], size=400)
    names = _alone(400)
    assert effective_items(values, names) == pytest.approx(400, rel=0.01)
    assert effective_items(np.repeat(values, 5), [n for n in names for _ in range(5)]) == pytest.approx(400, rel=0.01)


def test_clusters_of_independent_items_keep_most_effective_items() -> None:
    values = np.random.default_rng(0).choice([0.0, 1.0], size=1000)
    assert 800 < effective_items(values, [str(i // 2) for i in range(1000)]) <= 1000


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_cluster_counts_as_one_item_when_nothing_varies(value: float) -> None:
    assert effective_items(np.full(6, value), list("aabbcc")) == 3


# Tests


@given(CHANGES)
def test_test_of_independent_items_is_mcnemars(changes: NDArray[np.float64]) -> None:
    fixed, broken = int((changes > 0).sum()), int((changes < 0).sum())
    expected = binomtest(fixed, fixed + broken, 0.5).pvalue if fixed + broken else 1.0
    assert exact_mcnemar(changes, _alone(len(changes))) == pytest.approx(expected, rel=1e-9)


@examples(30)
@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.integers(0, 7)), min_size=1, max_size=25))
def test_test_of_clusters_counts_every_sign_pattern(items: list[tuple[float, int]]) -> None:
    changes, names = np.array([c for c, _ in items]), [str(g) for _, g in items]
    nets = [sum(c for c, g in items if g == group) for group in {g for _, g in items}]
    totals = [abs(np.dot(signs, nets)) for signs in itertools.product([-1, 1], repeat=len(nets))]
    expected = np.mean([t >= abs(sum(nets)) for t in totals])
    assert exact_mcnemar(changes, names) == pytest.approx(expected, rel=1e-9)


def test_one_cluster_is_never_significant() -> None:
    assert exact_mcnemar(np.ones(50), ["same"] * 50) == 1


def test_permutation_test_agrees_with_the_exact_test() -> None:
    changes, names = _simulated(np.random.default_rng(2), 60, 2, 0.15, 0.4, 0.5)
    treatment = cluster_sums(np.clip(changes, 0, 1)[:, None], names)
    control = cluster_sums(np.clip(-changes, 0, 1)[:, None], names)
    p_value = permutation_test(treatment, control, lambda sums: sums[..., 0], seed=0)
    assert p_value == pytest.approx(exact_mcnemar(changes, names), abs=0.015)


def test_equal_arms_give_p_one() -> None:
    table = np.ones((20, 1))
    assert permutation_test(table, table, lambda sums: sums[..., 0], seed=0, trials=100) == 1


# Several contrasts


@pytest.mark.parametrize(
    "p_values", [[0.03], [0.04, 0.01], [0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.01], [0.5, 0.9, 0.0]]
)
def test_holm_equals_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 60))
def test_exact_test_equals_statsmodels_mcnemar(fixed: int, broken: int, same: int) -> None:
    changes = np.array([1.0] * fixed + [-1.0] * broken + [0.0] * same)
    theirs = mcnemar([[same, fixed], [broken, 0]], exact=True).pvalue
    assert exact_mcnemar(changes, _alone(len(changes))) == pytest.approx(theirs, rel=1e-9)
