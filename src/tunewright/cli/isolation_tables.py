"""What the isolation test found, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tunewright.serving.isolation import IsolationResult

EXIT_CODES = {"isolated": 0, "not isolated": 3, "can't tell": 4}
_SHOWN = 8


def isolation_table(result: IsolationResult) -> list[RenderableType]:
    """Each check, the failures, and what follows."""
    table = Table("engine asked", "answers", "worst shortfall", "wrong", title=f"Isolation of {result.engine}")
    for check in result.checks:
        wrong = str(len(check.failures) or "none") if check.asked else "not asked: takes two adapters"
        table.add_row(check.name, str(check.asked), f"{check.worst:.3f} nats", wrong)
    lines = [
        f"{check.name}: {failure.asked} was asked, and the answer"
        + (f" is that of {failure.like}" if failure.like else f" falls short by {failure.shortfall:.1f} nats")
        for check in result.checks
        for failure in check.failures
    ]
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more (--json tells them all)"]
    lines += [f"{one} and {other} answer alike here, and could not be told apart" for one, other in result.alike]
    lines.append(_conclusion(result))
    return [table, "\n".join(lines)]


def _conclusion(result: IsolationResult) -> str:
    adapters = len(result.models) - 1
    models = f"the base and {adapters} adapter{'' if adapters == 1 else 's'}"
    if result.verdict == "isolated":
        return (
            f"Isolated: {result.engine} keeps {models} apart; no token fell short of the oracle's choice by over "
            f"{result.tolerance} nats."
        )
    if result.verdict == "not isolated":
        return f"NOT isolated: {result.engine} answers with another model than the one that was asked. Do not serve."
    return f"Can't tell: no answer was wrong, but some of {models} answer alike."
