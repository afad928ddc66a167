"""What people and a judge say of the two arms that decide, and whether that stops a verdict: pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunewright.evidence.base import Interval
from tunewright.evidence.human_eval import AnswerReview
from tunewright.evidence.judge import Judgement, Preference
from tunewright.evidence.power import ALPHA
from tunewright.evidence.schema import Contrast, Evidence
from tunewright.metrics import p_text, points_text


@dataclass(frozen=True)
class Preferences:
    """The sentences, and who says that the tuned answers are the worse ones: of both the one that weighs more."""

    against: Literal["people", "judge"] | None
    reasons: tuple[str, ...]


def opinions(evidence: Evidence) -> Preferences:
    """Return what people and the judge make of the deciding contrast; neither ever speaks for shipping.

    People are against where the whole interval of the win rate lies below one half and the sign test agrees (it guards
    a handful of verdicts). A judge is against where it passed its controls, is not of the base's family, and all that
    it measured says so (:func:`_objections`); unless people prefer the tuned answers, for whom it only stands in.
    """
    contrast = evidence.contrasts[0]
    preferred, people_said = _people(evidence.review, contrast)
    judge_against, judge_said = _judge(evidence.judge, contrast, overruled=preferred == "treatment")
    against: Literal["people", "judge"] | None = "judge" if judge_against else None
    return Preferences("people" if preferred == "control" else against, (*people_said, *judge_said))


def _people(
    review: AnswerReview | None, contrast: Contrast
) -> tuple[Literal["treatment", "control"] | None, list[str]]:
    """Return which of the two arms people prefer, if that can be told."""
    if review is None:
        return None, []
    said = people_line(review)
    if (review.treatment, review.control) != (contrast.treatment, contrast.control):
        return None, [f"{said} These are not the two arms that decide, so it changes nothing."]
    if review.decision == "treatment":
        return "treatment", [said]
    if review.decision != "control":
        return None, [said]
    p_value = p_text(review.p_value)
    if review.p_value < ALPHA:
        told = f"So people prefer {review.control}, blind ({p_value}, {review.test}): whatever the metric counts"
        return "control", [said, f"{told}, the tuned answers are not what is wanted."]
    told = f"the whole interval lies below 50%, but the test does not confirm it ({p_value})"
    return None, [said, f"Caution: people may prefer {review.control}: {told}. Ask about more pairs."]


def _judge(judge: Judgement | None, contrast: Contrast, *, overruled: bool) -> tuple[bool, list[str]]:
    if judge is None:
        return False, []
    said = judge_line(judge)
    objections = _objections(judge, contrast)
    if not objections:
        return False, [said]
    told = f"the judge finds {contrast.control} better, {' and '.join(objections)}"
    if judge.same_family:
        kin = f"it is of the base's family ({judge.same_family}) and may like its own kind: it stops nothing"
        return False, [said, f"Caution: {told}; but {kin}. Take a judge of another family, or ask people."]
    if overruled:
        return False, [
            said,
            f"Caution: {told}; but people prefer {contrast.treatment}, and it only stands in for them.",
        ]
    return True, [said, f"But {told}. `tunewright review` asks people, who outrank it."]


def _objections(judge: Judgement, contrast: Contrast) -> list[str]:
    """In what the judge finds the treatment significantly worse; a vetoed one has no findings.

    A preference counts where it stands in every form that was measured: as the answers are, without markdown, and at
    equal length. Else it may be one of style.
    """
    found = []
    correct = judge.contrast
    arms = (contrast.treatment, contrast.control)
    worse = correct is not None and correct.interval.high < 0 and correct.p_value < ALPHA
    if correct is not None and worse and (correct.treatment, correct.control) == arms:
        found.append(f"in correctness ({p_text(correct.p_value)})")
    preference = _preference(judge, contrast)
    if preference is not None and preference.p_value < ALPHA:
        forms = (preference.rate, preference.stripped, preference.length_controlled)
        if all(form.interval.high < 0.5 for form in forms if form is not None):
            found.append(f"in preference ({p_text(preference.p_value)})")
    return found


def _preference(judge: Judgement, contrast: Contrast) -> Preference | None:
    arms = (contrast.treatment, contrast.control)
    return next((each for each in judge.preferences if (each.treatment, each.opponent) == arms), None)


def judge_line(judge: Judgement) -> str:
    """Return what the judge found, against the arm that decides; of a vetoed one that it is not heard, and why."""
    if judge.vetoed:
        failed = ", ".join(f"{c.name} ({c.passed} of {c.items})" for c in judge.controls if not c.held)
        return f"Judge {judge.model}: vetoed, so nothing it said counts. Controls that it failed: {failed}."
    if not judge.preferences:
        return f"Judge {judge.model}: passed its controls, and compared no answers."
    found, correct = judge.preferences[0], judge.contrast
    rate = percents(found.rate.value, found.rate.interval)
    flips = "" if found.flip_rate is None else f"; {found.flip_rate:.0%} of its verdicts changed with the order"
    told = f"Judge {judge.model}: {found.treatment} wins {rate} against {found.opponent}, ties half{flips}."
    if correct is None:
        return told
    interval = f"{points_text(correct.interval.low)} to {points_text(correct.interval.high)}"
    return f"{told} Correct by the reference: {points_text(correct.difference)} points ({interval})."


def people_line(review: AnswerReview) -> str:
    """Return what people preferred, and how far that goes for all test items."""
    wins, losses = review.preferred
    told = (
        f"People, blind: {review.answered} of {review.asked} pairs judged, {review.treatment} preferred on {wins}, "
        f"{review.control} on {losses}."
    )
    if review.win_rate is not None:
        score = review.powered.win_rate if review.powered else review.win_rate
        helped = ", with the judge's help" if review.powered else ""
        rate = percents(score.value, score.interval)
        return f"{told} On all items{helped}: {rate} for {review.treatment}."
    return f"{told} No win rate for all items yet: {review.lacking}."


def percents(value: float, interval: Interval) -> str:
    """Return a share with its interval: ``62.5% (51.0 to 73.2)``."""
    return f"{100 * value:.1f}% ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
