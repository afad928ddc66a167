"""The evidence's section ``human_eval``: what people preferred, blind, and how far they and the judge agree."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright.evidence.base import Interval, Part, Score


class ReviewStratum(Part):
    """Test items that the deciding metric treats alike, and what people said of those that they were asked about."""

    name: Annotated[str, Field(description="fixed, broken, both right or both wrong, by the deciding metric.")]
    items: Annotated[int, Field(description="Test items in it whose two answers differ.")]
    asked: Annotated[int, Field(description="Of these, drawn at random: asked / items is the chance of each.")]
    answered: Annotated[int, Field(description="Of these, with a verdict of at least one reviewer.")]
    treatment: Annotated[int, Field(description="Answered items on which the treatment is preferred.")]
    control: Annotated[int, Field(description="Answered items on which the control is preferred.")]

    @property
    def ties(self) -> int:
        """Answered items without a preference."""
        return self.answered - self.treatment - self.control


class Reviewer(Part):
    """What one person did."""

    name: str
    answered: Annotated[int, Field(description="Items with a verdict other than skip.")]
    skipped: int
    both: Annotated[int, Field(description="Verdicts that both answers are good.")]
    neither: Annotated[int, Field(description="Verdicts that neither is.")]
    reference_shown: Annotated[int, Field(description="Items judged after the reference was shown.")]


class RaterAgreement(Part):
    """Two raters on the items that both judged, as treatment, control or tie; by item, not weighted."""

    raters: tuple[str, str]
    items: int
    agreed: int
    kappa: Annotated[float | None, Field(description="Cohen's; null where both gave one and the same verdict always.")]
    interval: Annotated[
        Interval | None,
        Field(description="Bootstrap over clusters; null where they agree on all items, so that nothing varies."),
    ]


class Powered(Part):
    """Prediction-powered: people's verdicts on the reviewed items and the judge's on all."""

    win_rate: Score
    tuning: Annotated[
        float,
        Field(description="From 0 (the judge is of no use) to 1 (its differences count in full): PPI++'s lambda."),
    ]
    judged: Annotated[int, Field(description="Items with different answers that the judge has a verdict on.")]


class AnswerReview(Part):
    """Blind comparison of two arms' answers by people."""

    treatment: str
    control: str
    items: Annotated[int, Field(description="All test items, which the win rate speaks of.")]
    same: Annotated[int, Field(description="Items with equal answers: ties, not asked.")]
    asked: int
    answered: int
    reviewers: tuple[Reviewer, ...]
    strata: tuple[ReviewStratum, ...]
    preferred: Annotated[
        tuple[int, int], Field(description="Answered items on which treatment and control are preferred; ties apart.")
    ]
    p_value: Annotated[float, Field(description="Two-sided, of no preference, over the answered items.")]
    test: str
    win_rate: Annotated[
        Score | None,
        Field(description="Treatment preferred, a tie counting half, weighted to all items; null while too few say."),
    ]
    powered: Annotated[Powered | None, Field(description="Null without a judge, or while too few have answered.")]
    agreements: tuple[RaterAgreement, ...]
    lacking: Annotated[str | None, Field(description="Why there is no win rate yet.")] = None

    @property
    def decision(self) -> str:
        """``treatment``, ``control`` or ``can't tell``: where the interval of the win rate lies, of one half.

        The prediction-powered one where there is a judge.
        """
        score = self.powered.win_rate if self.powered else self.win_rate
        if score is None or score.interval.low <= 0.5 <= score.interval.high:
            return "can't tell"
        return "treatment" if score.interval.low > 0.5 else "control"
