"""Section on the regression benchmarks, with the adapter off and on."""

from __future__ import annotations

from dataclasses import replace

from tunewright.evidence.benchmarks import Benchmarks, Control, Result, Suite, Unit
from tunewright.render.blocks import (
    Bar,
    Block,
    Cell,
    Column,
    Figure,
    Lead,
    Notes,
    Row,
    Section,
    ToneOfResult,
    row,
    table,
)

_AXES: dict[Unit, str] = {"share": "loss, points", "nats per token": "loss, nats per token"}
_TONES: dict[Result, ToneOfResult] = {"not worse": "yes", "worse": "no", "can't tell": "open"}


def section(found: Benchmarks) -> Section:
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
        suites = table("Table of suites", _SUITES, map(_row, found.suites))
        used = [
            place
            for place, column in enumerate(suites.head)
            if column.name not in _MAY_BE_EMPTY or any(r.cells[place].text not in ("", "none") for r in suites.rows)
        ]
        rows = tuple(Row(tuple(r.cells[place] for place in used)) for r in suites.rows)
        blocks.append(replace(suites, head=tuple(suites.head[place] for place in used), rows=rows))
    controls = tuple(_control(suite, control) for suite in found.suites for control in suite.controls)
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


_MAY_BE_EMPTY = ("Margin", "Items needed")
_SUITES = (
    "Suite",
    "Items",
    "Off",
    "On",
    "Loss",
    "95% interval",
    "At most",
    "Margin",
    "Items needed",
    Column("Result", words=True),
)
_CONTROLS = (
    "Suite",
    Column("Control", words=True),
    "Items",
    "Score",
    Column("Required", words=True),
    Column("Result", words=True),
)


def _bar(suite: Suite) -> Bar:
    scale = 100.0 if suite.unit == "share" else 1.0
    low, high = scale * suite.interval.low, scale * suite.interval.high
    margin = None if suite.margin is None else scale * suite.margin
    return Bar(suite.name, scale * suite.drop, low, high, _amount(suite, suite.drop, "+"), "tuned", margin)


def _level(suite: Suite, value: float) -> str:
    return f"{value:.1%}" if suite.unit == "share" else f"{value:.3f} nats"


def _amount(suite: Suite, value: float, sign: str = "") -> str:
    """Return points, or nats per token, where a rounded -0.0 is 0.0."""
    scale, digits = (100, 1) if suite.unit == "share" else (1, 3)
    return f"{round(scale * value, digits) + 0.0:{sign}.{digits}f}"


def _row(suite: Suite) -> Row:
    clusters = "" if suite.clusters in (None, suite.items) else f"{suite.clusters:,} clusters"
    if suite.gates:
        result = Cell(suite.result, tone=_TONES[suite.result])
    elif suite.margin is None:
        result = Cell("no margin: decides nothing")
    else:
        result = Cell(f"decides nothing: {suite.failed[0].name} failed")
    return row(
        Cell(suite.name, suite.metric),
        Cell(f"{suite.items:,}", clusters),
        _level(suite, suite.base),
        _level(suite, suite.tuned),
        _amount(suite, suite.drop, "+"),
        f"{_amount(suite, suite.interval.low, '+')} to {_amount(suite, suite.interval.high, '+')}",
        Cell(_amount(suite, suite.limit, "+"), suite.method),
        "none" if suite.margin is None else _amount(suite, suite.margin),
        "" if suite.items_needed is None else f"{suite.items_needed:,}",
        result,
    )


def _control(suite: Suite, control: Control) -> Row:
    result = Cell("passed", tone="yes") if control.passed else Cell("FAILED", tone="no")
    return row(suite.name, control.name, f"{control.items:,}", _level(suite, control.score), control.wanted, result)
