"""``regressions``: whether the base's general abilities survived the fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tunewright.cli.app import EVALUATE, Adapter, app, command
from tunewright.cli.console import RESUMES, Session

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tunewright.evaluation.benchmarks.runner import BenchmarkResult
    from tunewright.evidence.benchmarks import Benchmarks, Control, Suite

_COLOURS = {"not worse": "green", "worse": "bold red", "can't tell": "yellow"}


@command(
    app, "regressions", panel=EVALUATE, cluster=True, example="tunewright regressions legal-4f1c02a9", kept=RESUMES
)
def regressions(run: Session, adapter: Adapter = None) -> int:
    """Compare general abilities without and with the adapter: not worse (exit code 0), worse (3) or can't tell (4).

    The suites are those of the config's `regressions` section; `evaluate` measures them too. Resumes where it stopped.
    """
    result = run.project.regressions(adapter)
    standing = result.standing
    evidence = (
        f"In the evidence: {result.folder}"
        if result.folder
        else "`tunewright evaluate` adds it to the adapter's evidence, once there is some."
    )
    run.show(regressions_document(result), *regressions_tables(result.benchmarks), *standing.reasons, evidence)
    return standing.exit_code


def regressions_document(result: BenchmarkResult) -> dict[str, Any]:
    """Return the result as JSON."""
    standing = result.standing
    return {
        "adapter": result.adapter.name,
        "measured": result.measured,
        "evaluation": None if result.folder is None else str(result.folder),
        "result": standing.result,
        "decides": standing.decides,
        "reasons": list(standing.reasons),
        "regressions": result.benchmarks.model_dump(mode="json"),
    }


def regressions_tables(benchmarks: Benchmarks) -> list[RenderableType]:
    """Return the suites without and with the adapter, and their controls."""
    table = Table(title="General abilities without and with the adapter", title_justify="left")
    for name in ("suite", "items", "off", "on", "drop", "95% interval", "limit", "margin", "needed", "result"):
        table.add_column(name, justify="left" if name in ("suite", "result") else "right", no_wrap=True)
    for suite in benchmarks.suites:
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
    tables: list[RenderableType] = [table] if benchmarks.suites else []
    if any(suite.controls for suite in benchmarks.suites):
        tables.append(_controls_table(benchmarks))
    for suite in benchmarks.suites:
        if suite.divergence is not None:
            tables.append(f"Divergence from base to tuned: {suite.divergence:.4f} nats per token.")
        tables += [f"{suite.name}: {reason}." for reason in suite.left_out]
    return tables


def _controls_table(benchmarks: Benchmarks) -> Table:
    table = Table(title="Controls: a suite that fails one decides nothing", title_justify="left")
    for name in ("suite", "control", "items", "score", "required", ""):
        table.add_column(name, justify="right" if name in ("items", "score") else "left", overflow="fold")
    for suite in benchmarks.suites:
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
    """Return points or nats per token, with a sign so that a gain is visible."""
    return f"{round(100 * value, 1) + 0.0:+.1f}" if suite.unit == "share" else f"{round(value, 3) + 0.0:+.3f}"
