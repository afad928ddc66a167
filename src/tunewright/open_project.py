"""An open project, the first parameter of every verb that needs its base, its chat format or its workers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING

from tunewright.config.project import OpenFolder
from tunewright.core.workers import Workers
from tunewright.models.bases import Base, resolve_base

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat


class OpenProject(OpenFolder):
    """An open project. Its base and chat format are loaded once, when first needed."""

    @cached_property
    def base(self) -> Base:
        """The config's base, found, downloaded and checked."""
        config = self.folder.config
        return resolve_base(config.base_model, config.revision, self.folder.root, self.reporter)

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format that turns conversations into tokens."""
        from tunewright.chat import open_chat

        return open_chat(self.base, self.folder.config.chat, self.reporter)

    def workers(self) -> AbstractContextManager[Workers]:
        """Return the workers of ``compute.cluster``, to be entered; they are checked then."""
        from tunewright.compute import open_workers

        return open_workers(self.folder.config, self.reporter)
