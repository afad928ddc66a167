"""What the isolation test found, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tunewright.serving.isolation import IsolationResult
    from tunewright.serving.state import IsolationTest

EXIT_CODES = {"isolated": 0, "not isolated": 3, "can't tell": 4}


def isolation_table(result: IsolationResult | IsolationTest, adapters: int) -> list[RenderableType]:
    """Each check, the failures, and what follows for the base and so many adapters."""
    table = Table("engine asked", "answers", "worst shortfall", "wrong", title=f"Isolation of {result.engine}")
    for check in result.checks:
        wrong = str(check.wrong or "none") if check.asked else "not asked: takes two adapters"
        table.add_row(check.name, str(check.asked), f"{check.worst:.3f} nats", wrong)
    return [table, "\n".join([*result.reasons, _conclusion(result, adapters)])]


def _conclusion(result: IsolationResult | IsolationTest, adapters: int) -> str:
    models = f"the base and {adapters} adapter{'' if adapters == 1 else 's'}"
    if result.verdict == "isolated":
        return (
            f"Isolated: {result.engine} keeps {models} apart; no token fell short of the oracle's choice by over "
            f"{result.tolerance} nats."
        )
    if result.verdict == "not isolated":
        return f"NOT isolated: {result.engine} answers with another model than the one that was asked. Do not serve."
    return f"Can't tell: no answer was wrong, but some of {models} answer alike."
