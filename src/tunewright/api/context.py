"""A project with what its verbs share, whichever group they are in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tunewright.adapters.fit import require_fit, trained_quantize
from tunewright.adapters.registry import Adapter
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.versions import DatasetVersion, load_version
from tunewright.data.versions.author import current_author
from tunewright.models.bases import Base, resolve_base

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat
    from tunewright.evaluation.arm_runner import ArmRunner
    from tunewright.serving.state import State


@dataclass(frozen=True)
class ProjectContext:
    """A project, who is told of what happens in it, and its base and chat format: loaded once, when first needed."""

    folder: ProjectFolder
    reporter: Reporter

    @cached_property
    def base(self) -> Base:
        """The config's base, found, fetched and checked."""
        config = self.folder.config
        return resolve_base(config.base, config.revision, self.folder.root, self.reporter)

    @cached_property
    def chat(self) -> ChatFormat:
        """How conversations become tokens here."""
        from tunewright.chat import open_chat

        return open_chat(self.base, self.folder.config.chat, self.reporter)

    def state(self, *, make: bool = False) -> State:
        """Return the serving state; the caller closes it. The project's own is made where there is none.

        Args:
            make: one that is elsewhere, too. Else a path with a mistake in it would be an empty state.

        Raises:
            UserError: a database that is not there or cannot be reached, or of a newer tunewright.
        """
        from tunewright.serving.state import State, is_made

        named = self.folder.config.serve.state
        url = named or f"sqlite:///{self.folder.serving_state.resolve()}"
        if named is not None and not is_made(named):
            if not make:
                fix = "Look at the path; or `tunewright tenant add` and `tunewright deploy` make a state there."
                raise UserError("there is no serving state", where=named, fix=fix)
            self.reporter.say(f"Making a serving state: {named}")
        return State(url, current_author(self.folder.root))

    def arm_runner(self, adapter: Adapter | None = None) -> ArmRunner:
        """The arms on the base as ``adapter`` was trained on it, or will be by the config; or as the config says.

        Raises:
            UserError: an adapter that does not fit base or chat format, or of another version than the current one.
        """
        from tunewright.evaluation.arm_runner import ArmRunner
        from tunewright.evaluation.generations import Generator

        config = self.folder.config
        version = load_version(self.folder.dataset)
        if adapter is not None:
            require_fit(adapter, self.base, self.chat)
            self._require_version(adapter, version)
        trained = config.train.quantize if adapter is None else trained_quantize([adapter])
        quantize = config.evaluate.quantize or trained
        generator = Generator.of(self.folder, self.base, self.chat, quantize, self.reporter, adapter)
        return ArmRunner(self.folder, version, generator, self.reporter)

    def _require_version(self, adapter: Adapter, version: DatasetVersion) -> None:
        trained_on = adapter.dataset
        if trained_on is None:
            self.reporter.warn(
                f"{adapter.name} was imported, and what it was trained on is not known: held-out rows may be among it."
            )
        elif trained_on != version.digest:
            raise UserError(
                f"{adapter.name} was trained on dataset version {trained_on[:12]}, the current one is "
                f"{version.digest[:12]}: rows that it trained on may be held out there",
                fix="Train on the current version first: tunewright train",
            )
