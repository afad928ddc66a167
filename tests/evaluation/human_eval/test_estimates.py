"""Estimates for all items against PPI++ and textbook formulas, and agreement against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score

from tunewright.evaluation.human_eval.results import Design, agreement, estimate

Floats = NDArray[np.float64]


def _simple(items: int, reviewed: int, strata: list[str] | None = None) -> Design:
    """Items that are each a cluster, the first of which were reviewed, without the made-up clusters."""
    design = Design(
        strata or ["one"] * items,
        np.arange(items) < reviewed,
        np.zeros(items, dtype=bool),
        [str(i) for i in range(items)],
    )
    design.extra[:] = 0
    return design


def _judged_by_ppi_python() -> tuple[Floats, Floats, int]:
    rng = np.random.default_rng(7)
    y = rng.integers(-1, 2, 240).astype(float)
    f = np.where(rng.random(240) < 0.7, y, rng.integers(-1, 2, 240)).astype(float)
    return y, f, 60


# ppi_mean_pointestimate and ppi_mean_ci (alpha 0.05) of ppi-python 0.2.3 on these numbers, by lam.
PPI_PYTHON = {
    0.0: (0.11666667, -0.08518566, 0.31851899),
    0.5: (0.09444444, -0.06482887, 0.25371776),
}


@pytest.mark.parametrize("lam", sorted(PPI_PYTHON))
def test_estimate_equals_ppi_plus_plus_for_one_stratum_of_independent_items(lam: float) -> None:
    y, f, reviewed = _judged_by_ppi_python()
    # ppi-python takes the judge's mean over the items that were not reviewed, we over all: L = lam * N / (N - n).
    found = estimate(_simple(240, reviewed), y, f, tuning=lam * 240 / (240 - reviewed))
    value, low, high = PPI_PYTHON[lam]
    assert found.value == pytest.approx(value, abs=1e-8)
    # Ours has C / (C - 1) of 242 clusters, theirs none; they take the judge's variance about two means, we about one.
    assert found.interval.high - found.interval.low == pytest.approx((high - low) * np.sqrt(242 / 241), rel=1e-4)


def test_tuned_lambda_equals_ppi_python_when_plug_in_means_agree() -> None:
    y, f, reviewed = _judged_by_ppi_python()
    found = estimate(_simple(240, reviewed), y, f)
    # ppi-python's own lam gives 0.09209641 on these numbers, so about 0.553.
    assert found.value == pytest.approx(0.09209641, abs=2e-3)
    assert found.tuning * 180 / 240 == pytest.approx(0.553, abs=0.05)


def test_tuned_lambda_minimizes_the_variance() -> None:
    y, f, reviewed = _judged_by_ppi_python()
    strata = ["a" if i % 3 else "b" for i in range(240)]
    design = Design(strata, np.arange(240) < reviewed, np.zeros(240, dtype=bool), [str(i // 2) for i in range(240)])
    widths = {}
    for tuning in np.linspace(0, 1, 101):
        interval = estimate(design, y, f, tuning=float(tuning)).interval
        widths[float(tuning)] = interval.high - interval.low
    assert estimate(design, y, f).tuning == pytest.approx(min(widths, key=lambda t: widths[t]), abs=0.011)


def test_classical_variance_equals_two_phase_sampling() -> None:
    """Cochran 1977, "Sampling Techniques", section 12.2: sum W^2 s^2 / n + sum W (mean_h - mean)^2 / N."""
    rng = np.random.default_rng(1)
    strata = ["a"] * 120 + ["b"] * 80 + ["c"] * 40
    reviewed = np.zeros(240, dtype=bool)
    reviewed[:24], reviewed[120:136], reviewed[200:210] = True, True, True
    y = rng.integers(-1, 2, 240).astype(float)
    design = Design(strata, reviewed, np.zeros(240, dtype=bool), [str(i) for i in range(240)])
    design.extra[:] = 0
    parts = [(y[np.array(strata) == h][reviewed[np.array(strata) == h]], strata.count(h) / 240) for h in "abc"]
    mean = sum(w * part.mean() for part, w in parts)
    variance = sum(w**2 * part.var() / len(part) + w * (part.mean() - mean) ** 2 / 240 for part, w in parts)
    found = estimate(design, y)
    assert found.value == pytest.approx(mean)
    half = 1.959964 * np.sqrt(variance * 242 / 241)
    assert (found.interval.low, found.interval.high) == pytest.approx((mean - half, mean + half), rel=1e-6)


def test_interval_equals_bonett_price_for_one_fully_reviewed_stratum() -> None:
    y = np.array([1.0] * 30 + [0.0] * 14 + [-1.0] * 6)
    design = Design(["one"] * 50, np.ones(50, dtype=bool), np.zeros(50, dtype=bool), [str(i) for i in range(50)])
    # The published interval: (b + 1 - (c + 1)) / (n + 2) and its variance with the two made-up items.
    centre = 24 / 52
    variance = ((31 + 7) / 52 - centre**2) / 52
    found = estimate(design, y)
    half = 1.959964 * np.sqrt(variance * 52 / 51)
    assert found.value == 24 / 50
    assert (found.interval.low, found.interval.high) == pytest.approx((centre - half, centre + half), rel=0.02)


def test_interval_has_a_width_when_all_verdicts_agree() -> None:
    design = Design(["one"] * 200, np.arange(200) < 50, np.zeros(200, dtype=bool), [str(i) for i in range(200)])
    found = estimate(design, np.ones(200))
    assert found.value == found.interval.high == 1
    assert found.interval.low < 0.9


def test_constant_judge_does_not_change_the_estimate() -> None:
    y, _, reviewed = _judged_by_ppi_python()
    design = _simple(240, reviewed)
    assert estimate(design, y, np.ones(240)) == estimate(design, y)


def test_items_of_one_cluster_count_once() -> None:
    rng = np.random.default_rng(3)
    y = rng.choice([-1.0, 1.0], 60).repeat(4)
    reviewed = np.ones(240, dtype=bool)
    none = np.zeros(240, dtype=bool)
    apart = estimate(Design(["one"] * 240, reviewed, none, [str(i) for i in range(240)]), y)
    together = estimate(Design(["one"] * 240, reviewed, none, [str(i // 4) for i in range(240)]), y)
    widths = [e.interval.high - e.interval.low for e in (apart, together)]
    assert widths[1] / widths[0] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("skill", "gain"), [(0.9, 0.85), (0.0, 1.03)])
def test_interval_covers_the_truth_and_a_good_judge_narrows_it(skill: float, gain: float) -> None:
    """300 worlds in which the judge favours the treatment; 95% of intervals have to hold the truth."""
    rng = np.random.default_rng(5)
    shares, lean = np.array([0.4, 0.2, 0.4]), ((0.1, 0.2, 0.7), (0.6, 0.3, 0.1), (0.3, 0.4, 0.3))
    truth = sum(w * (p[2] - p[0]) for w, p in zip(shares, lean, strict=True))
    covered, widths, worlds = np.zeros(2), np.zeros(2), 300
    none, names = np.zeros(250, dtype=bool), [str(i) for i in range(250)]
    for _ in range(worlds):
        stratum = rng.choice(3, 250, p=shares)
        y = (rng.random(250)[:, None] > np.cumsum(lean, axis=1)[stratum, :2]).sum(axis=1) - 1.0
        f = np.where(rng.random(250) < skill, y, rng.integers(0, 2, 250)).astype(float)
        reviewed = np.zeros(250, dtype=bool)
        for each, asked in enumerate((20, 10, 20)):
            reviewed[rng.permutation(np.flatnonzero(stratum == each))[:asked]] = True
        design = Design([str(s) for s in stratum], reviewed, none, names)
        found = [estimate(design, y), estimate(design, y, f)]
        covered += [e.interval.low <= truth <= e.interval.high for e in found]
        widths += [e.interval.high - e.interval.low for e in found]
    assert (np.abs(covered / worlds - 0.95) < 0.03).all()
    assert widths[1] / widths[0] < gain


SAID = st.sampled_from((-1, 0, 1))


@given(st.lists(st.tuples(SAID, SAID), min_size=2, max_size=60))
def test_kappa_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = agreement(("a", "b"), first, second, [str(i) for i in range(len(pairs))], 0, resamples=50)
    assert found.agreed == sum(a == b for a, b in pairs)
    if len({*first, *second}) == 1:
        assert found.kappa is None
    else:
        assert found.kappa == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_agreement_interval_resamples_clusters() -> None:
    rng = np.random.default_rng(4)
    first = rng.integers(-1, 2, 60)
    second = np.where(rng.random(60) < 0.7, first, rng.integers(-1, 2, 60))
    clusters = np.arange(60) // 3
    found = agreement(("a", "b"), first.tolist(), second.tolist(), [f"c{c:02}" for c in clusters], 0)
    drawn = []
    for _ in range(1200):
        rows = np.concatenate([np.flatnonzero(clusters == c) for c in rng.integers(20, size=20)])
        a, b = first[rows], second[rows]
        chance = sum((a == kind).mean() * (b == kind).mean() for kind in (-1, 0, 1))
        drawn.append(((a == b).mean() - chance) / (1 - chance))
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx(
        tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02
    )


def test_agreement_has_no_interval_when_raters_always_agree() -> None:
    found = agreement(("a", "b"), [1, 0, -1], [1, 0, -1], ["x", "y", "z"], 0)
    assert (found.kappa, found.interval) == (1, None)
