"""``audit``: the record of all changes to tenants, keys, limits and releases."""

from __future__ import annotations

from typing import Annotated

import typer

from tunewright.cli.app import DEPLOY, command, group
from tunewright.cli.console import FAILED, Session

audit_app = group("audit", DEPLOY, "Show and verify the record of changes to tenants, keys, limits and releases.")


@command(audit_app, "show", example="tunewright audit show", status=False, database=True)
def audit_show(run: Session) -> None:
    """List every change: who made it, when, and what changed."""
    from tunewright.serving.tenants.blocks import audit_table

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
