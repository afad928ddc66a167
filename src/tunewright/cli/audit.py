"""``audit``: the record of all changes to tenants, keys, limits and releases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tunewright.cli.app import DEPLOY, command, group
from tunewright.cli.console import FAILED, Session
from tunewright.cli.releases import AUTHOR_WIDTH

if TYPE_CHECKING:
    from tunewright.serving.tenants import AuditLine

audit_app = group("audit", DEPLOY, "Show and verify the record of changes to tenants, keys, limits and releases.")


@command(audit_app, "show", example="tunewright audit show", status=False, database=True)
def audit_show(run: Session) -> None:
    """List every change: who made it, when, and what changed."""
    with run.project.state() as state:
        lines = state.audit.lines()
    document = {"lines": lines}
    run.show(document, audit_table(lines) if lines else "Nothing has been changed yet.")


@command(audit_app, "verify", example="tunewright audit verify", status=False, database=True)
def audit_verify(
    run: Session,
    noted: Annotated[
        str | None, typer.Option(help="Digest of a line, noted elsewhere, that must still be in the record.")
    ] = None,
) -> int | None:
    """Check the record, what follows from it, the usage and SQLite's file. Exit code 1 if something was changed."""
    with run.project.state() as state:
        check = state.verify(noted)
    whole = f"{check.lines} lines, all as written. Digest of the last one, to note elsewhere: {check.head}"
    if not check.lines:
        whole = "Nothing has been changed yet: there is no line."
    run.show(check.as_dict(), "\n".join(check.faults) if check.faults else whole)
    return FAILED if check.faults else None


def audit_table(lines: Sequence[AuditLine]) -> Table:
    """Return the table of changes."""
    from tunewright.api.audit_text import audit_details

    table = Table()
    table.add_column("line", justify="right")
    for name in ("when", "by", "what", "of", "details"):
        table.add_column(name, overflow="fold", max_width=AUTHOR_WIDTH if name == "by" else None)
    for line in lines:
        details = ", ".join(audit_details(line))
        table.add_row(
            str(line.number), line.time[:16].replace("T", " "), line.actor or "", line.action, line.subject, details
        )
    return table
