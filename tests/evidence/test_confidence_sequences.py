"""Confidence sequences against confseq, glide-py, the mixture's integral, enumeration and simulation."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad

from tunewright.evidence.confidence_sequences import (
    FEWEST_UNITS,
    asymptotic_boundary,
    confidence_sequence,
    empirical_bernstein_boundary,
    largest_difference,
    unit_differences,
)
from tunewright.evidence.sequence_power import shadow_needs
from tunewright.evidence.statistics import Floats

VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("sequence_vectors.json").read_text())


def _draw(rng: np.random.Generator, runs: int, units: int, differ: Floats | float, mean: Floats | float) -> Floats:
    """Draw differences of -1, 0 and 1: [runs, units]."""
    at = rng.random((runs, units))
    return np.where(at < (differ + mean) / 2, 1.0, np.where(at < differ, -1.0, 0.0))


def _misses(values: Floats, mean: Floats | float) -> float:
    """Return the share of runs in which the bounds exclude the true running mean at any look."""
    found = confidence_sequence(values)
    return float(((found.low > mean) | (found.high < mean)).any(axis=-1).mean())


@pytest.mark.parametrize("case", VECTORS["confseq"]["cases"])
def test_empirical_bernstein_boundary_equals_confseq(case: dict[str, Any]) -> None:
    squares = np.array(VECTORS["confseq"]["squares"])
    ours = empirical_bernstein_boundary(squares, case["alpha"], case["largest"], case["tightest_at"])
    np.testing.assert_allclose(ours, case["bounds"], rtol=1e-6)


@pytest.mark.parametrize("case", VECTORS["glide-py"]["cases"])
def test_asymptotic_boundary_equals_glide(case: dict[str, Any]) -> None:
    batches = np.array(VECTORS["glide-py"]["batches"], dtype=float)
    variance = np.cumsum(batches.var(axis=1, ddof=1) / batches.shape[1])
    count = np.arange(1, len(batches) + 1)
    boundary = asymptotic_boundary(variance, case["alpha"], float(variance[case["tightest_at_batch"] - 1]))
    np.testing.assert_allclose((np.cumsum(batches.mean(axis=1)) - boundary) / count, case["low"], rtol=1e-9)


@pytest.mark.parametrize("squares", [0.0, 3.0, 60.0])
@pytest.mark.parametrize("largest", [1.0, 4.0])
def test_mixture_reaches_one_over_alpha_at_the_empirical_bernstein_boundary(squares: float, largest: float) -> None:
    alpha, tightest_at = 0.025, 50.0
    boundary = float(empirical_bernstein_boundary(np.array([squares]), alpha, largest, tightest_at)[0]) / largest
    squares, log_term = squares / largest**2, -2 * math.log(2 * alpha)
    rho = tightest_at / largest**2 / (log_term + math.log1p(log_term))

    def prior(x: float) -> float:
        """Return the gamma density of 1 - x with shape and rate rho, up to a constant."""
        return float((1 - x) ** (rho - 1) * np.exp(-rho * (1 - x)))

    def capital(x: float) -> float:
        """Return the supermartingale of one x: exp(x s - psi(x) v)."""
        return float(np.exp(x * boundary + (np.log1p(-x) + x) * squares)) * prior(x)

    places = {"points": [0.9, 0.99, 0.999, 0.99999], "limit": 500}
    mixture = quad(capital, 0, 1, **places)[0] / quad(prior, 0, 1, **places)[0]
    assert mixture == pytest.approx(1 / alpha, rel=1e-4)


@pytest.mark.parametrize("largest", [1.0, 2.0, 9.0, 39.0])
def test_empirical_bernstein_boundary_is_wider_than_the_asymptotic_one_everywhere(largest: float) -> None:
    squares = np.concatenate([[0.0], np.geomspace(1e-3, 1e6, 400)])
    wider = empirical_bernstein_boundary(squares, 0.025, largest)
    assert np.isfinite(wider).all()
    assert (wider > asymptotic_boundary(squares, 0.025)).all()


@pytest.mark.parametrize("largest", [1.0, 4.0])
def test_sequence_has_both_kinds_of_bounds_around_its_running_mean(largest: float) -> None:
    values = np.array([1.0, 0, 0, -1, 0.5] * 40)
    found = confidence_sequence(values, largest=largest)
    for look in (0, 3, FEWEST_UNITS - 2, FEWEST_UNITS - 1, 199):
        so_far = values[: look + 1]
        if len(so_far) < FEWEST_UNITS:
            radius = empirical_bernstein_boundary(np.array([(so_far**2).sum()]), 0.025, largest)[0] / len(so_far)
        else:
            radius = asymptotic_boundary(np.array([so_far.var() * len(so_far)]), 0.025)[0] / len(so_far)
        mean = so_far.mean()
        assert found.means[look] == pytest.approx(mean)
        assert found.low[look] == pytest.approx(max(mean - radius, -largest))
        assert found.high[look] == pytest.approx(min(mean + radius, largest))


@pytest.mark.parametrize("differ", [0.05, 0.3, 1.0])
def test_false_stops_stay_below_alpha_with_a_look_at_every_unit(differ: float) -> None:
    values = _draw(np.random.default_rng(1), 600, 1500, differ, 0.0)
    assert _misses(values, 0.0) <= 0.05


def test_bounds_cover_the_running_mean_of_drifting_traffic() -> None:
    rng = np.random.default_rng(2)
    units = np.arange(1, 1201)
    mean = 0.3 * np.sin(units / 60)
    differ = 0.5 + 0.2 * np.cos(units / 90)
    assert _misses(_draw(rng, 600, 1200, differ, mean), np.cumsum(mean) / units) <= 0.05


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_bounds_for_few_units_hold_where_asymptotic_bounds_fail(share: float) -> None:
    """Frequent small gains and rare losses of 1 have the mean 0 and look like gains until the first loss."""
    rng = np.random.default_rng(3)
    values = np.where(rng.random((2000, FEWEST_UNITS - 1)) < share, -1.0, share / (1 - share))
    found = confidence_sequence(values, tightest_at=2.0)
    assert ((found.low > 0) | (found.high < 0)).any(axis=1).mean() <= 0.05
    asymptotic = asymptotic_boundary(np.cumsum(values**2, axis=1), 0.025, 2.0)
    assert (np.abs(np.cumsum(values, axis=1)) > asymptotic).any(axis=1).mean() > 0.15


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.01, 0.2, "better"), (-0.02, 0.1, "not worse"), (-0.02, -0.01, "worse"), (-0.1, 0.1, "can't tell")],
)
def test_outcome_follows_the_bounds_and_the_margin(low: float, high: float, expected: str) -> None:
    found = confidence_sequence(np.zeros(1))
    bounds = type(found)(found.means, np.array([low]), np.array([high]))
    assert bounds.outcome(0, margin=0.03) == expected


def test_unit_counts_once_by_the_mean_of_its_answers() -> None:
    found = unit_differences(["b", "a", "b", "b", "a"], np.array([1.0, 0.0, 0.0, -0.25, -1.0]))
    np.testing.assert_allclose(found, [0.25, -0.5])


def test_judge_without_labels_counts_nothing() -> None:
    units = [str(unit) for unit in range(50)]
    found = unit_differences(units, np.full(50, np.nan), np.ones(50), labelled=0.2)
    assert not found.any()


def test_corrected_differences_are_unbiased_whatever_the_judge_says() -> None:
    """Expectation over all patterns of labels and of sampled units, by enumeration."""
    units = ["a", "a", "b", "c", "c", "d"]
    human = np.array([1.0, -1, 0.5, -1, 0, 1])
    judge = np.array([1.0, 1, -1, -1, 0, 0.5])
    labelled = np.array([0.5, 0.5, 0.25, 0.5, 1, 0.75])
    sampled = np.array([0.5, 0.5, 1, 0.25, 0.25, 1])
    total = np.zeros(4)
    for in_sample in itertools.product([False, True], repeat=4):
        asked = np.array(in_sample)[[0, 0, 1, 2, 2, 3]]
        chance_of_sample = np.prod(np.where(in_sample, sampled[[0, 2, 3, 5]], 1 - sampled[[0, 2, 3, 5]]))
        for pattern in itertools.product([False, True], repeat=6):
            has_label = np.array(pattern)
            chance = chance_of_sample * np.prod(np.where(has_label, labelled, 1 - labelled))
            known = np.where(has_label & asked, human, np.nan)
            total += chance * unit_differences(units, known, judge * asked, labelled, sampled)
    np.testing.assert_allclose(total, [0, 0.5, -0.5, 1], atol=1e-12)


def test_good_judge_narrows_the_bounds_and_a_random_one_does_not_widen_them() -> None:
    rng = np.random.default_rng(4)
    truth = _draw(rng, 1, 6000, 0.3, 0.1)[0]
    units = [str(unit) for unit in range(6000)]
    chance = np.where(truth != 0, 0.2, 1.0)
    human = np.where(rng.random(6000) < chance, truth, np.nan)
    good = np.where(rng.random(6000) < 0.1, -truth, truth)
    coin = rng.choice([-1.0, 1.0], 6000) * (truth != 0)
    widths = {}
    for name, judge in {"none": None, "good": good, "coin": coin}.items():
        values = unit_differences(units, human, judge, chance)
        assert np.abs(values).max() <= largest_difference(0.2, judge=judge is not None)
        found = confidence_sequence(values, largest=largest_difference(0.2, judge=judge is not None))
        widths[name] = found.high[-1] - found.low[-1]
    assert widths["good"] < 0.75 * widths["none"]
    assert widths["coin"] < 1.02 * widths["none"]


def _stops(values: Floats) -> Floats:
    """Return the first look of each run at which its candidate is worse."""
    worse = confidence_sequence(values).high < 0
    assert worse.any(axis=1).all()
    stops: Floats = worse.argmax(axis=1) + 1.0
    return stops


def test_planned_requests_equal_the_quantiles_of_simulated_shadows() -> None:
    needed = shadow_needs([(1, 1)] * 12 + [(1, 0)] * 88, 0.05)
    stops = _stops(_draw(np.random.default_rng(5), 1500, 2500, 0.12, -0.05))
    assert needed.median_requests == pytest.approx(np.quantile(stops, 0.5), rel=0.12)
    assert needed.requests == pytest.approx(np.quantile(stops, 0.8), rel=0.12)
    assert needed.median_labels == pytest.approx(0.12 * np.quantile(stops, 0.5), rel=0.15)


def test_planned_requests_and_labels_count_all_of_a_unit() -> None:
    single = shadow_needs([(1, 1), (1, 0)], 0.1)
    triple = shadow_needs([(3, 3), (3, 0)], 0.1)
    assert single.median_requests is not None
    assert triple.median_requests == pytest.approx(3 * single.median_requests, rel=0.03)
    assert triple.median_labels == pytest.approx(0.5 * 3 * single.median_requests, rel=0.1)


def test_plan_of_a_difference_that_too_few_answers_allow_is_empty() -> None:
    units = [(1, 1)] * 3 + [(1, 0)] * 97
    assert shadow_needs(units, 0.03).requests is not None
    assert shadow_needs(units, 0.05).requests is None
    assert shadow_needs([(4, 0)], 0.03).labels is None
