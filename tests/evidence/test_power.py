"""Power and the minimum detectable effect, of items and of a dataset's held-out splits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.power import NormalIndPower

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.data.splits import Split, assign_splits
from tunewright.evidence.power import (
    AIM,
    USUAL,
    DetectableEffects,
    SplitPower,
    detectable,
    minimum_detectable_effect,
    power,
    require_significance,
    split_power,
    split_power_text,
    warn_of_few_dev_clusters,
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


def test_detectable_effects_state_their_assumption_and_count_clusters_once() -> None:
    message = DetectableEffects("test", 196, 146)
    assert message.effects[0.2] == minimum_detectable_effect(146, 0.2)
    assert message.as_dict()["assumed"][1] == {"changed": 0.2, "minimum_detectable_effect": message.effects[0.2]}


class _Warned(LogReporter):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


def _foresee(tests: int, rows_each: int = 1, others: int = 50) -> SplitPower:
    rows: dict[Split, int] = {"train": others * rows_each, "dev": tests * rows_each, "test": tests * rows_each}
    return split_power(rows, {"train": others, "dev": tests, "test": tests}, 0.1)


@pytest.mark.parametrize("clusters", range(1, 12))
def test_split_power_is_significant_exactly_where_unanimous_clusters_are(clusters: int) -> None:
    best = exact_mcnemar(np.ones(clusters), [str(i) for i in range(clusters)])
    assert _foresee(clusters).significant == (best < 0.05)


def _clusters_in_test(large: int, single: int) -> tuple[dict[Split, int], dict[Split, int]]:
    """Rows and clusters by split, of clusters of 12 rows that were there before and single rows that are new."""
    old = {f"large {i}": [f"{i}-{k}" for k in range(12)] for i in range(large)}
    data = DataConfig()
    former = {key: split for name, split in assign_splits(old, {}, data, 0).items() for key in old[name]}
    clusters = {**old, **{f"single {i}": [f"single {i}"] for i in range(single)}}
    splits = assign_splits(clusters, former, data, 0)
    names: tuple[Split, ...] = ("train", "dev", "test")
    rows = {split: sum(len(clusters[n]) for n, s in splits.items() if s == split) for split in names}
    return rows, {split: sum(s == split for s in splits.values()) for split in names}


@pytest.mark.parametrize("large", [15, 30, 50])
def test_suggested_rows_make_the_test_split_large_enough(large: int) -> None:
    rows, clusters = _clusters_in_test(large, 0)
    reported = split_power(rows, clusters, DataConfig().test_size)
    assert not reported.significant
    for needed, goal in ((reported.rows_to_significant, 6), (reported.rows_to_aim, 37)):
        assert _clusters_in_test(large, needed)[1]["test"] == pytest.approx(goal, abs=1)
        assert split_power(*_clusters_in_test(large, needed + 20), DataConfig().test_size).clusters["test"] >= goal
        assert _clusters_in_test(large, needed - 20)[1]["test"] < goal


def test_split_power_aim_has_80_percent_power() -> None:
    rows = _foresee(6).rows_to_aim
    assert rows == 10 * 37 - 62
    assert power(36, USUAL, AIM) < 0.8 <= power(37, USUAL, AIM)


def test_large_test_split_needs_no_rows() -> None:
    reported = _foresee(100)
    assert (reported.rows_to_significant, reported.rows_to_aim) == (0, 0)
    assert "100 test clusters" in split_power_text(reported) and "12 points" in split_power_text(reported)


def test_run_without_a_possible_verdict_is_refused_unless_forced() -> None:
    reporter = _Warned()
    with pytest.raises(UserError, match="5 test clusters: no difference can be significant") as refused:
        require_significance(_foresee(5), force=False, reporter=reporter)
    assert "--force" in str(refused.value.fix)
    require_significance(_foresee(5), force=True, reporter=reporter)
    (warning,) = reporter.warned
    assert 'the verdict will be "can\'t tell"' in warning
    require_significance(_foresee(6), force=False, reporter=reporter)
    assert len(reporter.warned) == 1


@pytest.mark.parametrize(
    ("sizes", "reported"),
    [
        ([43, 30, 7, 2, 1, 1], "6 dev clusters of 43, 30, 7, 2, 1, … rows: dev is worth 2.5 clusters of equal"),
        ([5], "1 dev cluster of 5 rows: dev is worth 1 cluster of equal size"),
        ([4, 4, 4, 4, 4], "5 dev clusters of 4, 4, 4, 4, 4 rows: dev is worth 5 clusters of equal size"),
        ([3] * 6, ""),
    ],
)
def test_few_or_dominating_dev_clusters_are_a_warning(sizes: list[int], reported: str) -> None:
    reporter = _Warned()
    warn_of_few_dev_clusters(sizes, reporter)
    assert [reported in warning for warning in reporter.warned] == [True] * bool(reported)
