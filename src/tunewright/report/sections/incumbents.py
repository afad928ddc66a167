"""Section on incumbents: the loss against each, cost and latency of both sides, and the frozen answers."""

from __future__ import annotations

from tunewright.core.text import count_of
from tunewright.evidence.incumbents import Incumbent, Serving
from tunewright.evidence.replacement import Replacement, amount
from tunewright.evidence.schema import Evidence
from tunewright.evidence.verdict import verdict
from tunewright.metrics import points_text
from tunewright.render.blocks import Bar, Block, Cell, Column, Figure, Lead, Notes, Row, Section, row, table
from tunewright.report.text import points_interval


def section(evidence: Evidence) -> Section | None:
    """Return the outcome for each incumbent, with what it was decided on."""
    found = evidence.incumbents
    if found is None:
        return None
    outcomes = verdict(evidence).replacements
    notes = [f"{each.incumbent.name}: {reason}" for each in outcomes for reason in each.reasons[1:]]
    blocks: tuple[Block, ...] = (
        Lead(
            "Models in use today answered the same items once; their answers are frozen. An incumbent can be replaced "
            "if the whole interval of tuned's loss against it, in points, lies below the margin."
        ),
        Figure(
            "incumbents",
            "Loss of tuned against each incumbent in points, with 95% intervals, against the margin",
            tuple(_bar(each) for each in found.compared),
            "loss, points",
            zero=True,
            caption="The upright mark is the margin.",
        ),
        table("Table of incumbents", _HEAD, (_row(each) for each in outcomes)),
        table("Table of costs and latencies", _SIDES, _sides(evidence), detail=True),
        Notes(tuple(notes), detail=True),
    )
    return Section("incumbents", "Against the models in use", blocks)


_HEAD = (
    "Incumbent",
    Column("Model version", words=True),
    "Answers",
    "Loss",
    "95% interval",
    "Margin",
    Column("Break-even, calls", detail=True),
    Column("Outcome", words=True),
)
_SIDES = ("Side", "Cost of 1,000 calls", "Latency, median", "Latency, 95th percentile")


def _bar(found: Incumbent) -> Bar:
    drop = found.drop
    low, high = 100 * drop.interval.low, 100 * drop.interval.high
    return Bar(found.name, 100 * drop.value, low, high, points_text(drop.value), "tuned", 100 * drop.margin)


def _row(each: Replacement) -> Row:
    found, drop, even = each.incumbent, each.incumbent.drop, each.break_even
    return row(
        Cell(found.name, found.model),
        ", ".join(found.versions),
        f"{found.answered:,} of {found.answered + sum(found.gaps.values()):,}",
        Cell(points_text(drop.value), f"{drop.items:,} items in {drop.clusters:,} clusters"),
        Cell(points_interval(drop.interval), drop.method),
        f"{100 * drop.margin:g}",
        Cell("none", even.why) if even.calls is None else f"{even.calls:,.0f}",
        each.outcome,
    )


def _sides(evidence: Evidence) -> list[Row]:
    assert evidence.incumbents is not None
    sides: list[tuple[str | Cell, Serving]] = [("tuned", evidence.incumbents.tuned)]
    sides += [(Cell(each.arm, _frozen(each)), each.serving) for each in evidence.incumbents.compared]
    return [row(name, _cost(side), *_latency(side)) for name, side in sides]


def _cost(side: Serving) -> Cell:
    if side.cost_per_1000 is None:
        return Cell("unknown", side.missing["cost"])
    return Cell(amount(side.cost_per_1000), side.basis)


def _latency(side: Serving) -> tuple[Cell, Cell]:
    if side.latency is None:
        unknown = Cell("unknown", side.missing["latency"])
        return unknown, unknown
    timed = side.latency
    return Cell(f"{timed.p50:.2f} s"), Cell(f"{timed.p95:.2f} s", f"{timed.answers:,} answers, {timed.how}")


def _frozen(found: Incumbent) -> str:
    versions = ", ".join(f"{name} ({count:,})" for name, count in found.versions.items())
    paid = "cost unknown" if found.cost is None else f"cost {amount(found.cost)}"
    return (
        f"{count_of(found.answered, 'answer')} of {versions} from {found.url}, {found.first[:16]} to "
        f"{found.last[:16]} UTC; {found.prompt_tokens:,} prompt and {found.completion_tokens:,} reply tokens, {paid}. "
        f"Frozen in {found.file} (SHA-256 {found.file_digest[:12]}…)."
    )
