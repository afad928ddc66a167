"""The group ``project.export``, as in ``tunewright export …``."""

from __future__ import annotations

from tunewright.api.context import ProjectGroup
from tunewright.export import verbs


class ProjectExport(ProjectGroup):
    """Verbs that export a project's adapters for other engines."""

    compressed = verbs.compressed
    gguf = verbs.gguf
    hub = verbs.hub
    merge = verbs.merge
    ollama = verbs.ollama
