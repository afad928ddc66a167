"""Preferences of people and a judge between the two deciding arms, and their effect on the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunewright.evidence.human_eval import AnswerReview, human_eval_line, percents
from tunewright.evidence.judge import Judgement, Preference
from tunewright.evidence.power import ALPHA
from tunewright.evidence.schema import Contrast, Evidence
from tunewright.metrics import p_text, points_text


@dataclass(frozen=True)
class Preferences:
    """Sentences about people and judge, and the stronger objection to the tuned answers."""

    against: Literal["people", "judge"] | None
    reasons: tuple[str, ...]


def decisive_preferences(evidence: Evidence) -> Preferences:
    """Return the preferences about the deciding contrast, which can only stop a *ship*.

    People are against it if the whole interval of the win rate lies below one half and the sign test is significant;
    the test guards against a handful of verdicts. A judge is against it if it passed its controls, is not of the base's
    family, and all its measurements agree (:func:`_objections`). People who prefer the tuned answers overrule it.
    """
    contrast = evidence.contrasts[0]
    preferred, people_said = _people(evidence.human_eval, contrast)
    judge_against, judge_said = _judge(evidence.judge, contrast, overruled=preferred == "treatment")
    against: Literal["people", "judge"] | None = "judge" if judge_against else None
    return Preferences("people" if preferred == "control" else against, (*people_said, *judge_said))


def _people(
    review: AnswerReview | None, contrast: Contrast
) -> tuple[Literal["treatment", "control"] | None, list[str]]:
    """Return the arm that people prefer, if any."""
    if review is None:
        return None, []
    said = human_eval_line(review)
    if (review.treatment, review.control) != (contrast.treatment, contrast.control):
        return None, [f"{said} These are not the deciding arms, so the verdict ignores it."]
    if review.decision == "treatment":
        return "treatment", [said]
    if review.decision != "control":
        return None, [said]
    p_value = p_text(review.p_value)
    if review.p_value < ALPHA:
        text = f"So people prefer {review.control}, blind ({p_value}, {review.test}): whatever the metric says"
        return "control", [said, f"{text}, the tuned answers are the worse ones."]
    text = f"the whole interval lies below 50%, but the test does not confirm it ({p_value})"
    return None, [said, f"Caution: people may prefer {review.control}: {text}. Review more pairs."]


def _judge(judge: Judgement | None, contrast: Contrast, *, overruled: bool) -> tuple[bool, list[str]]:
    if judge is None:
        return False, []
    said = judge_line(judge)
    objections = _objections(judge, contrast)
    if not objections:
        return False, [said]
    text = f"the judge finds {contrast.control} better, {' and '.join(objections)}"
    if judge.same_family:
        kin = f"it belongs to the base's family ({judge.same_family}) and may favour it, so the verdict ignores it"
        return False, [said, f"Caution: {text}; but {kin}. Use a judge of another family, or ask people."]
    if overruled:
        return False, [
            said,
            f"Caution: {text}; but people prefer {contrast.treatment}, who overrule the judge.",
        ]
    return True, [said, f"But {text}. `tunewright human-eval` asks people, who overrule it."]


def _objections(judge: Judgement, contrast: Contrast) -> list[str]:
    """Return the respects in which the judge finds the treatment significantly worse.

    A preference counts only if it holds in every form that was measured: raw, without Markdown, and at equal length.
    Otherwise it may be about style. A vetoed judge has no findings.
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
    """Return the judge's result about the deciding arms, or the reason of its veto."""
    if judge.vetoed:
        failed = ", ".join(f"{c.name} ({c.passed} of {c.items})" for c in judge.controls if not c.held)
        return f"Judge {judge.model}: vetoed, so its judgements do not count. Failed controls: {failed}."
    if not judge.preferences:
        return f"Judge {judge.model}: passed its controls but compared no answers."
    found, correct = judge.preferences[0], judge.contrast
    rate = percents(found.rate.value, found.rate.interval)
    flips = "" if found.flip_rate is None else f"; {found.flip_rate:.0%} of its verdicts changed with the order"
    text = f"Judge {judge.model}: {found.treatment} wins {rate} against {found.opponent}, ties half{flips}."
    if correct is None:
        return text
    interval = f"{points_text(correct.interval.low)} to {points_text(correct.interval.high)}"
    return f"{text} Correct by the reference: {points_text(correct.difference)} points ({interval})."
