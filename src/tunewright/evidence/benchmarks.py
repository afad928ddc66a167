"""The evidence's section on regression benchmarks: schema, rule and blocks; readable without torch or the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from tunewright.core.text import capitalised
from tunewright.evidence.common import Interval, Part
from tunewright.evidence.non_inferiority import Result
from tunewright.render.blocks import (
    Bar,
    Block,
    Cell,
    Figure,
    Lead,
    Notes,
    Row,
    Section,
    Table,
    ToneOfResult,
    row,
    table,
    words,
)

SuiteKind = Literal["samples", "choices", "instructions", "lm_eval"]
Unit = Literal["share", "nats per token"]


class Control(Part):
    """A measurement with a known outcome, which shows that the suite measures the intended ability."""

    name: Annotated[str, Field(description="The measurement, e.g. 'questions dealt to other items'.")]
    score: float
    items: int
    wanted: Annotated[str, Field(description="The required outcome in words, e.g. 'at least 90%'.")]
    passed: bool


class Suite(Part):
    """One suite on the same items with the adapter off and on."""

    name: str
    kind: SuiteKind
    unit: Unit
    metric: Annotated[str, Field(description="Score of an item, e.g. acc_norm; for a loss, lower is better.")]
    items: int
    clusters: Annotated[
        int | None, Field(description="Independent clusters among the items; null: items are drawn independently.")
    ] = None
    left_out: Annotated[
        tuple[str, ...], Field(description="Reason to number of items that could not be measured.")
    ] = ()
    base: Annotated[float, Field(description="Adapter off.")]
    tuned: Annotated[float, Field(description="Adapter on.")]
    drop: Annotated[float, Field(description="Drop of the score with the adapter on; negative if it is better.")]
    interval: Annotated[Interval, Field(description="Two-sided 95% interval of the drop.")]
    limit: Annotated[float, Field(description="One-sided 95% upper limit of the drop.")]
    method: Annotated[str, Field(description="Method of the interval and the limit.")]
    margin: Annotated[float | None, Field(description="The largest acceptable drop; null: none was set.")]
    changed: Annotated[
        float | None,
        Field(description="Share of items right in only one of the two; null if items are not right or wrong."),
    ]
    items_needed: Annotated[
        int | None,
        Field(
            description="Items needed to show no loss with 80% power, from the observed changes; null without a margin."
        ),
    ]
    expected_items: Annotated[
        int | None,
        Field(description="The same, computed beforehand for a tenth of the items changed; null: not computed."),
    ] = None
    divergence: Annotated[
        float | None,
        Field(description="On samples: Kullback-Leibler divergence from base to tuned, in nats per token."),
    ] = None
    divergence_interval: Interval | None = None
    truncated: Annotated[
        tuple[int, int] | None, Field(description="Answers cut at the token limit, adapter off and on.")
    ] = None
    controls: tuple[Control, ...]
    result: Annotated[
        Result, Field(description="Result from limit and interval against the margin; can't tell without a margin.")
    ]

    @property
    def failed(self) -> tuple[Control, ...]:
        """The controls that failed."""
        return tuple(control for control in self.controls if not control.passed)

    @property
    def gates(self) -> bool:
        """True if the suite may decide: a margin is set and all its controls passed."""
        return self.margin is not None and not self.failed


class Benchmarks(Part):
    """All measured regression benchmarks."""

    id: Annotated[str, Field(description="12 hex digits of a digest of everything that determines the measurement.")]
    adapter: Annotated[str, Field(description="The adapter's digest.")]
    suites: tuple[Suite, ...]
    not_measured: Annotated[
        tuple[str, ...], Field(description="Suites without a margin that could not be measured, with the reason.")
    ] = ()
    lineage: Annotated[
        dict[str, Any], Field(description="Base, template, weights, packages, digests of files, UTC time.")
    ]


@dataclass(frozen=True)
class RegressionResult:
    """Result of all benchmarks, with a reason per suite in plain sentences."""

    result: Result | None
    """None if no suite has a margin, so that there is no question to answer."""
    decides: bool
    """True if any suite may decide; the result is "can't tell" if suites have margins but none may decide."""
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0: not worse, or no margin set; 3: worse; 4: can't tell."""
        return {None: 0, "not worse": 0, "worse": 3, "can't tell": 4}[self.result]


def standing(benchmarks: Benchmarks) -> RegressionResult:
    """Return *worse* if any deciding benchmark is worse, *not worse* if none can be, else *can't tell*.

    All must be shown to be not worse, so the level needs no correction (an intersection-union test, Berger 1982).
    Without a margin there is no question, so the answer is not "can't tell".
    """
    deciding = [suite for suite in benchmarks.suites if suite.gates]
    asked = any(suite.margin is not None for suite in benchmarks.suites)
    reasons = tuple(capitalised(suite_text(suite)) for suite in benchmarks.suites) + tuple(
        f"Not measured: {reason}" for reason in benchmarks.not_measured
    )
    results = {suite.result for suite in deciding}
    result: Result | None = "worse" if "worse" in results else "not worse" if results == {"not worse"} else "can't tell"
    return RegressionResult(result if asked else None, bool(deciding), reasons)


def suite_text(suite: Suite) -> str:
    """Return a sentence about a suite: its measurement and result."""
    if suite.unit == "share":
        scores = f"{suite.base:.1%} with the adapter off, {suite.tuned:.1%} with it on"
    else:
        scores = f"{suite.base:.3f} nats per token with the adapter off, {suite.tuned:.3f} with it on"
    limit = _amount(suite, suite.limit)
    if suite.drop < 0:
        change = f"better by {_amount(suite, -suite.drop)}, worse by at most {limit} (95%)"
    else:
        change = f"worse by {_amount(suite, suite.drop)}, at most {limit} (95%)"
    alike = "" if suite.clusters in (None, suite.items) else f" in {suite.clusters:,} clusters"
    return f"{suite.name}, {suite.items:,} items{alike}: {scores}; {change}. {_follows(suite)}"


def _follows(suite: Suite) -> str:
    if suite.margin is None:
        return "It has no margin, so it decides nothing."
    margin = _amount(suite, suite.margin)
    if suite.failed:
        failed = suite.failed[0]
        return f"It decides nothing: {failed.name} scored {_level(suite, failed.score)}, but must be {failed.wanted}."
    if suite.result == "worse":
        return f"The whole interval lies above the margin of {margin}: the adapter is worse here than the base."
    if suite.result == "not worse":
        return f"That is below the margin of {margin}: not worse."
    needed = f" About {suite.items_needed:,} items would settle it." if suite.items_needed else ""
    return f"Against a margin of {margin} this many items can't tell.{needed}"


def _amount(suite: Suite, drop: float) -> str:
    if suite.unit == "share":
        return f"{round(100 * drop, 1) + 0.0:g} points"
    return f"{round(drop, 3) + 0.0:g} nats"


def _level(suite: Suite, score: float) -> str:
    return f"{score:.1%}" if suite.unit == "share" else f"{score:.3f} nats"


_AXES: dict[Unit, str] = {"share": "loss, points", "nats per token": "loss, nats per token"}
_TONES: dict[Result, ToneOfResult] = {"not worse": "yes", "worse": "no", "can't tell": "open"}


def benchmarks_section(found: Benchmarks) -> Section:
    """Return every suite with its result and the loss that its margin allows, and the suites' controls."""
    blocks: list[Block] = [
        Lead(
            "General abilities, on the same items with the adapter off and on. A suite with a margin passes if the "
            "one-sided 95% limit of its loss (at most) lies below the margin. It decides only if its controls passed."
        )
    ]
    for place, (unit, axis) in enumerate(_AXES.items()):
        bars = tuple(_bar(suite) for suite in found.suites if suite.unit == unit)
        if bars:
            title = f"Loss of general ability, {axis}, with 95% intervals"
            caption = "An upright mark is a suite's margin." if any(bar.margin is not None for bar in bars) else ""
            blocks.append(Figure(f"regressions-{place}", title, bars, axis, zero=True, caption=caption))
    if found.suites:
        blocks.append(_suites_table(found.suites))
    controls = [
        (suite.name, each.name, f"{each.items:,}", _level(suite, each.score), each.wanted, _PASSED[each.passed])
        for suite in found.suites
        for each in suite.controls
    ]
    if controls:
        blocks.append(table("Table of the suites' controls", _CONTROLS, controls))
    notes = [f"{suite.name}, left out: {reason}." for suite in found.suites for reason in suite.left_out]
    notes += [
        f"{suite.name}: divergence from base to tuned {suite.divergence:.4f} nats per token."
        for suite in found.suites
        if suite.divergence is not None
    ]
    if notes:
        blocks.append(Notes(tuple(notes)))
    if found.not_measured:
        # In a terminal these are warnings while the suites run, and reasons of the result.
        blocks.append(Notes(tuple(f"Not measured: {reason}" for reason in found.not_measured), detail=True))
    return Section("regressions", "What was forgotten", tuple(blocks))


_PASSED = {True: Cell("passed", tone="yes"), False: Cell("FAILED", tone="no")}
_CONTROLS = ("Suite", *words("Control"), "Items", "Score", *words("Required", "Result"))


def _bar(suite: Suite) -> Bar:
    scale = 100.0 if suite.unit == "share" else 1.0
    low, high = scale * suite.interval.low, scale * suite.interval.high
    margin = None if suite.margin is None else scale * suite.margin
    return Bar(suite.name, scale * suite.drop, low, high, _number(suite, suite.drop, "+"), "tuned", margin)


def _number(suite: Suite, value: float, sign: str = "") -> str:
    """Return points, or nats per token, where a rounded -0.0 is 0.0."""
    scale, digits = (100, 1) if suite.unit == "share" else (1, 3)
    return f"{round(scale * value, digits) + 0.0:{sign}.{digits}f}"


def _suites_table(suites: Sequence[Suite]) -> Table:
    """Return the suites, without the columns of margins and of items needed if no suite has one."""
    margins = any(suite.margin is not None for suite in suites)
    needed = any(suite.items_needed is not None for suite in suites)

    def suite_row(suite: Suite) -> Row:
        clusters = "" if suite.clusters in (None, suite.items) else f"{suite.clusters:,} clusters"
        if suite.gates:
            result = Cell(suite.result, tone=_TONES[suite.result])
        elif suite.margin is None:
            result = Cell("no margin: decides nothing")
        else:
            result = Cell(f"decides nothing: {suite.failed[0].name} failed")
        margin = "none" if suite.margin is None else _number(suite, suite.margin)
        return row(
            Cell(suite.name, suite.metric),
            Cell(f"{suite.items:,}", clusters),
            _level(suite, suite.base),
            _level(suite, suite.tuned),
            _number(suite, suite.drop, "+"),
            f"{_number(suite, suite.interval.low, '+')} to {_number(suite, suite.interval.high, '+')}",
            Cell(_number(suite, suite.limit, "+"), suite.method),
            *([margin] if margins else []),
            *(["" if suite.items_needed is None else f"{suite.items_needed:,}"] if needed else []),
            result,
        )

    more = [*(["Margin"] if margins else []), *(["Items needed"] if needed else []), *words("Result")]
    head = ("Suite", "Items", "Off", "On", "Loss", "95% interval", "At most", *more)
    return table("Table of suites", head, map(suite_row, suites))
