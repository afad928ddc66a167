"""The evidence's section ``human_eval``: blind preferences of people, and their agreement with the judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from tunewright.evidence.common import Interval, Part, Score
from tunewright.evidence.power import ALPHA
from tunewright.metrics import p_text
from tunewright.render.blocks import Block, Cell, Column, Lead, Notes, Section, Table, row, table


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
    """Agreement of two raters on the items both judged, as treatment, control or tie; unweighted."""

    raters: tuple[str, str]
    items: int
    agreed: int
    kappa: Annotated[float | None, Field(description="Cohen's kappa; null if both always gave the same verdict.")]
    interval: Annotated[
        Interval | None,
        Field(description="Bootstrap over clusters; null if the raters agree on all items."),
    ]


class PredictionPowered(Part):
    """Prediction-powered estimate from people's verdicts on reviewed items and the judge's on all."""

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
        return f"{text} On all items{helped}: {score.text} for {review.treatment}."
    return f"{text} No win rate for all items yet: {review.lacking}."


def people_prefer(
    review: AnswerReview | None, treatment: str, control: str
) -> tuple[Literal["treatment", "control"] | None, list[str]]:
    """Return the deciding arm that people prefer, if any, with sentences about the preference.

    People are against the treatment if the whole interval of the win rate lies below one half and
    the sign test is significant; the test guards against a handful of verdicts.
    """
    if review is None:
        return None, []
    said = human_eval_line(review)
    if (review.treatment, review.control) != (treatment, control):
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


def human_eval_section(review: AnswerReview) -> Section:
    """Return people's preference, win rates on all items, verdicts by stratum, and agreement."""
    preferred = {"treatment": f"People prefer {review.treatment}.", "control": f"People prefer {review.control}."}
    unclear = "People show no clear preference yet"
    unclear += ": the interval includes 50%." if review.win_rate else "."
    blocks: list[Block] = [Lead(f"{preferred.get(review.decision, unclear)} {human_eval_line(review)}")]
    if (alone := review.win_rate) is not None:
        rates: list[tuple[str | Cell, ...]] = [("people alone", *_rate(alone))]
        if (found := review.powered) is not None:
            name = Cell(f"people and the judge (lambda {found.tuning:.2f})", f"{found.judged:,} items judged")
            rates.append((name, *_rate(found.win_rate)))
        preferred_of = f"{review.treatment} preferred, of all {review.items:,} items"
        how = Column("How", words=True, detail=True)
        blocks.append(table("Table of win rates", (preferred_of, "Win rate, %", "95% interval", "Width", how), rates))
    blocks.append(_strata(review))
    if review.agreements:
        blocks.append(agreement_table(review.agreements))
    wins, losses = review.preferred
    notes = [
        f"Of {review.answered:,} judged pairs {review.treatment} is preferred on {wins:,}, {review.control} on "
        f"{losses:,}, none on {review.answered - wins - losses:,}: {p_text(review.p_value)} ({review.test})."
    ]
    notes += [
        f"{who.name}: {who.answered} judged ({who.both} both good, {who.neither} neither), {who.skipped} skipped, "
        f"{who.reference_shown} with the reference shown."
        for who in review.reviewers
    ]
    return Section("human-eval", "What people say", (*blocks, Notes(tuple(notes))))


def _rate(score: Score) -> tuple[str, ...]:
    width = 100 * (score.interval.high - score.interval.low)
    return f"{100 * score.value:.1f}", score.interval.percents, f"{width:.1f}", score.method


def _strata(review: AnswerReview) -> Table:
    head = ("By the metric", "Items", "Asked", "Judged", f"For {review.treatment}", f"For {review.control}", "Tie")
    rows = [
        row(s.name, *(f"{n:,}" for n in (s.items, s.asked, s.answered, s.treatment, s.control, s.ties)))
        for s in review.strata
    ]
    if review.same:
        rows.append(row("equal answers", f"{review.same:,}", "", "", "", "", f"{review.same:,}"))
    return table("Table of strata", head, rows)


def agreement_table(found: Sequence[RaterAgreement]) -> Table:
    """Return how far two raters each agree, beyond what chance gives."""
    head = ("Raters", "Items both judged", "Agreed", "Kappa (Cohen)", "95% interval")
    rows = []
    for each in found:
        kappa = "not defined" if each.kappa is None else f"{each.kappa:.2f}"
        interval = "" if each.interval is None else f"{each.interval.low:.2f} to {each.interval.high:.2f}"
        rows.append((" and ".join(each.raters), f"{each.items}", f"{each.agreed}", kappa, interval))
    return table("Table of agreement", head, rows)
