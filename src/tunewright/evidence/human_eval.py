"""The evidence's section ``human_eval``: blind preferences of people, and their agreement with the judge."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright.evidence.common import Interval, Part, Score


class ReviewStratum(Part):
    """Test items with the same outcome by the deciding metric, and the reviewers' preferences on a sample."""

    name: Annotated[str, Field(description="fixed, broken, both right or both wrong, by the deciding metric.")]
    items: Annotated[int, Field(description="Test items of the stratum whose two answers differ.")]
    asked: Annotated[int, Field(description="Number of them drawn at random: asked / items is each one's probability.")]
    answered: Annotated[int, Field(description="Number of them with a verdict of at least one reviewer.")]
    treatment: Annotated[int, Field(description="Answered items on which the treatment is preferred.")]
    control: Annotated[int, Field(description="Answered items on which the control is preferred.")]

    @property
    def ties(self) -> int:
        """Answered items without a preference."""
        return self.answered - self.treatment - self.control


class Reviewer(Part):
    """One reviewer's counts."""

    name: str
    answered: Annotated[int, Field(description="Items with a verdict other than skip.")]
    skipped: int
    both: Annotated[int, Field(description="Verdicts that both answers are good.")]
    neither: Annotated[int, Field(description="Verdicts that neither answer is good.")]
    reference_shown: Annotated[int, Field(description="Items judged after the reference was shown.")]


class RaterAgreement(Part):
    """Agreement of two raters on the items that both judged, as treatment, control or tie; unweighted."""

    raters: tuple[str, str]
    items: int
    agreed: int
    kappa: Annotated[float | None, Field(description="Cohen's kappa; null if both always gave the same verdict.")]
    interval: Annotated[
        Interval | None,
        Field(description="Bootstrap over clusters; null if the raters agree on all items."),
    ]


class PredictionPowered(Part):
    """Prediction-powered estimate from people's verdicts on the reviewed items and the judge's on all."""

    win_rate: Score
    tuning: Annotated[
        float,
        Field(description="Weight of the judge, from 0 (ignored) to 1 (full): PPI++'s lambda."),
    ]
    judged: Annotated[int, Field(description="Items with different answers and a verdict of the judge.")]


class AnswerReview(Part):
    """Blind human comparison of two arms' answers."""

    treatment: str
    control: str
    items: Annotated[int, Field(description="All test items, which the win rate covers.")]
    same: Annotated[int, Field(description="Items with equal answers: counted as ties, not asked.")]
    asked: int
    answered: int
    reviewers: tuple[Reviewer, ...]
    strata: tuple[ReviewStratum, ...]
    preferred: Annotated[
        tuple[int, int], Field(description="Answered items on which treatment and control are preferred, without ties.")
    ]
    p_value: Annotated[float, Field(description="Two-sided p-value for no preference, over the answered items.")]
    test: str
    win_rate: Annotated[
        Score | None,
        Field(
            description="Share that prefers the treatment, a tie counting half, weighted to all items; null with "
            "too few answers."
        ),
    ]
    powered: Annotated[PredictionPowered | None, Field(description="Null without a judge, or with too few answers.")]
    agreements: tuple[RaterAgreement, ...]
    lacking: Annotated[str | None, Field(description="Reason why there is no win rate yet.")] = None

    @property
    def decision(self) -> str:
        """``treatment``, ``control`` or ``can't tell``: the side of one half on which the win rate's interval lies.

        The prediction-powered win rate is used if there is a judge.
        """
        score = self.powered.win_rate if self.powered else self.win_rate
        if score is None or score.interval.low <= 0.5 <= score.interval.high:
            return "can't tell"
        return "treatment" if score.interval.low > 0.5 else "control"


def human_eval_line(review: AnswerReview) -> str:
    """Return the people's preferences, and the estimate for all test items."""
    wins, losses = review.preferred
    text = (
        f"People, blind: {review.answered} of {review.asked} pairs judged, {review.treatment} preferred on {wins}, "
        f"{review.control} on {losses}."
    )
    if review.win_rate is not None:
        score = review.powered.win_rate if review.powered else review.win_rate
        helped = ", with the judge's help" if review.powered else ""
        rate = percents(score.value, score.interval)
        return f"{text} On all items{helped}: {rate} for {review.treatment}."
    return f"{text} No win rate for all items yet: {review.lacking}."


def percents(value: float, interval: Interval) -> str:
    """Return a share with its interval: ``62.5% (51.0 to 73.2)``."""
    return f"{100 * value:.1f}% ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
