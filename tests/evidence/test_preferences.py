"""Effect of people and a judge on a verdict: they can stop it, in a stated order, and never support shipping."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making.evidence import make_evidence, make_items, with_contrast
from making.full_evidence import JUDGE, REVIEW, vetoed
from tunewright.evidence.common import Interval
from tunewright.evidence.human_eval import AnswerReview, human_eval_line
from tunewright.evidence.judge import Judgement, judge_line
from tunewright.evidence.schema import Evidence
from tunewright.evidence.verdict import decisive_preferences, verdict

STRICTNESS = ["ship", "can't tell", "don't ship"]
EVIDENCE = make_evidence(make_items(60))
SHIPS = with_contrast(EVIDENCE, low=0.1, difference=0.2, high=0.3, p_value=1e-4)
OPEN = with_contrast(EVIDENCE, low=-0.1, difference=0.05, high=0.2, p_value=0.4)
WORSE = with_contrast(EVIDENCE, low=-0.3, difference=-0.2, high=-0.1, p_value=1e-4)


def _with(evidence: Evidence, **sections: Any) -> Evidence:
    return evidence.model_copy(update=sections)


def _review(low: float, high: float, p_value: float, *, powered: tuple[float, float] | None = None) -> AnswerReview:
    """People's win rate of the treatment, and the one with a judge's help."""
    assert REVIEW.win_rate is not None and REVIEW.powered is not None
    alone = REVIEW.win_rate.model_copy(update={"value": (low + high) / 2, "interval": Interval(low=low, high=high)})
    helped = None
    if powered is not None:
        ends = Interval(low=powered[0], high=powered[1])
        score = REVIEW.powered.win_rate.model_copy(update={"value": sum(powered) / 2, "interval": ends})
        helped = REVIEW.powered.model_copy(update={"win_rate": score})
    return REVIEW.model_copy(update={"win_rate": alone, "powered": helped, "p_value": p_value})


def _judge(
    *,
    rate: float = 0.62,
    stripped: float | None = 0.61,
    equal: float | None = 0.63,
    p_value: float = 0.001,
    correct: float = 0.2,
    correct_p: float = 0.001,
    **changes: Any,
) -> Judgement:
    """Win rates within 10 points each way, and the difference in correctness within 10 points."""

    def at(part: Any, value: float) -> Any:
        ends = Interval(low=max(value - 0.1, 0), high=min(value + 0.1, 1))
        return part.model_copy(update={"value": value, "interval": ends})

    found, contrast = JUDGE.preferences[0], JUDGE.contrast
    assert contrast is not None
    preference = found.model_copy(
        update={
            "rate": at(found.rate, rate),
            "stripped": None if stripped is None else at(found.stripped, stripped),
            "length_controlled": None if equal is None else at(found.length_controlled, equal),
            "p_value": p_value,
        }
    )
    ends = Interval(low=correct - 0.1, high=correct + 0.1)
    message = contrast.model_copy(update={"difference": correct, "interval": ends, "p_value": correct_p})
    values = {"preferences": (preference,), "contrast": message, "same_family": None} | changes
    return JUDGE.model_copy(update=values)


AGAINST = _judge(rate=0.3, stripped=0.31, equal=0.32)
PEOPLE_AGAINST = _review(0.2, 0.45, 0.001)
PEOPLE_FOR = _review(0.55, 0.8, 0.001)


def test_verdict_is_dont_ship_when_people_prefer_the_other_arm() -> None:
    for evidence in (SHIPS, OPEN):
        result = verdict(_with(evidence, human_eval=PEOPLE_AGAINST))
        assert (result.decision, result.exit_code) == ("don't ship", 3)
        assert human_eval_line(PEOPLE_AGAINST) in result.reasons
        assert any(reason.startswith("So people prefer retrieved-4, blind (p = 0.001") for reason in result.reasons)


def test_few_human_verdicts_are_a_caution() -> None:
    result = verdict(_with(SHIPS, human_eval=_review(0.2, 0.45, 0.06)))
    assert result.decision == "ship"
    assert any(reason.startswith("Caution: people may prefer retrieved-4") for reason in result.reasons)


def test_verdict_uses_the_judge_assisted_win_rate_when_there_is_one() -> None:
    helped = _review(0.3, 0.6, 0.01, powered=(0.3, 0.48))
    assert verdict(_with(SHIPS, human_eval=helped)).decision == "don't ship"
    assert verdict(_with(SHIPS, human_eval=_review(0.3, 0.6, 0.01))).decision == "ship"


@pytest.mark.parametrize("review", [PEOPLE_FOR, _review(0.4, 0.6, 0.9)])
def test_verdict_is_unchanged_when_people_do_not_object(review: AnswerReview) -> None:
    for evidence in (SHIPS, OPEN, WORSE):
        before, after = verdict(evidence), verdict(_with(evidence, human_eval=review))
        assert after.decision == before.decision
        assert set(after.reasons) - set(before.reasons) == {human_eval_line(review)}


def test_review_of_other_arms_changes_nothing() -> None:
    other = PEOPLE_AGAINST.model_copy(update={"control": "zero-shot"})
    result = verdict(_with(SHIPS, human_eval=other, judge=AGAINST))
    assert result.decision == "can't tell", "the judge counts: people reviewed other arms"
    assert any("not the deciding arms" in reason for reason in result.reasons)


@pytest.mark.parametrize(
    "judge",
    [AGAINST, _judge(correct=-0.2), _judge(rate=0.3, stripped=None, equal=None)],
    ids=["in preference", "in correctness", "in the one form measured"],
)
def test_objecting_judge_makes_the_verdict_undecided(judge: Judgement) -> None:
    assert decisive_preferences(_with(SHIPS, judge=judge))[0] == "judge"
    for evidence, decision in ((SHIPS, "can't tell"), (OPEN, "can't tell"), (WORSE, "don't ship")):
        result = verdict(_with(evidence, judge=judge))
        assert result.decision == decision
        assert judge_line(judge) in result.reasons
        assert any(reason.startswith("But the judge finds retrieved-4 better, in ") for reason in result.reasons)


@pytest.mark.parametrize(
    "judge",
    [
        _judge(rate=0.3, stripped=0.31, equal=0.5),
        _judge(rate=0.3, stripped=0.45, equal=0.3),
        _judge(rate=0.45, stripped=0.3, equal=0.3),
        _judge(rate=0.3, stripped=0.3, equal=0.3, p_value=0.06),
        _judge(correct=-0.05),
        _judge(correct=-0.2, correct_p=0.06),
        _judge(),
    ],
    ids=["not at equal length", "not without markdown", "not unchanged", "no preference", "wide", "luck", "for it"],
)
def test_uncertain_judge_finding_is_reported_and_does_not_change_the_verdict(judge: Judgement) -> None:
    before, after = verdict(SHIPS), verdict(_with(SHIPS, judge=judge))
    assert after.decision == "ship"
    assert set(after.reasons) - set(before.reasons) == {judge_line(judge)}


def test_verdict_ignores_a_judge_of_the_bases_family_or_overruled_by_people() -> None:
    kin = AGAINST.model_copy(update={"same_family": "llama"})
    for sections, message in (
        ({"judge": kin}, "it belongs to the base's family (llama)"),
        ({"judge": AGAINST, "human_eval": PEOPLE_FOR}, "but people prefer tuned"),
    ):
        result = verdict(_with(SHIPS, **sections))
        assert result.decision == "ship"
        assert any(reason.startswith("Caution: the judge finds") and message in reason for reason in result.reasons)


def test_verdict_reports_a_vetoed_judge_and_ignores_it() -> None:
    gone = vetoed(AGAINST)
    result = verdict(_with(SHIPS, judge=gone))
    assert result.decision == "ship"
    assert (
        "Judge fair-judge-70b: vetoed, so its judgements do not count. Failed controls: gold is correct (3 of 20)."
        in result.reasons
    )


def test_judge_preference_between_other_arms_is_ignored() -> None:
    preference = AGAINST.preferences[0].model_copy(update={"opponent": "reference model"})
    assert AGAINST.contrast is not None
    contrast = AGAINST.contrast.model_copy(update={"control": "zero-shot", "difference": -0.5})
    other = AGAINST.model_copy(update={"preferences": (preference,), "contrast": contrast})
    assert decisive_preferences(_with(SHIPS, judge=other))[0] is None


RATES = st.floats(0, 1)
P_VALUES = st.sampled_from([0.001, 0.049, 0.051, 0.9])


@given(
    st.sampled_from([SHIPS, OPEN, WORSE]),
    st.none() | st.builds(lambda a, b, p: _review(min(a, b), max(a, b), p), RATES, RATES, P_VALUES),
    st.none()
    | st.builds(
        lambda rate, stripped, equal, p, correct, q: _judge(
            rate=rate, stripped=stripped, equal=equal, p_value=p, correct=correct, correct_p=q
        ),
        RATES,
        st.none() | RATES,
        st.none() | RATES,
        P_VALUES,
        st.floats(-0.9, 0.9),
        P_VALUES,
    ),
)
def test_preferences_never_make_a_verdict_less_strict(
    evidence: Evidence, review: AnswerReview | None, judge: Judgement | None
) -> None:
    """So the rate at which chance alone ships stays below what it is without them."""
    before, after = verdict(evidence).decision, verdict(_with(evidence, human_eval=review, judge=judge)).decision
    assert STRICTNESS.index(after) >= STRICTNESS.index(before)
