"""``general``: what the base could do before, with an adapter off and on."""

from __future__ import annotations

from typing import Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import RESUMES, session


@app.command()
def general(
    adapter: Annotated[
        str | None, typer.Argument(help="The adapter's name, or its beginning.", show_default="the newest")
    ] = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """What the base could do before, with the adapter off and on: not worse (exit 0), worse (3) or can't tell (4).

    The suites are those of the config's regressions section; `evaluate` measures them too. Resumes where it stopped.
    """
    import tunewright
    from tunewright.cli.general_tables import general_document, general_tables

    with session(json, project, kept=RESUMES) as current:
        result = tunewright.open(project, current.reporter).general(adapter)
        told = result.standing
        evidence = (
            f"In the evidence: {result.folder}"
            if result.folder
            else "`tunewright evaluate` puts it into the adapter's evidence, once there is some."
        )
        current.show(general_document(result), *general_tables(result.general), *told.reasons, evidence)
        raise typer.Exit(told.exit_code)
