"""Controls of a suite of general ability, and what the verdict makes of suites that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
from scipy.stats import binomtest

from making.evidence import make_evidence, make_items, with_contrast
from tunewright.evaluation.benchmarks.bench import above_chance, above_floor, derangement, lower_limit, suite_of
from tunewright.evidence.benchmarks import Benchmarks, Control, Suite, standing
from tunewright.evidence.common import Interval
from tunewright.evidence.verdict import verdict

# Controls


def test_dealt_is_a_permutation_without_fixed_points() -> None:
    for count in (2, 3, 50):
        given = derangement(count, seed=count)
        assert sorted(given) == list(range(count))
        assert all(place != other for place, other in enumerate(given))


def _alone(scores: Any) -> list[str]:
    return [f"{place}" for place in range(len(scores))]


def _fours(scores: Any) -> list[str]:
    return [f"{place // 4}" for place in range(len(scores))]


def test_lower_limit_is_wilsons() -> None:
    scores = np.array([1.0] * 37 + [0.0] * 63)
    reference = binomtest(37, 100).proportion_ci(0.9, method="wilson")
    assert lower_limit(scores, _alone(scores)) == pytest.approx(reference.low)
    fourfold = np.repeat(scores, 4)
    assert lower_limit(fourfold, _fours(fourfold)) == pytest.approx(reference.low, abs=0.001), "copies prove nothing"


def test_suite_without_room_to_fall_fails_its_controls() -> None:
    high, low = np.array([1.0] * 60 + [0.0] * 40), np.array([1.0] * 27 + [0.0] * 73)
    own = _alone(high)
    assert above_chance(high, own, 0.25, 0.02).passed
    assert not above_chance(low, own, 0.25, 0.02).passed
    assert above_floor("shuffled", high, low, own, 0.02, seed=0).passed
    assert not above_floor("shuffled", low, low, own, 0.02, seed=0).passed
    assert not above_chance(np.zeros(40), own[:40], 0.0, 0.02).passed, "a suite pinned at 0 cannot fall"
    some = np.array([1.0] * 36 + [0.0] * 64)
    assert above_chance(some, own, 0.25, 0.02).passed
    assert not above_chance(some, _fours(some), 0.25, 0.02).passed, "25 clusters are not 100 items"


# What follows


Named = Literal["not worse", "worse", "can't tell"]


def _made(result: Named, *, margin: float | None = 0.02, passed: bool = True, name: str = "arc") -> Suite:
    drops = {"not worse": (0.0, -0.012, 0.012), "worse": (0.1, 0.05, 0.15), "can't tell": (0.01, -0.03, 0.05)}
    drop, low, high = drops[result]
    return Suite(
        name=name,
        kind="choices",
        unit="share",
        metric="acc_norm",
        items=500,
        base=0.6,
        tuned=0.6 - drop,
        drop=drop,
        interval=Interval(low=low, high=high),
        limit=high,
        method="",
        margin=margin,
        changed=0.1,
        items_needed=1546,
        controls=(Control(name="guessing", score=0.6, items=500, wanted="more", passed=passed),),
        result=result if margin is not None else "can't tell",
    )


def _general(*suites: Suite) -> Benchmarks:
    return Benchmarks(id="0" * 12, adapter="a", suites=suites, lineage={})


SHIP = with_contrast(make_evidence(make_items(60)), low=0.27, difference=0.35, high=0.43, p_value=1e-9)
OPEN = with_contrast(SHIP, low=-0.02, difference=0.01, high=0.04, p_value=0.5)
NO = with_contrast(SHIP, low=-0.02, difference=0.0, high=0.02, p_value=1.0)


@pytest.mark.parametrize(
    ("suites", "ship", "unknown", "no", "code"),
    [
        ([], "ship", "can't tell", "don't ship", 0),
        ([_made("not worse")], "ship", "can't tell", "don't ship", 0),
        ([_made("can't tell")], "can't tell", "can't tell", "don't ship", 4),
        ([_made("worse")], "don't ship", "don't ship", "don't ship", 3),
        ([_made("not worse"), _made("can't tell", name="b")], "can't tell", "can't tell", "don't ship", 4),
        ([_made("can't tell"), _made("worse", name="b")], "don't ship", "don't ship", "don't ship", 3),
        # What fails a control, or was given no margin, never decides.
        ([_made("worse", passed=False)], "ship", "can't tell", "don't ship", 4),
        ([_made("worse", passed=False), _made("not worse", name="b")], "ship", "can't tell", "don't ship", 0),
        ([_made("worse", margin=None)], "ship", "can't tell", "don't ship", 0),
    ],
)
def test_regression_decision_follows_the_table(
    suites: list[Suite], ship: str, unknown: str, no: str, code: int
) -> None:
    general = _general(*suites)
    decisions = [verdict(e.model_copy(update={"regressions": general})).decision for e in (SHIP, OPEN, NO)]
    assert decisions == [ship, unknown, no]
    assert standing(general).exit_code == code
    assert (standing(general).result is None) == all(suite.margin is None for suite in suites)


def _of(base: Any, tuned: Any, clusters: Sequence[str]) -> Suite:
    return suite_of(
        name="s",
        kind="choices",
        metric="acc",
        base=base,
        tuned=tuned,
        clusters=clusters,
        margin=0.05,
        controls=[],
        seed=0,
    )


def test_undecided_suite_names_the_items_needed() -> None:
    base, tuned = np.array([1.0] * 50 + [0.0] * 50), np.array([1.0] * 40 + [0.0] * 50 + [1.0] * 10)
    suite = _of(base, tuned, _alone(base))
    assert (suite.drop, suite.changed, suite.result) == (0.0, 0.2, "can't tell")
    assert suite.items_needed == pytest.approx(6.18 * 0.2 / 0.05**2, rel=0.01)
    assert suite.expected_items == pytest.approx(6.18 * 0.1 / 0.05**2, rel=0.01)


def test_suite_of_copies_needs_more_items_than_one_of_distinct_items() -> None:
    base, tuned = np.array([1.0] * 50 + [0.0] * 50), np.array([1.0] * 40 + [0.0] * 50 + [1.0] * 10)
    once = _of(base, tuned, _alone(base))
    fourfold = _of(np.repeat(base, 4), np.repeat(tuned, 4), _fours(range(400)))
    assert (fourfold.items, fourfold.clusters) == (400, 100)
    assert fourfold.items_needed == pytest.approx(4 * (once.items_needed or 0), rel=0.02)
    assert fourfold.limit >= once.limit
    assert "S, 400 items in 100 clusters: " in standing(_general(fourfold)).reasons[0]
    assert "S, 100 items: " in standing(_general(once)).reasons[0]
