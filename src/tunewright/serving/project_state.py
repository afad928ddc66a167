"""The serving state of a project: its own SQLite file, or the database that ``serve.database_url`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunewright.core.errors import UserError
from tunewright.data.versions.version import current_author
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.serving.tenants import State


def has_state(project: OpenProject) -> bool:
    """Return whether there is a serving state to read."""
    from tunewright.serving.tenants import exists

    named = project.folder.config.serve.database_url
    return project.folder.serving_state.exists() if named is None else exists(named)


def open_state(project: OpenProject, *, make: bool = False, serving: bool = False) -> State:
    """Return the serving state, which the caller closes. The project's own state is created if it is missing.

    Args:
        make: also create a state elsewhere. Otherwise a mistyped path would become an empty state.
        serving: open it for a server, whose requests wait for no slow statement.

    Raises:
        UserError: the database is missing, unreachable, or of a newer tunewright.
    """
    from tunewright.serving.tenants import State, exists

    named = project.folder.config.serve.database_url
    url = named or f"sqlite:///{project.folder.serving_state.resolve()}"
    if named is not None and not exists(named):
        if not make:
            fix = "Check the path, or create a state there with `tunewright tenant add` or `tunewright deploy`."
            raise UserError("There is no serving state", where=named, fix=fix)
        project.reporter.say(f"Creating a serving state: {named}")
    return State(url, current_author(project.folder.root), serving=serving)
