"""An adapter worse than the incumbent by exactly the margin is rarely said to replace it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from tunewright.evidence.common import Interval
from tunewright.evidence.incumbents import Drop, clustered_interval, measured_drop
from tunewright.metrics import Scores, scorer_of

ROOT = Path(__file__).parents[2]


def _benchmark() -> Any:
    file = ROOT / "benchmarks" / "non_inferiority_calibration.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CALIBRATION = _benchmark()
HARD = [
    CALIBRATION.Setting("exact match", 100, 3, 0.05, 0.0),
    CALIBRATION.Setting("exact match", 300, 1, 0.05, 0.05),
    CALIBRATION.Setting("graded", 100, 3, 0.05, 0.0),
]


@pytest.mark.parametrize("setting", HARD, ids=str)
def test_loss_of_the_margin_is_replaced_in_at_most_5_percent_of_projects(setting: Any) -> None:
    """More than this would come of a true 5% once in a thousand times."""
    assert CALIBRATION.replaced(setting, 400) <= binom.ppf(0.999, 400, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("setting", HARD, ids=str)
def test_loss_of_the_margin_is_replaced_in_at_most_100_of_2000_projects(setting: Any) -> None:
    assert CALIBRATION.replaced(setting, 2000, seed=1) <= 100


def test_simulation_detects_limits_that_accept_too_easily() -> None:
    """The one-sided 95% limits that decide about forgetting exceed 5% here."""
    assert CALIBRATION.by_one_sided_limits(HARD[0], 400) > binom.ppf(0.95, 400, 0.05)


def _scores(name: Any, values: list[float]) -> Scores:
    array = np.array(values)
    return Scores(scorer_of(name, Path()), array, np.column_stack([array, np.ones_like(array)]), {}, 0)


def test_equal_answers_of_many_items_replace_and_of_few_cannot_tell() -> None:
    for items, outcome in ((400, "replace"), (60, "can't tell")):
        same = _scores("exact_match", [1.0] * items)
        drop = measured_drop(same, same, [str(n) for n in range(items)], 0.02, 0)
        assert (drop.value, drop.outcome) == (0.0, outcome)


def test_copied_items_do_not_turn_cant_tell_into_replace() -> None:
    ours, theirs = [1.0] * 60, [1.0] * 59 + [0.0]
    clusters = [str(n) for n in range(60)]
    once = measured_drop(_scores("exact_match", ours), _scores("exact_match", theirs), clusters, 0.02, 0)
    copied = measured_drop(
        _scores("exact_match", ours * 10), _scores("exact_match", theirs * 10), clusters * 10, 0.02, 0
    )
    assert once.outcome == copied.outcome == "can't tell"
    assert copied.interval.high == pytest.approx(once.interval.high, abs=0.005)


def test_clear_loss_keeps_the_incumbent() -> None:
    ours, theirs = _scores("exact_match", [0.0, 1.0] * 60), _scores("exact_match", [1.0] * 120)
    assert measured_drop(ours, theirs, [str(n) for n in range(120)], 0.02, 0).outcome == "keep"


def test_unanswered_items_are_left_out_and_counted() -> None:
    ours, theirs = _scores("exact_match", [1.0] * 4), _scores("exact_match", [1.0, 1.0, 1.0, np.nan])
    theirs.unscored[3] = "refused by a content filter"
    drop = measured_drop(ours, theirs, list("abcd"), 0.02, 0)
    assert (drop.items, drop.clusters, drop.left_out) == (3, 3, {"refused by a content filter": 1})


@pytest.mark.parametrize("name", ["exact_match", "token_f1"])
def test_a_single_cluster_cannot_tell(name: str) -> None:
    same = _scores(name, [1.0] * 200)
    assert measured_drop(same, same, ["a"] * 200, 0.5, 0).outcome == "can't tell"


def test_corpus_scores_are_compared_by_resampled_clusters() -> None:
    """Equal corpora have no difference; a corpus without any match is worse by all of the other's score."""
    scorer = scorer_of("json", Path())
    good = np.array([[2.0, 2.0, 2.0]] * 50)[:, : scorer.columns]
    full = Scores(scorer, np.ones(50), good, {}, 0)
    names = [str(n) for n in range(50)]
    assert measured_drop(full, full, names, 0.02, 0).value == 0.0


def test_interval_is_that_of_a_t_test_with_two_artificial_items() -> None:
    """Against the textbook formula, for independent items."""
    from scipy.stats import t

    changes = np.array([1.0] * 5 + [0.0] * 40 + [-1.0] * 2)
    with_two = np.append(changes, [1.0, -1.0])
    half = t.ppf(0.975, 46) * with_two.std(ddof=1) / np.sqrt(49)
    expected = Interval(low=with_two.mean() - half, high=with_two.mean() + half)
    found = clustered_interval(changes, [str(n) for n in range(47)])
    assert found.low == pytest.approx(expected.low)
    assert found.high == pytest.approx(expected.high)


def test_outcome_needs_the_whole_interval_on_one_side() -> None:
    def outcome(low: float, high: float) -> str:
        return Drop(
            value=0.0, interval=Interval(low=low, high=high), method="", items=1, clusters=1, left_out={}, margin=0.02
        ).outcome

    assert outcome(-0.01, 0.0199) == "replace"
    assert outcome(-0.01, 0.02) == "can't tell"
    assert outcome(0.0201, 0.05) == "keep"
