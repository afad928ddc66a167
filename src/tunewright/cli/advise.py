"""Whether to train at all: advise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunewright.cli.app import HERE, Folder, Json, app
from tunewright.cli.console import RESUMES, session
from tunewright.cli.measure import Minutes


@app.command()
def advise(
    stored: Annotated[
        Path | None,
        typer.Argument(metavar="[ADVICE]", help="Decide anew from stored advice (its ID or file); measure nothing."),
    ] = None,
    no_pilot: Annotated[
        bool, typer.Option("--no-pilot", help="Train no pilot: what training brings is then not known.")
    ] = False,
    minutes: Minutes = None,
    project: Folder = HERE,
    json: Json = False,
) -> None:
    """Prompt, retrieve (exit 3), fine-tune (0) or can't tell (4): three signals and a pilot, measured on dev.

    What is measured: the score over the number of demonstrations, how special vocabulary and format are, from how many
    calls on training pays, and a pilot adapter on a part of the rows against the best prompt. Goes on where it was
    stopped.
    """
    import tunewright
    from tunewright.api import Project
    from tunewright.cli.advice_tables import advice_tables
    from tunewright.config.project import ProjectFolder
    from tunewright.core.errors import UserError

    with session(json, project, kept=RESUMES) as current:
        if stored is None:
            opened = tunewright.open(project, current.reporter)
            result = opened.advise(pilot=not no_pilot, minutes=minutes)
            document = {**result.as_dict(), "prospects": [told.as_dict() for told in opened.prospects()]}
        elif no_pilot or minutes is not None:
            option = "--no-pilot" if no_pilot else "--minutes"
            raise UserError("stored advice is only read", where=option, fix="Leave one of the two out.")
        else:
            # Not opened as a project: the file is enough, wherever it lies.
            result = Project(ProjectFolder(project), current.reporter).advise(stored)
            document = result.as_dict()
        current.show(document, *advice_tables(result))
        raise typer.Exit(result.decision.exit_code)
