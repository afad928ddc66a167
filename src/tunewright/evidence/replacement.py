"""Replace an incumbent, keep it, or can't tell: a pure function of the evidence, and its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunewright.core.text import count_of
from tunewright.evidence.common import percent_bar
from tunewright.evidence.human_eval import AnswerReview, human_eval_line
from tunewright.evidence.incumbents import HOURS_PER_MONTH, Incumbent, Incumbents, Outcome, Serving, TunedServing
from tunewright.evidence.power import items_to_settle
from tunewright.evidence.schema import Evidence
from tunewright.metrics import points_text, score_text
from tunewright.render.blocks import Bar, Block, Cell, Column, Figure, Lead, Notes, Row, Section, row, table, words

_CAUTION_SHARE = 0.05


@dataclass(frozen=True)
class BreakEven:
    """Calls from which the tuned side is cheaper; an unavailable figure is None, with the reason in ``why``."""

    calls: float | None
    """Calls that pay for training, labelling and hosting; None means unknown, or never."""
    calls_per_month: float | None
    """Calls a month at which a machine that always runs costs as much; None means unknown."""
    why: str


@dataclass(frozen=True)
class Replacement:
    """The outcome for one incumbent, with its reasons; the first reason is the measurement."""

    incumbent: Incumbent
    tuned: TunedServing
    outcome: Outcome
    break_even: BreakEven
    reasons: tuple[str, ...]
    people: AnswerReview | None = None
    """Blind preferences of people between the two; they do not affect the outcome."""

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as ``--json`` prints it."""
        found = self.incumbent
        sides = {"tuned": self.tuned, "incumbent": found.serving}
        return {
            "name": found.name,
            "model": found.model,
            "outcome": self.outcome,
            "margin": found.drop.margin,
            "drop": found.drop.value,
            "drop_interval": [found.drop.interval.low, found.drop.interval.high],
            "cost_per_1000": {name: side.cost_per_1000 for name, side in sides.items()},
            "p95_seconds": {name: side.latency.p95 if side.latency else None for name, side in sides.items()},
            "break_even_calls": self.break_even.calls,
            "break_even_calls_per_month": self.break_even.calls_per_month,
            "missing": {name: side.missing for name, side in sides.items() if side.missing},
            "human_eval": None
            if self.people is None
            else {**self.people.model_dump(mode="json"), "decision": self.people.decision},
            "reasons": list(self.reasons),
        }


def replacements(evidence: Evidence, decision: str) -> tuple[Replacement, ...]:
    """Return the outcome for each incumbent; ``decision`` is the verdict on the adapter itself.

    Each incumbent is a separate decision, so the outcomes are not adjusted for their number.
    People's preferences are reported and decide nothing: no declared contrast is about them.
    """
    compared = evidence.incumbents.compared if evidence.incumbents else ()
    return tuple(_replacement(evidence, found, decision) for found in compared)


def _replacement(evidence: Evidence, found: Incumbent, decision: str) -> Replacement:
    assert evidence.incumbents is not None
    tuned = evidence.incumbents.tuned
    outcome, even = found.drop.outcome, break_even(found, tuned)
    reasons = [_measured(evidence, found), _decided(evidence, found)]
    if outcome == "replace" and decision != "ship":
        reasons.append(
            f"The verdict on the adapter itself is {decision}, for the reasons above: the base with its best prompt "
            "may do as well."
        )
    reasons += [cost_text(found, tuned, even), latency_text(found, tuned), *_cautions(found)]
    people = evidence.human_eval_incumbents.get(found.name)
    if people is not None:
        reasons.append(f"{human_eval_line(people)} This comparison decides nothing.")
    return Replacement(found, tuned, outcome, even, tuple(reasons), people)


def _measured(evidence: Evidence, found: Incumbent) -> str:
    """Return the scores of both sides, and the loss with its interval."""
    drop, first = found.drop, evidence.contrasts[0]
    ours, theirs = (evidence.arm(name).score(evidence.metric).value for name in (first.treatment, found.arm))
    change = f"worse by {_points(drop.value)}" if drop.value > 0 else f"better by {_points(-drop.value)}"
    worst = f"worse by at most {_points(drop.interval.high)}"
    if drop.interval.high <= 0:
        worst = f"better by at least {_points(-drop.interval.high)}"
    clusters = "" if drop.clusters == drop.items else f" in {drop.clusters:,} clusters"
    return (
        f"{first.treatment} {score_text(evidence.metric, ours)} against {found.arm} "
        f"{score_text(evidence.metric, theirs)}; on the {drop.items:,} {evidence.split} items{clusters} scored in "
        f"both, {change}, {worst} (95% interval)."
    )


def _decided(evidence: Evidence, found: Incumbent) -> str:
    drop, margin = found.drop, _points(found.drop.margin)
    if drop.outcome == "replace":
        return f"The whole interval lies below the margin of {margin}: not worse."
    if drop.outcome == "keep":
        return f"The whole interval lies above the margin of {margin}: worse."
    # In terms of a gain: the lower end of the gain's interval has to rise above -margin.
    gain = drop.interval.model_copy(update={"low": -drop.interval.high, "high": -drop.interval.low})
    needed = items_to_settle(-drop.value, gain, -drop.margin, drop.items) if drop.items else None
    if needed is None:
        return f"The interval includes the margin of {margin}, and even 20 times as many items may not settle it."
    return f"The interval includes the margin of {margin}. About {needed:,} {evidence.split} items would settle it."


def break_even(found: Incumbent, tuned: TunedServing) -> BreakEven:
    """Return the calls from which the tuned side is cheaper than an incumbent."""
    theirs, ours = found.serving.cost_per_1000, tuned.cost_per_1000
    monthly = None
    if theirs and tuned.hour is not None:
        monthly = 1000 * HOURS_PER_MONTH * tuned.hour / theirs
    if theirs is None or ours is None:
        side = "the incumbent" if theirs is None else "tuned"
        return BreakEven(None, monthly, f"the cost of {side} is missing")
    if ours >= theirs:
        return BreakEven(None, monthly, "a call of tuned costs no less")
    if tuned.training is None:
        return BreakEven(None, monthly, "the cost of training is missing")
    return BreakEven(1000 * tuned.training / (theirs - ours), monthly, "")


def cost_text(found: Incumbent, tuned: TunedServing, even: BreakEven) -> str:
    """Return the cost of 1,000 calls on both sides and the break-even, or the reason why a figure is missing."""
    sides = []
    for name, side in (("tuned", tuned), (found.arm, found.serving)):
        if side.cost_per_1000 is None:
            sides.append(f"{name} unknown ({side.missing['cost']})")
        else:
            sides.append(f"{name} {amount(side.cost_per_1000)} ({side.basis})")
    text = f"Cost of 1,000 calls: {', '.join(sides)}. "
    if even.calls is not None:
        text += f"Break-even: {even.calls:,.0f} calls pay for one-off costs of {amount(tuned.training or 0.0)}."
    else:
        text += f"No break-even: {even.why}."
    if even.calls_per_month is not None:
        text += (
            f" A machine that always runs ({HOURS_PER_MONTH} hours a month) costs as much as "
            f"{even.calls_per_month:,.0f} of the incumbent's calls a month."
        )
    return text


def latency_text(found: Incumbent, tuned: TunedServing) -> str:
    """Return the 95th percentile of both sides' latencies, or the reason why a latency is missing."""
    sides = [
        f"{name} unknown ({side.missing['latency']})"
        if side.latency is None
        else f"{name} {side.latency.p95:.2f} s ({side.latency.answers:,} answers, {side.latency.how})"
        for name, side in (("tuned", tuned), (found.arm, found.serving))
    ]
    return f"Latency, 95th percentile: {'; '.join(sides)}."


def _cautions(found: Incumbent) -> list[str]:
    cautions = []
    if found.seen:
        text = f"Caution: {found.seen:,} of the items are from files that {found.name} was trained on, which favours it"
        if found.unseen is not None:
            low, high = (_points(end) for end in (found.unseen.interval.low, found.unseen.interval.high))
            text += (
                f"; on the {found.unseen.items:,} others tuned loses {_points(found.unseen.value)} (95% interval "
                f"{low} to {high})"
            )
        cautions.append(f"{text}.")
    if len(found.versions) > 1:
        counts = ", ".join(f"{name} ({count:,})" for name, count in found.versions.items())
        cautions.append(
            f"Caution: the endpoint answered with {len(found.versions)} model versions: {counts}. The comparison is "
            "with their mixture."
        )
    if found.gaps:
        why = "; ".join(f"{reason} ({count:,})" for reason, count in found.gaps.items())
        cautions.append(f"Caution: {sum(found.gaps.values()):,} items have no answer of {found.arm}: {why}.")
    if found.truncated > _CAUTION_SHARE * max(found.answered, 1):
        cautions.append(
            f"Caution: {found.truncated:,} of {found.answered:,} answers of {found.arm} reached its token limit."
        )
    if found.estimated:
        cautions.append(
            f"Caution: the endpoint did not count the tokens of {found.estimated:,} answers; their cost is estimated "
            "at 4 characters a token."
        )
    return cautions


def amount(money: float) -> str:
    """Return an amount in the prices' currency: ``1,204.50``, ``0.042``, ``0.0000894``."""
    if money >= 1:
        return f"{money:,.2f}"
    return np.format_float_positional(money, precision=3, unique=False, fractional=False, trim="-")


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:g} points"


def incumbents_section(found: Incumbents, outcomes: Sequence[Replacement]) -> Section:
    """Return the outcome for each incumbent, with the figures that decided it."""
    notes = [f"{each.incumbent.name}: {reason}" for each in outcomes for reason in each.reasons[1:]]
    blocks: tuple[Block, ...] = (
        Lead(
            "Models in use today answered the same items once; their answers are frozen. An incumbent can be replaced "
            "if the whole interval of tuned's loss against it, in points, lies below the margin."
        ),
        Figure(
            "incumbents",
            "Loss of tuned against each incumbent in points, with 95% intervals, against the margin",
            tuple(map(_drop_bar, found.compared)),
            "loss, points",
            zero=True,
            caption="The upright mark is the margin.",
        ),
        table("Table of incumbents", _HEAD, map(_incumbent_row, outcomes)),
        table(
            "Table of costs and latencies",
            ("Side", "Cost of 1,000 calls", "Latency, median", "Latency, 95th percentile"),
            [
                _side("tuned", found.tuned),
                *(_side(Cell(each.arm, _frozen(each)), each.serving) for each in found.compared),
            ],
            detail=True,
        ),
        Notes(tuple(notes), detail=True),
    )
    return Section("incumbents", "Against the models in use", blocks)


def _drop_bar(found: Incumbent) -> Bar:
    drop = found.drop
    return percent_bar(found.name, drop.value, drop.interval, points_text(drop.value), margin=drop.margin)


_CALLS = Column("Break-even, calls", detail=True)
_NUMBERS = ("Answers", "Loss", "95% interval", "Margin")
_HEAD = ("Incumbent", *words("Model version"), *_NUMBERS, _CALLS, *words("Outcome"))


def _incumbent_row(each: Replacement) -> Row:
    found, drop, even = each.incumbent, each.incumbent.drop, each.break_even
    return row(
        Cell(found.name, found.model),
        ", ".join(found.versions),
        f"{found.answered:,} of {found.answered + sum(found.gaps.values()):,}",
        Cell(points_text(drop.value), f"{drop.items:,} items in {drop.clusters:,} clusters"),
        Cell(drop.interval.points, drop.method),
        f"{100 * drop.margin:g}",
        Cell("none", even.why) if even.calls is None else f"{even.calls:,.0f}",
        each.outcome,
    )


def _side(name: str | Cell, side: Serving) -> Row:
    cost = Cell("unknown", side.missing.get("cost", ""))
    if side.cost_per_1000 is not None:
        cost = Cell(amount(side.cost_per_1000), side.basis)
    median = late = Cell("unknown", side.missing.get("latency", ""))
    if (timed := side.latency) is not None:
        median = Cell(f"{timed.p50:.2f} s")
        late = Cell(f"{timed.p95:.2f} s", f"{timed.answers:,} answers, {timed.how}")
    return row(name, cost, median, late)


def _frozen(found: Incumbent) -> str:
    versions = ", ".join(f"{name} ({count:,})" for name, count in found.versions.items())
    paid = "cost unknown" if found.cost is None else f"cost {amount(found.cost)}"
    return (
        f"{count_of(found.answered, 'answer')} of {versions} from {found.url}, {found.first[:16]} to "
        f"{found.last[:16]} UTC; {found.prompt_tokens:,} prompt and {found.completion_tokens:,} reply tokens, {paid}. "
        f"Frozen in {found.file} (SHA-256 {found.file_digest[:12]}…)."
    )
