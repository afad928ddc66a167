"""Section on blind human evaluation, and its agreement with the judge."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.evidence.common import Score
from tunewright.evidence.human_eval import AnswerReview, RaterAgreement, human_eval_line
from tunewright.evidence.schema import Evidence
from tunewright.metrics import p_text
from tunewright.render.blocks import Block, Cell, Column, Lead, Notes, Row, Section, Table, row, table
from tunewright.report.text import percent_interval

_DECIDES_NOTHING = (
    "A comparison apart from the one with prompting. It affects neither the verdict nor the outcome above."
)


def sections(evidence: Evidence) -> list[Section]:
    """Return people's results on the deciding arms, then those against each incumbent."""
    found = [section(evidence.human_eval)] if evidence.human_eval else []
    for number, (name, review) in enumerate(evidence.human_eval_incumbents.items(), start=1):
        blocks = (Lead(_DECIDES_NOTHING), *section(review).blocks)
        title = f"What people say against the model in use, {name}"
        found.append(Section(f"human-eval-incumbent-{number}", title, blocks))
    return found


def section(review: AnswerReview) -> Section:
    """Return people's preference, win rates on all items, verdicts by stratum, and agreement."""
    preferred = {"treatment": f"People prefer {review.treatment}.", "control": f"People prefer {review.control}."}
    unclear = "People show no clear preference yet"
    unclear += ": the interval includes 50%." if review.win_rate else "."
    blocks: list[Block] = [Lead(f"{preferred.get(review.decision, unclear)} {human_eval_line(review)}")]
    if review.win_rate is not None:
        blocks.append(_win_rates(review, review.win_rate))
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


def _win_rates(review: AnswerReview, alone: Score) -> Table:
    head = (
        f"{review.treatment} preferred, of all {review.items:,} items",
        "Win rate, %",
        "95% interval",
        "Width",
        Column("How", words=True, detail=True),
    )
    rows = [row("people alone", *_rate(alone))]
    if review.powered is not None:
        found = review.powered
        name = Cell(f"people and the judge (lambda {found.tuning:.2f})", f"{found.judged:,} items judged")
        rows.append(row(name, *_rate(found.win_rate)))
    return table("Table of win rates", head, rows)


def _rate(score: Score) -> tuple[str, ...]:
    width = 100 * (score.interval.high - score.interval.low)
    return f"{100 * score.value:.1f}", percent_interval(score.interval), f"{width:.1f}", score.method


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
    return table("Table of agreement", head, map(_agreement, found))


def _agreement(each: RaterAgreement) -> Row:
    kappa = "not defined" if each.kappa is None else f"{each.kappa:.2f}"
    interval = "" if each.interval is None else f"{each.interval.low:.2f} to {each.interval.high:.2f}"
    return row(" and ".join(each.raters), f"{each.items}", f"{each.agreed}", kappa, interval)
