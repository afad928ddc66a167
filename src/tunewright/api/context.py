"""Groups of verbs of an open project."""

from __future__ import annotations

from tunewright.open_project import OpenProject

ProjectContext = OpenProject


class ProjectGroup(OpenProject):
    """The same open project with other verbs: ``tunewright data add`` is ``project.data.add``."""

    def __init__(self, project: OpenProject) -> None:
        self.__dict__ = project.__dict__  # a base that one group loads is loaded for all
