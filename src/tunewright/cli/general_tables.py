"""What suites of general ability came to, as people read it and as ``--json`` prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tunewright.evidence.benchmarks import Benchmarks, Control, Suite

if TYPE_CHECKING:
    from tunewright.evaluation.benchmarks.runner import BenchmarkResult

_COLOURS = {"not worse": "green", "worse": "bold red", "can't tell": "yellow"}


def general_document(result: BenchmarkResult) -> dict[str, Any]:
    """The result as JSON."""
    told = result.standing
    return {
        "adapter": result.adapter.name,
        "measured": result.measured,
        "evaluation": None if result.folder is None else str(result.folder),
        "result": told.result,
        "decides": told.decides,
        "reasons": list(told.reasons),
        "general": result.general.model_dump(mode="json"),
    }


def general_tables(general: Benchmarks) -> list[RenderableType]:
    """The suites with the adapter off and on, and their controls."""
    table = Table(title="What the base could do before, adapter off and on", title_justify="left")
    for name in ("suite", "items", "off", "on", "drop", "95% interval", "limit", "margin", "needed", "result"):
        table.add_column(name, justify="left" if name in ("suite", "result") else "right", no_wrap=True)
    for suite in general.suites:
        result = Text(suite.result, style=_COLOURS[suite.result]) if suite.gates else Text("decides nothing")
        interval = f"{_drop(suite, suite.interval.low)} to {_drop(suite, suite.interval.high)}"
        needed = "" if suite.items_needed is None else f"{suite.items_needed:,}"
        margin = "none" if suite.margin is None else _drop(suite, suite.margin)
        table.add_row(
            suite.name,
            f"{suite.items:,}",
            _level(suite, suite.base),
            _level(suite, suite.tuned),
            _drop(suite, suite.drop),
            interval,
            _drop(suite, suite.limit),
            margin,
            needed,
            result,
        )
    tables: list[RenderableType] = [table] if general.suites else []
    if any(suite.controls for suite in general.suites):
        tables.append(_controls_table(general))
    for suite in general.suites:
        if suite.divergence is not None:
            tables.append(f"Divergence from base to tuned: {suite.divergence:.4f} nats per token.")
        tables += [f"{suite.name}: {told}." for told in suite.left_out]
    return tables


def _controls_table(general: Benchmarks) -> Table:
    table = Table(title="Controls: a suite that fails one decides nothing", title_justify="left")
    for name in ("suite", "control", "items", "score", "has to be", ""):
        table.add_column(name, justify="right" if name in ("items", "score") else "left", overflow="fold")
    for suite in general.suites:
        for control in suite.controls:
            passed = Text("passed", style="green") if control.passed else Text("failed", style="bold red")
            table.add_row(
                suite.name, control.name, f"{control.items:,}", _control(suite, control), control.wanted, passed
            )
    return table


def _control(suite: Suite, control: Control) -> str:
    return f"{control.score:.1%}" if suite.unit == "share" else f"{control.score:.3f}"


def _level(suite: Suite, value: float) -> str:
    return f"{value:.1%}" if suite.unit == "share" else f"{value:.3f}"


def _drop(suite: Suite, value: float) -> str:
    """Points, or nats per token; with a sign, so that a rise is seen as one."""
    return f"{round(100 * value, 1) + 0.0:+.1f}" if suite.unit == "share" else f"{round(value, 3) + 0.0:+.3f}"
