"""What the commands on the serving state share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.console import Session

if TYPE_CHECKING:
    from tunewright.road import Road

StateUrl = Annotated[
    str | None,
    typer.Option(
        "--state",
        help="Where the serving state is: postgresql://USER@HOST/DATABASE or sqlite:///FILE.",
        show_default="the recipe's",
    ),
]


def road_at(current: Session, project: Path, state: str | None) -> Road:
    """The project's verbs, on the serving state that ``--state`` names."""
    import tunewright
    from tunewright.project import Project
    from tunewright.road import Road

    road = tunewright.open(project, current.reporter)
    if state is None:
        return road
    recipe = road.project.recipe
    serve = recipe.serve.model_copy(update={"state": state})
    return Road(Project(project, recipe.model_copy(update={"serve": serve})), current.reporter)
