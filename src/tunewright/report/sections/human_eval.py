"""Section on blind human evaluation, and its agreement with the judge."""

from __future__ import annotations

from tunewright.evidence.common import Score
from tunewright.evidence.human_eval import AnswerReview, RaterAgreement, human_eval_line
from tunewright.evidence.schema import Evidence
from tunewright.metrics import p_text
from tunewright.report.blocks import Block, Cell, Lead, Notes, Row, Section, Table, cells, columns
from tunewright.report.text import percent_interval


def sections(evidence: Evidence) -> list[Section]:
    """Return people's results on the deciding arms, then those against each incumbent."""
    found = []
    if evidence.human_eval is not None:
        found.append(_section("human-eval", "What people say", evidence.human_eval))
    for number, (name, review) in enumerate(evidence.human_eval_incumbents.items(), start=1):
        title = f"What people say against the model in use, {name}"
        found.append(_section(f"human-eval-incumbent-{number}", title, review, Lead(_DECIDES_NOTHING)))
    return found


_DECIDES_NOTHING = (
    "A comparison apart from the one with prompting. It affects neither the verdict nor the outcome above."
)


def _section(anchor: str, title: str, review: AnswerReview, *before: Block) -> Section:
    """Return win rates on all items, verdicts by stratum, and agreement."""
    blocks: list[Block] = [*before, Lead(human_eval_line(review))]
    if review.win_rate is not None:
        blocks.append(_win_rates(review, review.win_rate))
    blocks.append(_strata(review))
    if review.agreements:
        head = columns("Raters", "Items both judged", "Agreed", "Cohen’s kappa", "95% interval")
        blocks.append(Table("Table of agreement", head, tuple(_agreement(each) for each in review.agreements)))
    blocks.append(Notes(_notes(review)))
    return Section(anchor, title, tuple(blocks))


def _win_rates(review: AnswerReview, alone: Score) -> Table:
    head = columns(f"{review.treatment} preferred, of all {review.items:,} items", "Win rate, %", "95% interval", "How")
    rows = [Row(cells("people alone", f"{100 * alone.value:.1f}", percent_interval(alone.interval), alone.method))]
    if review.powered is not None:
        found = review.powered
        name = Cell("people and the judge", f"lambda {found.tuning:.2f}, {found.judged:,} items judged")
        score = found.win_rate
        rows.append(Row(cells(name, f"{100 * score.value:.1f}", percent_interval(score.interval), score.method)))
    return Table("Table of win rates", head, tuple(rows))


def _strata(review: AnswerReview) -> Table:
    head = columns(
        "By the metric", "Items", "Asked", "Judged", f"For {review.treatment}", f"For {review.control}", "Tie"
    )
    rows = [
        Row(cells(s.name, *(f"{n:,}" for n in (s.items, s.asked, s.answered, s.treatment, s.control, s.ties))))
        for s in review.strata
    ]
    if review.same:
        rows.append(Row(cells("equal answers", f"{review.same:,}", "", "", "", "", f"{review.same:,}")))
    return Table("Table of strata", head, tuple(rows))


def _agreement(each: RaterAgreement) -> Row:
    kappa = "not defined" if each.kappa is None else f"{each.kappa:.2f}"
    interval = "" if each.interval is None else f"{each.interval.low:.2f} to {each.interval.high:.2f}"
    return Row(cells(" and ".join(each.raters), f"{each.items}", f"{each.agreed}", kappa, interval))


def _notes(review: AnswerReview) -> tuple[str, ...]:
    ties = review.answered - sum(review.preferred)
    sentences = [f"Of the judged pairs {ties} have no preference: {p_text(review.p_value)} ({review.test})."]
    sentences += [
        f"{who.name}: {who.answered} judged ({who.both} both good, {who.neither} neither), {who.skipped} skipped, "
        f"{who.reference_shown} with the reference shown."
        for who in review.reviewers
    ]
    return tuple(sentences)
