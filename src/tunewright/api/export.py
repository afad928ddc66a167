"""The group ``project.export``, as in ``tunewright export …``."""

from __future__ import annotations

from tunewright.api.context import ProjectGroup, verb
from tunewright.export import verbs


class ProjectExport(ProjectGroup):
    """Verbs that export a project's adapters for other engines."""

    compressed = verb(verbs.compressed)
    gguf = verb(verbs.gguf)
    hub = verb(verbs.hub)
    merge = verb(verbs.merge)
    ollama = verb(verbs.ollama)
