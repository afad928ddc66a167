"""An open project, which every verb is a function of, and groups of verbs with the project filled in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from tunewright.adapters.compatibility import require_compatible, trained_quantization
from tunewright.adapters.registry import Adapter
from tunewright.core.errors import UserError
from tunewright.core.workers import ModelWorkers
from tunewright.data.versions import DatasetVersion, load_version
from tunewright.models.bases import base_here
from tunewright.open_project import OpenProject
from tunewright.serving import project_state

if TYPE_CHECKING:
    from tunewright.evaluation.arm_runner import ArmRunner
    from tunewright.training.trainings import Trainings


class ProjectContext(OpenProject):
    """An open project with its places of work: workers, trainings, serving state."""

    def model_workers(self) -> AbstractContextManager[ModelWorkers | None]:
        """Return the workers of ``compute.cluster`` that answer prompts, to be entered; None without a cluster."""
        config = self.folder.config
        if config.compute.cluster is None:
            return nullcontext()
        from tunewright.compute import open_model_workers
        from tunewright.evaluation.answer_worker import unload

        return open_model_workers(config, base_here, self.base, unload, self.reporter)

    @contextmanager
    def trainings(self) -> Iterator[Trainings]:
        """Yield the place of independent trainings: this process, or the machines of ``compute.cluster``, once checked.

        Raises:
            UserError: as for `workers`; or no machine has room for a training, or one does not see the project's folder
                or lacks the base.
        """
        from tunewright.training.trainings import open_trainings

        with (
            self.workers() as workers,
            open_trainings(workers, self.folder, self.base, self.reporter) as trainings,
        ):
            yield trainings

    state = project_state.open_state

    def arm_runner(self, adapter: Adapter | None = None, workers: ModelWorkers | None = None) -> ArmRunner:
        """Return a runner of arms on the base, quantized as ``adapter`` was trained (None: as the config says).

        Args:
            adapter: the adapter that will answer, if it is trained.
            workers: a cluster's, which compute the answers (None: this process).

        Raises:
            UserError: the adapter does not fit the base or chat format, or was trained on another version.
        """
        from tunewright.evaluation.arm_runner import ArmRunner
        from tunewright.evaluation.generations import Generator

        config = self.folder.config
        version = load_version(self.folder.dataset)
        if adapter is not None:
            require_compatible(adapter, self.base, self.chat)
            self._require_version(adapter, version)
        trained = config.train.quantization if adapter is None else trained_quantization([adapter])
        quantization = config.evaluate.quantization or trained
        generator = Generator.of(self.folder, self.base, self.chat, quantization, self.reporter, adapter, workers)
        return ArmRunner(self.folder, version, generator, self.reporter)

    def _require_version(self, adapter: Adapter, version: DatasetVersion) -> None:
        trained_on = adapter.dataset
        if trained_on is None:
            self.reporter.warn(
                f"{adapter.name} was imported: its training data is unknown and may include held-out rows."
            )
        elif trained_on != version.digest:
            raise UserError(
                f"{adapter.name} was trained on dataset version {trained_on[:12]}, but the current version is "
                f"{version.digest[:12]}, which may hold out rows that it trained on",
                fix="Train on the current version first: tunewright train",
            )


class ProjectGroup(ProjectContext):
    """The same open project with other verbs: ``tunewright data add`` is ``project.data.add``."""

    def __init__(self, project: ProjectContext) -> None:
        self.__dict__ = project.__dict__  # a base that one group loads is loaded for all
