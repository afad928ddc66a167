"""Power and detectable differences against statsmodels, published tables and simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.power import NormalIndPower

from tunewright.evidence.power import (
    DetectableEffects,
    detectable,
    detectable_effects_text,
    minimum_detectable_effect,
    power,
)
from tunewright.evidence.statistics import exact_mcnemar


@pytest.mark.parametrize(
    ("items", "changed", "effect"),
    [
        (1960, 0.1, 0.02),
        (3922, 0.2, 0.02),
        (870, 0.1, 0.03),
        (626, 0.2, 0.05),
        (940, 0.3, 0.05),
        (155, 0.2, 0.10),
        (233, 0.3, 0.10),
        (102, 0.3, 0.15),
    ],
)
def test_detectable_effect_matches_published_sample_sizes(items: int, changed: float, effect: float) -> None:
    assert minimum_detectable_effect(items, changed) == pytest.approx(effect, rel=0.005)


@given(st.floats(1, 1e5), st.floats(0, 1))
def test_more_items_never_hide_a_difference(items: float, changed: float) -> None:
    effect = minimum_detectable_effect(items, changed)
    assert 0 < minimum_detectable_effect(items * 2, changed) <= effect <= 1


@given(st.floats(20, 1e4), st.floats(0.05, 0.9))
def test_detectable_effect_has_the_requested_power(items: float, changed: float) -> None:
    effect = minimum_detectable_effect(items, changed)
    if effect < changed:
        assert power(items, changed, effect) == pytest.approx(0.8, abs=1e-6)


def test_detectable_effect_is_found_in_80_percent_of_experiments() -> None:
    effect = minimum_detectable_effect(200, 0.2)
    rng = np.random.default_rng(0)
    chances = [(0.2 - effect) / 2, 0.8, (0.2 + effect) / 2]
    names = [str(n) for n in range(200)]
    found = [exact_mcnemar(rng.choice([-1.0, 0.0, 1.0], 200, p=chances), names) < 0.05 for _ in range(400)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.08)  # the exact test is a little shy


@given(st.floats(10, 1e4), st.floats(0.05, 1))
def test_detectable_mean_difference_equals_statsmodels(items: float, deviation: float) -> None:
    effect = detectable(deviation / items**0.5)
    if effect < 1:
        theirs = NormalIndPower(ddof=0).power(effect / deviation, nobs1=items, alpha=0.05, ratio=0)
        assert theirs == pytest.approx(0.8, abs=1e-3)  # theirs counts the other tail too


def test_split_power_states_its_assumption_and_counts_clusters_once() -> None:
    message = DetectableEffects("test", 196, 146)
    assert message.effects[0.2] == minimum_detectable_effect(146, 0.2)
    text = detectable_effects_text(message, "right or wrong", 0.02)
    assert "The test split's 196 items in 146 clusters show a true difference of 10.3 points or more" in text
    assert "if 20% of the items change between two arms: an assumption" in text
    assert "With a margin of 2 points a fine-tune has to gain about 12 to ship." in text
    assert "rough guide" in detectable_effects_text(message, "corpus", 0.02)
    assert message.as_dict()["assumed"][1] == {"changed": 0.2, "minimum_detectable_effect": message.effects[0.2]}


def test_detectable_effects_text_names_no_points_when_nothing_is_detectable() -> None:
    text = detectable_effects_text(DetectableEffects("test", 40, 4), "corpus", 0.02)
    assert "no difference can be shown" in text
    assert "points" not in text
    assert "to ship" not in text


def test_detectable_effects_text_asks_for_no_gain_above_100_points() -> None:
    text = detectable_effects_text(DetectableEffects("test", 40, 8), "corpus", 0.3)
    assert "With a margin of 30 points no gain would be enough to ship." in text
