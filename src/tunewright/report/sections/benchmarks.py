"""Section on the regression benchmarks, with the adapter off and on."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tunewright.evidence.benchmarks import Suite, Unit
from tunewright.evidence.schema import Evidence
from tunewright.report.blocks import Block, Cell, Figure, Lead, Notes, Row, Section, Table, cells
from tunewright.report.plots import TUNED, Bar, forest_plot
from tunewright.report.text import suite_result

_AXES: dict[Unit, str] = {"share": "loss, points", "nats per token": "loss, nats per token"}


def section(evidence: Evidence) -> Section | None:
    """Return every suite with its result and the loss that its margin allows."""
    found = evidence.regressions
    if found is None:
        return None
    blocks: list[Block] = [
        Lead(
            "The same items with the adapter off and on. A suite with a margin is passed when the one-sided 95% limit "
            "of the loss lies below the margin, which the upright mark shows; it decides only if its controls passed."
        )
    ]
    for place, (unit, axis) in enumerate(_AXES.items()):
        suites = [suite for suite in found.suites if suite.unit == unit]
        if suites:
            title = f"Loss of general ability, {axis}, with 95% intervals"
            drawn = forest_plot(f"regressions-{place}", title, [_bar(suite) for suite in suites], axis=axis, zero=True)
            blocks.append(Figure(Markup(drawn)))
    if found.suites:
        blocks.append(_table(found.suites))
    controls = tuple(_controls(suite) for suite in found.suites if suite.controls)
    missing = tuple(f"Not measured: {reason}" for reason in found.not_measured)
    left_out = tuple(f"{suite.name}, left out: {reason}" for suite in found.suites for reason in suite.left_out)
    if controls or missing or left_out:
        blocks.append(Notes((*controls, *left_out, *missing)))
    return Section("regressions", "What was forgotten", tuple(blocks))


def _scale(suite: Suite) -> float:
    return 100.0 if suite.unit == "share" else 1.0


def _bar(suite: Suite) -> Bar:
    scale = _scale(suite)
    low, high = scale * suite.interval.low, scale * suite.interval.high
    margin = None if suite.margin is None else scale * suite.margin
    return Bar(suite.name, scale * suite.drop, low, high, _amount(suite, suite.drop, "+"), TUNED, margin)


def _amount(suite: Suite, value: float, sign: str = "") -> str:
    digits = 1 if suite.unit == "share" else 3
    return f"{round(_scale(suite) * value, digits) + 0.0:{sign}.{digits}f}"


def _table(suites: Sequence[Suite]) -> Table:
    head = ("Suite", "Items", "Adapter off", "Adapter on", "Loss", "Loss at most (95%)", "Margin", "Result")
    return Table("Table of suites", head, tuple(_row(suite) for suite in suites))


def _row(suite: Suite) -> Row:
    needed = f"about {suite.items_needed:,} items needed" if suite.items_needed else ""
    drift = ""
    if suite.divergence is not None:
        drift = f"divergence {suite.divergence:.3f} nats per token"
    return Row(
        cells(
            Cell(suite.name, suite.metric),
            Cell(f"{suite.items:,}", "" if suite.clusters in (None, suite.items) else f"{suite.clusters:,} clusters"),
            _amount(suite, suite.base),
            Cell(_amount(suite, suite.tuned), drift),
            Cell(
                _amount(suite, suite.drop, "+"),
                f"{_amount(suite, suite.interval.low, '+')} to {_amount(suite, suite.interval.high, '+')}",
            ),
            Cell(_amount(suite, suite.limit, "+"), suite.method),
            "none" if suite.margin is None else _amount(suite, suite.margin),
            Cell(suite_result(suite), needed if suite.result == "can't tell" else ""),
        )
    )


def _controls(suite: Suite) -> str:
    results = "; ".join(
        f"{control.name} {control.score:.3g}, must be {control.wanted} ({'passed' if control.passed else 'FAILED'})"
        for control in suite.controls
    )
    return f"Controls of {suite.name}: {results}."
