"""Limits of a paired drop against published values, a brute-force score test and simulated sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import bootstrap, norm, t

from making.property_examples import examples
from tunewright.evidence.common import Interval
from tunewright.evidence.non_inferiority import items_needed, paired_drop, ratio_drop, smallest_margin, tango_limits

Z95 = float(norm.ppf(0.975))


def _alone(items: int) -> list[str]:
    return [f"{place}" for place in range(items)]


def _of_size(size: int, items: int) -> list[str]:
    return [f"{place // size}" for place in range(items)]


def test_limits_are_those_published_for_tangos_interval() -> None:
    """Airway hyper-responsiveness before and after stem cell transplantation (Fagerland et al. 2014, table 2)."""
    low, high = tango_limits(1, 7, 21, Z95)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)


def _brute_force_score(more: int, less: int, items: int, difference: float) -> float:
    """The score statistic with the likeliest table of that difference searched for, not solved for."""

    def unlikely(share: float) -> float:  # of the second kind of discordant pair
        table = [(more, share + difference), (less, share), (items - more - less, 1 - 2 * share - difference)]
        return -sum(count * math.log(max(p, 1e-300)) for count, p in table if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    found = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
    share = min([float(found.x), low, high], key=unlikely)
    variance = items * (2 * share + difference - difference**2)
    return (more - less - items * difference) / math.sqrt(variance)


@given(st.integers(5, 300), st.floats(0, 0.5), st.floats(0, 0.5))
@examples(40)
def test_score_test_is_barely_not_significant_at_the_limits(items: int, first: float, second: float) -> None:
    more, less = int(items * first), int(items * second)
    low, high = tango_limits(more, less, items, 1.645)
    assert low <= (more - less) / items <= high
    if low > -1 + 1e-6:
        assert _brute_force_score(more, less, items, low) == pytest.approx(1.645, abs=0.01)
    if high < 1 - 1e-6:
        assert _brute_force_score(more, less, items, high) == pytest.approx(-1.645, abs=0.01)


def test_unchanged_items_still_have_a_limit() -> None:
    """Without a discordant pair the upper limit is z^2 / (n + z^2), as of a single share that was never seen."""
    z2 = float(norm.ppf(0.95)) ** 2
    drop = paired_drop(np.ones(200), np.ones(200), _alone(200), seed=0)
    assert drop.limit == pytest.approx(z2 / (200 + z2), rel=1e-6)
    assert drop.against(0.02) == "not worse"
    assert drop.against(0.01) == "can't tell"


def test_true_drop_of_the_margin_is_not_worse_in_5_percent_of_sets() -> None:
    rng = np.random.default_rng(0)
    margin, items, sets = 0.1, 150, 1500
    passed = 0
    for _ in range(sets):
        kinds = rng.choice(3, size=items, p=[0.15, 0.05, 0.8])  # lost, won, same: the drop is the margin
        before, after = (kinds == 0).astype(float), (kinds == 1).astype(float)
        passed += paired_drop(before, after, _alone(items), seed=0).against(margin) == "not worse"
    assert 0.03 < passed / sets < 0.07


@pytest.mark.parametrize(("clusters", "size", "like"), [(30, 4, 0.5), (20, 5, 0.7), (50, 10, 0.8)])
def test_clustered_drop_of_the_margin_is_not_worse_in_5_percent_of_sets(clusters: int, size: int, like: float) -> None:
    """And in far more of them where clusters are taken for items."""
    rng = np.random.default_rng(0)
    margin, items, sets = 0.1, clusters * size, 800
    chances = [0.15, 0.05, 0.8]  # lost, won, same: the drop is the margin
    passed = naive = 0
    for _ in range(sets):
        shared = np.repeat(rng.choice(3, size=clusters, p=chances), size)
        kinds = np.where(rng.random(items) < like, shared, rng.choice(3, size=items, p=chances))
        before, after = (kinds == 0).astype(float), (kinds == 1).astype(float)
        passed += paired_drop(before, after, _of_size(size, items), seed=0).against(margin) == "not worse"
        naive += paired_drop(before, after, _alone(items), seed=0).against(margin) == "not worse"
    assert 0.03 < passed / sets < 0.07
    assert naive / sets > 0.09


def test_copied_items_add_no_evidence() -> None:
    before, after = np.array([1.0] * 12 + [0.0] * 188), np.array([0.0] * 12 + [1.0] * 8 + [0.0] * 180)
    once = paired_drop(before, after, _alone(200), seed=0)
    copied = paired_drop(np.repeat(before, 5), np.repeat(after, 5), _of_size(5, 1000), seed=0)
    assert copied.value == once.value
    assert once.limit <= copied.limit < once.limit + 0.001, "Student's t of 199 is a little wider than the normal"
    assert "effective items" in copied.method


def test_unchanged_clusters_count_as_one_item_each() -> None:
    drop = paired_drop(np.ones(200), np.ones(200), _of_size(4, 200), seed=0)
    t2 = float(t.ppf(0.95, 49)) ** 2
    assert drop.limit == pytest.approx(t2 / (50 + t2), rel=1e-6)


def test_single_cluster_shows_nothing() -> None:
    drop = paired_drop(np.ones(50), np.zeros(50), ["one"] * 50, seed=0)
    assert (drop.value, drop.limit, drop.against(0.02)) == (1.0, 1.0, "can't tell")


def test_graded_scores_of_clusters_are_resampled_by_cluster() -> None:
    """Clusters of one size: scipy's bootstrap of the clusters' means."""
    rng = np.random.default_rng(4)
    before = rng.random(40).repeat(5) * 0.5 + rng.random(200) * 0.1
    after = np.zeros(200)
    drop = paired_drop(before, after, _of_size(5, 200), seed=0)
    means = before.reshape(40, 5).mean(axis=1)
    reference = bootstrap((means,), np.mean, n_resamples=10_000, method="percentile", random_state=3)
    assert drop.interval.low == pytest.approx(reference.confidence_interval.low, abs=0.005)
    assert drop.interval.high == pytest.approx(reference.confidence_interval.high, abs=0.005)


def test_items_needed_has_the_stated_power() -> None:
    margin, changes = 0.1, 0.2
    items = items_needed(margin, changes)
    assert items == pytest.approx(6.18 * changes / margin**2, rel=0.01)
    rng = np.random.default_rng(1)
    passed = 0
    for _ in range(1000):
        kinds = rng.choice(3, size=items, p=[changes / 2, changes / 2, 1 - changes])
        drop = paired_drop((kinds == 0).astype(float), (kinds == 1).astype(float), _alone(items), seed=0)
        passed += drop.against(margin) == "not worse"
    assert 0.75 < passed / 1000 < 0.87
    assert smallest_margin(items, changes) == pytest.approx(margin, rel=0.01)


def test_graded_scores_get_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.random(80), rng.random(80)
    drop = paired_drop(before, after, _alone(80), seed=0)
    reference = bootstrap((before - after,), np.mean, n_resamples=10_000, method="percentile", random_state=3)
    assert drop.value == pytest.approx(float((before - after).mean()))
    assert drop.interval.low == pytest.approx(reference.confidence_interval.low, abs=0.005)
    assert drop.interval.high == pytest.approx(reference.confidence_interval.high, abs=0.005)
    assert drop.interval.low < drop.lower < drop.value < drop.limit < drop.interval.high


def test_texts_count_by_their_tokens() -> None:
    sums = np.array([[10.0, 100.0], [0.0, 1.0], [0.0, 1.0]])
    assert ratio_drop(sums, seed=0).value == pytest.approx(10 / 102)


@pytest.mark.parametrize(
    ("low", "limit", "result"), [(-0.01, 0.019, "not worse"), (-0.01, 0.02, "can't tell"), (0.021, 0.05, "worse")]
)
def test_drop_is_compared_with_its_margin(low: float, limit: float, result: str) -> None:
    drop = paired_drop(np.ones(10), np.ones(10), _alone(10), seed=0)
    changed = type(drop)(0.0, Interval(low=low, high=1.0), low, limit, "")
    assert changed.against(0.02) == result
