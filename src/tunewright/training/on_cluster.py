"""Training in several processes of a cluster, which call the same function as those that torchrun starts.

Every machine sees the project's folder: rows are read from it, and checkpoints and the adapter are written to it by the
first process. The command that started them shows what it reports, passes a stop on, and signs the adapter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.signing import SigningKey, sign, store_signer
from tunewright.chat import ChatFormat, open_chat
from tunewright.compute import open_group
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.interrupts import finishing
from tunewright.core.io import digest, refused
from tunewright.core.progress import Reporter
from tunewright.data.versions import DatasetVersion, load_version
from tunewright.models.bases import Base, base_here
from tunewright.training import distributed
from tunewright.training.checkpoints import stop_on_signal, stopped_from
from tunewright.training.machine_check import open_site, require_site
from tunewright.training.run import micro_batch, require_fsdp_supported
from tunewright.training.trackers import require_trackers
from tunewright.training.train import TrainResult, find_trained, train, training_inputs
from tunewright.training.trainings import absolute, stored_adapter, wait_for_lock

if TYPE_CHECKING:
    from tunewright.compute.group import WorkerGroup

_WHERE = "compute.cluster"
_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@dataclass(frozen=True)
class TrainingJob:
    """A training of a project, by what decides its adapter."""

    project: ProjectFolder
    base: Base
    version: str
    identity: str
    """Digests of the dataset version, and of all inputs."""
    facts: Mapping[str, Any]

    @property
    def work(self) -> Path:
        """The run's working folder."""
        return self.project.root / ".tunewright" / "training" / self.identity[:12]


def train_on_cluster(
    project: ProjectFolder,
    dataset: DatasetVersion,
    base: Base,
    chat: ChatFormat,
    reporter: Reporter,
    *,
    facts: Mapping[str, Any],
    signer: SigningKey | None = None,
) -> TrainResult:
    """Train as :func:`tunewright.training.train.train` does, in the processes of ``compute.cluster``.

    Without a GPU and without ``compute.workers`` there is nothing to gain, and this process trains.
    """
    config = project.config
    if distributed.world_size() > 1:
        fix = "Start `tunewright train` once, without a launcher: the cluster starts the processes."
        raise UserError("Processes of a launcher cannot use a cluster", where=_WHERE, fix=fix)
    require_trackers(config.train.report_to)
    identity = digest(training_inputs(project, dataset, base, chat))
    if (existing := find_trained(project.adapters, config.name, identity)) is not None:
        return TrainResult(existing, trained=False)
    with open_group(config, reporter) as group:
        if group is not None:
            job = TrainingJob(absolute(project), base, dataset.digest, identity, facts)
            return _train(group, project, job, reporter, signer)
    if config.compute.fsdp:
        raise UserError("FSDP needs at least 2 processes", where="compute.fsdp", fix="Set compute.workers.")
    reporter.say("The cluster has no GPU: this process trains. compute.workers: 2 or more trains in several.")
    return train(project, dataset, base, chat, reporter, facts=facts, signer=signer)


def check_cluster(project: ProjectFolder, base: Base, reporter: Reporter) -> None:
    """Check before other work that the config can be trained in the processes of ``compute.cluster``, if it is set."""
    with open_group(project.config, reporter) as group:
        if group is not None:
            _require_trainable(group, absolute(project), base, reporter)


def _train(
    group: WorkerGroup, project: ProjectFolder, job: TrainingJob, reporter: Reporter, signer: SigningKey | None
) -> TrainResult:
    _require_trainable(group, job.project, job.base, reporter)
    # Tried now, not after hours of training; the key stays on this machine.
    signer = signer or store_signer(project.keys, reporter)
    with stop_on_signal() as stop, finishing("the step in progress or the one before is saved"):
        stop.phase = "closed"
        storage = job.project.work / "ray" / job.identity[:12]
        group.run(train_together, job, storage, reporter, lambda: stop.asked)
    adapter = stored_adapter(project.adapters, project.config.name, job.identity)
    if signer is not None:
        sign(adapter.folder, signer)
    return TrainResult(adapter, trained=True)


def _require_trainable(group: WorkerGroup, project: ProjectFolder, base: Base, reporter: Reporter) -> None:
    """Check that the group's processes can train the config, and that every machine has what they need."""
    compute, settings = project.config.compute, project.config.train
    micro_batch(settings, group.count)
    if compute.fsdp:
        if group.count == 1:
            raise UserError("FSDP needs at least 2 processes", where="compute.fsdp", fix="Set compute.workers.")
        require_fsdp_supported(settings)
    with (
        reporter.task("Checking the machines", len(group.cluster.machines), "machines") as task,
        open_site(project, base) as site,
    ):
        group.cluster.ask(require_site, site)
        task.advance(len(group.cluster.machines))


def train_together(job: TrainingJob, reporter: Reporter, stop_asked: Callable[[], bool]) -> None:
    """Train in one of the processes; the first one stores the adapter."""
    project = job.project
    if project.config.compute.fsdp:
        os.environ.update(_FSDP)
    dataset, base = load_version(project.dataset), base_here(job.base)
    if dataset.digest != job.version:
        what = "The dataset has another version now: another command has changed it"
        raise UserError(what, where=str(project.dataset), fix="Run the same command again, to train on that version.")
    chat = open_chat(base, project.config.chat, reporter)
    if distributed.is_main_process():
        wait_for_lock(job.work)
    try:
        with stopped_from(stop_asked):
            # Without a folder for the adapters it would be signed here.
            train(project, dataset, base, chat, reporter, adapters=project.adapters, work=job.work, facts=job.facts)
    except OSError as error:
        raise refused(error) or error from None
    except RuntimeError as error:
        if distributed.is_peer_failure(error):
            raise ConnectionError(str(error)) from None
        raise
