"""Acceptance sampling against scipy's distributions and simulation; Cohen's kappa against scikit-learn's."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import repeat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from sklearn.metrics import cohen_kappa_score

from tunewright.data.review.acceptance import (
    Finding,
    FixedPlan,
    SequentialPlan,
    fixed_size,
    judge,
    sample_order,
    upper_bound,
)
from tunewright.data.review.report import agreement

RIGHT: Finding = "right"
WRONG: Finding = "wrong"
UNSETTLED: Finding = "unsettled"


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("allowed", [0, 1, 2, 5, 12])
def test_fixed_size_is_the_smallest_that_proves_the_limit(allowed: int, limit: float) -> None:
    size = fixed_size(allowed, limit)
    assert binom.cdf(allowed, size, limit) <= 0.05 < binom.cdf(allowed, size - 1, limit)


def test_fixed_size_matches_published_tables() -> None:
    assert [fixed_size(allowed) for allowed in range(6)] == [59, 93, 124, 153, 181, 208]


@given(st.integers(1, 500), st.data(), st.sampled_from([0.9, 0.95, 0.99]))
def test_upper_bound_is_clopper_pearson(checked: int, data: st.DataObject, level: float) -> None:
    wrong = data.draw(st.integers(0, checked))
    exact = binomtest(wrong, checked, alternative="less").proportion_ci(level, method="exact").high
    assert upper_bound(wrong, checked, level) == pytest.approx(exact, abs=1e-9)


def _all_ways(plan: SequentialPlan, share: float, most: int = 3000) -> tuple[float, float, float]:
    """Exactly: the chance to accept, the chance to reject, the mean number of rows (undecided ones end at ``most``)."""
    chances: dict[int, float] = {0: 1.0}  # of each number of wrong rows, while nothing is decided
    accept = reject = mean = 0.0
    for checked in range(1, most):
        mean += sum(chances.values())
        step: dict[int, float] = defaultdict(float)
        for wrong, chance in chances.items():
            step[wrong] += chance * (1 - share)
            step[wrong + 1] += chance * share
        chances = {}
        for wrong, chance in step.items():
            decision = plan.decide(checked, wrong)
            accept += chance * (decision == "accepted")
            reject += chance * (decision == "rejected")
            if decision == "continue":
                chances[wrong] = chance
    return accept, reject, mean


def test_sequential_plan_keeps_its_error_rates() -> None:
    plan = SequentialPlan()
    accept_good, reject_good, mean_good = _all_ways(plan, 0.01)
    accept_bad, reject_bad, mean_bad = _all_ways(plan, 0.05)
    assert reject_good <= plan.alpha
    assert accept_bad <= plan.beta
    assert accept_good + reject_good == pytest.approx(1, abs=1e-6)
    assert accept_bad + reject_bad == pytest.approx(1, abs=1e-6)
    # It stops earlier than the fixed plan that errs as rarely on both sides (181 rows, 4 allowed).
    assert max(mean_good, mean_bad) < fixed_size(4)


@pytest.mark.parametrize("share", [0.1, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.01, 0.03, 0.05))])
def test_judge_decides_simulated_samples_at_the_exact_rate(share: float) -> None:
    plan, draw, runs = SequentialPlan(), random.Random(0), 1500
    accept, _, mean = _all_ways(plan, share)
    outcomes = [judge(plan, _drawn(draw, share), rows=10**9) for _ in range(runs)]
    error = (accept * (1 - accept) / runs) ** 0.5
    assert abs(sum(o.decision == "accepted" for o in outcomes) / runs - accept) < 4 * error + 1e-3
    assert sum(o.checked for o in outcomes) / runs == pytest.approx(mean, rel=0.12)


def _drawn(draw: random.Random, share: float) -> map[Finding]:
    def one(_: None) -> Finding:
        return "wrong" if draw.random() < share else "right"

    return map(one, repeat(None))


@given(st.integers(0, 400), st.integers(0, 8), st.sampled_from([SequentialPlan(), FixedPlan(allowed=2)]))
def test_sequential_plan_accepts_after_exactly_the_needed_right_rows(
    checked: int, wrong: int, plan: SequentialPlan | FixedPlan
) -> None:
    wrong = min(wrong, checked)
    if plan.decide(checked, wrong) != "continue":
        return
    needed = plan.needed(checked, wrong)
    assert plan.decide(checked + needed, wrong) == "accepted"
    assert plan.decide(checked + needed - 1, wrong) != "accepted"


@given(st.lists(st.sampled_from(["right"] * 30 + ["wrong", "unsettled"]), max_size=300), st.integers(0, 2))
def test_judge_never_reverses_a_decision_when_a_row_is_settled(found: list[Finding], allowed: int) -> None:
    """Whatever the unsettled rows turn out to be, an accepted version is not rejected, nor the other way round."""
    for plan in (SequentialPlan(), FixedPlan(allowed=allowed)):
        now = judge(plan, found, rows=10**6)
        for settled in (RIGHT, WRONG):
            later = judge(plan, [settled if f == "unsettled" else f for f in found[: now.checked]], rows=10**6)
            assert {now.decision, later.decision} != {"accepted", "rejected"}


def test_judge_ignores_findings_after_the_decision() -> None:
    right = [RIGHT] * 80
    decided = judge(SequentialPlan(), right, rows=10_000)
    assert (decided.decision, decided.wrong) == ("accepted", 0)
    assert judge(SequentialPlan(), [*right, *([WRONG] * 50)], rows=10_000) == decided


def test_fixed_plan_accepts_at_its_size_and_rejects_at_once() -> None:
    plan = FixedPlan(allowed=1)
    assert judge(plan, [RIGHT] * 92, rows=10_000).decision == "continue"
    assert judge(plan, [RIGHT] * 92, rows=10_000).needed == 1
    accepted = judge(plan, [RIGHT] * 92 + [WRONG], rows=10_000)
    assert (accepted.decision, accepted.checked) == ("accepted", 93)
    assert accepted.upper < 0.05
    assert judge(plan, [WRONG, WRONG], rows=10_000).decision == "rejected"


def test_judge_does_not_accept_skipped_rows() -> None:
    plan = SequentialPlan()
    clean = judge(plan, [RIGHT] * 80, rows=10_000)
    skipping: list[Finding] = ["unsettled" if i % 10 == 0 else "right" for i in range(80)]
    assert clean.decision == "accepted"
    assert judge(plan, skipping, rows=10_000).decision == "continue"
    assert judge(plan, skipping, rows=10_000).upper > 0.05


def test_judge_uses_the_true_share_when_all_rows_are_checked() -> None:
    few = [RIGHT] * 39 + [WRONG]
    found = judge(SequentialPlan(), few, rows=40)
    assert (found.decision, found.whole, found.upper) == ("accepted", True, 1 / 40)
    assert judge(SequentialPlan(), [RIGHT] * 38 + [WRONG] * 2, rows=40).decision == "rejected"
    assert judge(SequentialPlan(), [RIGHT] * 38 + [UNSETTLED] * 2, rows=40).decision == "continue"
    assert judge(SequentialPlan(), few, rows=41).decision == "continue"
    assert judge(SequentialPlan(), [RIGHT] * 12, rows=20).needed == 8


def test_sample_order_depends_on_version_and_draw_only() -> None:
    keys = tuple(f"{n:064x}" for n in range(200))
    order = sample_order(keys, "a" * 64, 0)
    assert sorted(order) == [*keys]
    assert sample_order(keys[::-1], "a" * 64, 0) == order
    assert sample_order(keys, "b" * 64, 0) != order
    assert sample_order(keys, "a" * 64, 1) != order


def test_sample_order_is_uniform() -> None:
    from scipy.stats import chisquare

    keys = tuple(f"{n:064x}" for n in range(20))
    counts = dict.fromkeys(keys, 0)
    for draw in range(2000):
        for key in sample_order(keys, "version", draw)[:5]:
            counts[key] += 1
    assert chisquare(list(counts.values())).pvalue > 0.001


PAIR = ("ada", "ben")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_kappa_matches_scikit_learn(verdicts: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in verdicts], [b for _, b in verdicts]
    found = agreement(PAIR, first, second)
    assert (found.rows, found.agreed) == (len(verdicts), sum(a == b for a, b in verdicts))
    if found.kappa is None:
        assert len({*first, *second}) == 1
    else:
        assert found.kappa == pytest.approx(cohen_kappa_score(first, second))
    if found.low is not None and found.high is not None and found.kappa is not None:
        assert -1 <= found.low <= found.kappa <= found.high <= 1


def test_kappa_interval_is_close_to_the_bootstrap() -> None:
    draw = np.random.default_rng(0)
    first = draw.random(400) < 0.8
    second = np.where(draw.random(400) < 0.9, first, ~first)
    found = agreement(PAIR, first.tolist(), second.tolist())
    picks = draw.integers(0, 400, size=(2000, 400))
    one, other = first[picks], second[picks]  # [draws, rows]
    shares = one.mean(axis=1), other.mean(axis=1)
    chance = shares[0] * shares[1] + (1 - shares[0]) * (1 - shares[1])
    low, high = np.quantile(((one == other).mean(axis=1) - chance) / (1 - chance), [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_kappa_interval_is_undefined_when_reviewers_agree_on_everything() -> None:
    all_same = agreement(PAIR, [True, False, True], [True, False, True])
    assert all_same.kappa == pytest.approx(1)
    assert all_same.low is None
    assert "interval" not in str(all_same)
    one_kind = agreement(PAIR, [True] * 5, [True] * 5)
    assert one_kind.kappa is None
    assert "ada and ben agree on 5 of 5 rows; kappa is undefined" in str(one_kind)
