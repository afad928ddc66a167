"""What the commands on the serving state share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.console import Session

if TYPE_CHECKING:
    from tunewright.api import Project

StateUrl = Annotated[
    str | None,
    typer.Option(
        "--state",
        help="Where the serving state is: postgresql://USER@HOST/DATABASE or sqlite:///FILE.",
        show_default="the config's",
    ),
]


def project_at(current: Session, project: Path, state: str | None) -> Project:
    """The project's verbs, on the serving state that ``--state`` names."""
    import tunewright
    from tunewright.api import Project
    from tunewright.config.project import ProjectFolder

    opened = tunewright.open(project, current.reporter)
    if state is None:
        return opened
    config = opened.folder.config
    serve = config.serve.model_copy(update={"database_url": state})
    return Project(ProjectFolder(project, config.model_copy(update={"serve": serve})), current.reporter)
