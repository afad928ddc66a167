"""Trainings: here one after the other, on the machines of a cluster at once, or one in several of its processes.

The trials of a sweep, the parts of a learning curve, the folds of a cross-validation and pilots are ordinary trainings.
On a cluster each is a task that makes the same call in a worker. It has the same working folder, so a lost training
resumes from its last checkpoint on another machine, and the same number of threads, so its adapter is the same.

One training in several processes calls the function that torchrun's processes call. The command
that started them sends the rows, shows their messages, passes a stop on, and signs the adapter.
Every machine sees the project's folder, where the first process writes checkpoints and the adapter.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch

from tunewright.adapters.registry import HISTORY, Adapter, read_history
from tunewright.adapters.signing import SigningKey, sign, store_signer
from tunewright.chat import ChatFormat
from tunewright.compute import open_group
from tunewright.compute.relay import KeptMessages
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.interrupts import finishing
from tunewright.core.io import digest, refused
from tunewright.core.locks import is_locked
from tunewright.core.progress import Reporter, Task
from tunewright.core.text import count_of
from tunewright.core.workers import ONE_CPU, Machine, Needs, Workers, on_machine
from tunewright.data.versions import DatasetVersion
from tunewright.models.bases import Base, Site, base_here, open_site, require_site
from tunewright.training import distributed
from tunewright.training.checkpoints import stop_on_signal, stopped_from
from tunewright.training.history import require_trackers
from tunewright.training.run import micro_batch, require_fsdp_supported
from tunewright.training.train import TrainResult, find_trained, train, training_inputs

if TYPE_CHECKING:
    from tunewright.compute.group import WorkerGroup

Shared = TypeVar("Shared")
Value = TypeVar("Value")
Result = TypeVar("Result")

_WHERE = "compute.cluster"
_FREE_S = 60.0
_SEEN_S = 120.0  # network file systems show a new file to other machines after up to a minute
_LOOK_S = 2.0
_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@dataclass(frozen=True)
class Job(Generic[Value]):
    """One training: the inputs of its step."""

    name: str
    work: Path
    """The working folder, which shows how far it is, and is locked while it trains."""
    value: Value


@dataclass(frozen=True)
class Trainings:
    """The place where independent trainings are done."""

    workers: Workers
    """Workers that train each job in a process of its own; this process's workers train here."""
    base: Base
    reporter: Reporter
    needs: Needs = ONE_CPU
    """Resources of a machine that one training takes."""
    site: Site | None = None
    """What every machine must have; None means that the trainings are done here."""

    @property
    def on_cluster(self) -> bool:
        """True if other processes train."""
        return self.site is not None

    @property
    def at_once(self) -> int:
        """Number of trainings at once."""
        return _at_once(self.workers, self.needs) if self.on_cluster else 1

    def run(
        self,
        step: Callable[[Base, Shared, Value, Reporter], Result],
        shared: Shared,
        jobs: Sequence[Job[Value]],
        *,
        named: bool = False,
    ) -> Generator[Result, None, None]:
        """Yield each job's result, in order: ``step(base, shared, job.value, reporter)``.

        Here a job is done when its result is requested. On a cluster its messages are reported with
        its result, after its name if they are ``named``. Paths in ``shared`` and in the jobs must
        be absolute there. An error or a signal stops all jobs, with a checkpoint saved.
        """
        if self.site is None:
            for job in jobs:
                yield step(self.base, shared, job.value, self.reporter)
            return
        sent = _Sent(step, shared, self.site, torch.get_num_threads())
        with (
            self.reporter.task("Training on the cluster", len(jobs), "trainings") as task,
            _steps_shown(task, jobs),
        ):
            done = self.workers.map(_train_in_worker, sent, jobs, task, needs=self.needs)
            for job, (result, messages) in zip(jobs, done, strict=True):
                messages.report_to(self.reporter, f"{job.name}: " if named else "")
                yield result

    def stored(self, adapters: Path, name: str, identity: str) -> Adapter:
        """Return the adapter that a training has stored, once this machine sees it."""
        return stored_adapter(adapters, name, identity, _SEEN_S if self.on_cluster else 0)

    def train_missing(self, trainings: Sequence[Training], chat: ChatFormat) -> None:
        """Train on the cluster the adapters that are missing; `train` finds them afterwards. Here do nothing."""
        if not self.on_cluster:
            return
        missing = [each for each in (t.absolute(self.base, chat) for t in trainings) if each.found() is None]
        if not missing:
            return
        jobs = [Job(each.name, each.work, each) for each in missing]
        for training, _ in zip(missing, self.run(_train, chat, jobs, named=True), strict=True):
            adapter = self.stored(training.adapters, training.project.config.name, training.identity)
            seconds = adapter.lineage["training"]["seconds"]
            self.reporter.say(f"{training.name}: trained in {seconds:.0f} s")


def stored_adapter(adapters: Path, name: str, identity: str, seconds: float = _SEEN_S) -> Adapter:
    """Return the adapter that a training has stored, once this machine sees it."""
    until = time.monotonic() + seconds
    while (adapter := find_trained(adapters, name, identity)) is None:
        if time.monotonic() >= until:
            what, fix = "The trained adapter is missing", "Restore it, or check the storage that holds the project."
            if seconds:
                what = f"The adapter that another machine has stored does not appear here within {seconds:.0f} s"
                fix = "Check the storage, and run the same command again."
            raise UserError(what, where=str(adapters), fix=fix)
        time.sleep(1)
    return adapter


def wait_for_lock(work: Path) -> None:
    """Wait until the working folder is free: the process of a lost machine or a killed command may be about to end."""
    until = time.monotonic() + _FREE_S
    while is_locked(work) and time.monotonic() < until:
        time.sleep(0.2)


@dataclass(frozen=True)
class Training:
    """One call of `train`."""

    name: str
    project: ProjectFolder
    version: DatasetVersion
    adapters: Path
    facts: Mapping[str, Any]
    identity: str = ""
    """The digest of its inputs, once it is known."""

    @property
    def work(self) -> Path:
        """Its working folder, as `train` takes it by default."""
        return self.project.work / "training" / self.identity[:12]

    def absolute(self, base: Base, chat: ChatFormat) -> Training:
        """Return the training with paths that another process can use, and its identity."""
        return replace(
            self,
            project=absolute(self.project),
            adapters=self.adapters.resolve(),
            identity=digest(training_inputs(self.project, self.version, base, chat)),
        )

    def found(self) -> Adapter | None:
        """Return its adapter if it exists already."""
        return find_trained(self.adapters, self.project.config.name, self.identity)


def _train(base: Base, chat: ChatFormat, training: Training, reporter: Reporter) -> None:
    # With a folder for adapters it signs nothing: the command signs, on the machine with the private key.
    place, facts = training.adapters, training.facts
    train(training.project, training.version, base, chat, reporter, adapters=place, facts=facts)


def absolute(project: ProjectFolder) -> ProjectFolder:
    """Return the project with a root that another process can use."""
    return ProjectFolder(project.root.resolve(), project.config)


# What a machine needs


@contextmanager
def open_trainings(workers: Workers, project: ProjectFolder, base: Base, reporter: Reporter) -> Iterator[Trainings]:
    """Check every machine, and yield the place where trainings are done."""
    if not workers.machines:
        yield Trainings(workers, base, reporter)
        return
    needs = _needs(workers.machines)
    with open_site(project, base) as site:
        workers.ask(require_site, site)
        each = "a GPU" if needs.gpus else count_of(needs.cpus, "CPU")
        reporter.say(f"Each training takes {each}: up to {_at_once(workers, needs)} at once.")
        yield Trainings(workers, base, reporter, needs, site)


def _needs(machines: Sequence[Machine]) -> Needs:
    """Return the resources of a training: a GPU if there are any, else as many CPUs as this process has threads."""
    if torch.cuda.is_available() or any(machine.gpus for machine in machines):
        needs = Needs(gpus=1)
        if not any(machine.room(needs) for machine in machines):
            fix = "Start Ray with GPUs on a machine (ray start --num-gpus 1)."
            raise UserError("The cluster has no GPU, and this machine trains on one", where=_WHERE, fix=fix)
        return needs
    needs = Needs(cpus=torch.get_num_threads())
    if not any(machine.room(needs) for machine in machines):
        most = max(machine.cpus for machine in machines)
        raise UserError(
            f"Too few CPUs for a training: {most} on the largest machine (this command's threads: {needs.cpus})",
            where=_WHERE,
            fix=f"Set OMP_NUM_THREADS={most} for this command, or add a larger machine.",
        )
    return needs


def _at_once(workers: Workers, needs: Needs) -> int:
    return min(workers.count, sum(machine.room(needs) for machine in workers.machines))


# In a worker


class _Sent(NamedTuple):
    """Inputs that all jobs share."""

    step: Callable[[Base, Any, Any, Reporter], Any]
    shared: Any
    site: Site
    threads: int


def _train_in_worker(sent: _Sent, job: Job[Any], task: Task) -> tuple[Any, KeptMessages]:
    """Do one job; return its result and messages."""
    try:
        base = require_site(sent.site)  # also of a machine that joined the cluster later
    except UserError as error:
        raise on_machine(platform.node(), error) from None
    torch.set_num_threads(sent.threads)
    wait_for_lock(job.work)
    messages = KeptMessages()
    try:
        result = sent.step(base, sent.shared, job.value, messages)
    except KeyboardInterrupt:
        # A checkpoint is saved. To end like a lost process has the job run again, unless the command has cancelled it.
        os._exit(1)
    task.advance()
    return result, messages


@contextmanager
def _steps_shown(task: Task, jobs: Sequence[Job[Any]]) -> Iterator[None]:
    """Show the steps of trainings in progress, from the metrics in their working folders."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_S):
            steps = {job.name: step for job in jobs if (step := _latest_step(job.work))}
            task.advance(0, ", ".join(f"{name}: step {step}" for name, step in steps.items()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _latest_step(work: Path) -> int:
    try:
        return max((int(row["step"]) for row in read_history(work / HISTORY)), default=0)
    except UserError:
        return 0  # not begun, or its folder is being removed


# One training in several processes


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
    training = Training(config.name, project, dataset, project.adapters, facts).absolute(base, chat)
    if (existing := find_trained(project.adapters, config.name, training.identity)) is not None:
        return TrainResult(existing, trained=False)
    with open_group(config, reporter) as group:
        _require_trainable(group, training.project, base, reporter)
        if group is not None:
            # The key is tried now, not after hours of training; it stays on this machine.
            signer = signer or store_signer(project.keys, reporter)
            with stop_on_signal() as stop, finishing("the step in progress or the one before is saved"):
                stop.phase = "closed"
                storage = training.project.work / "ray" / training.identity[:12]
                group.run(_train_together, (base, chat, training), storage, reporter, lambda: stop.asked)
            adapter = stored_adapter(project.adapters, config.name, training.identity)
            if signer is not None:
                sign(adapter.folder, signer)
            return TrainResult(adapter, trained=True)
    reporter.say("The cluster has no GPU: this process trains. compute.workers: 2 or more trains in several.")
    return train(project, dataset, base, chat, reporter, facts=facts, signer=signer)


def check_cluster(project: ProjectFolder, base: Base, reporter: Reporter) -> None:
    """Check before other work that the config can be trained in the processes of ``compute.cluster``, if it is set."""
    with open_group(project.config, reporter) as group:
        _require_trainable(group, absolute(project), base, reporter)


def _require_trainable(group: WorkerGroup | None, project: ProjectFolder, base: Base, reporter: Reporter) -> None:
    """Check that the group's processes can train the config, and that every machine has what they need."""
    compute, settings = project.config.compute, project.config.train
    if compute.fsdp and (group is None or group.count == 1):
        raise UserError("FSDP needs at least 2 processes", where="compute.fsdp", fix="Set compute.workers.")
    if group is None:
        return
    micro_batch(settings, group.count)
    if compute.fsdp:
        require_fsdp_supported(settings)
    machines = len(group.cluster.machines)
    with reporter.task("Checking the machines", machines, "machines") as task, open_site(project, base) as site:
        group.cluster.ask(require_site, site)
        task.advance(machines)


def _train_together(
    inputs: tuple[Base, ChatFormat, Training], reporter: Reporter, stop_asked: Callable[[], bool]
) -> None:
    """Train in one of the processes; the first one stores the adapter."""
    base, chat, training = inputs
    if training.project.config.compute.fsdp:
        os.environ.update(_FSDP)
    if distributed.is_main_process():
        wait_for_lock(training.work)
    try:
        with stopped_from(stop_asked):
            _train(base_here(base), chat, training, reporter)
    except OSError as error:
        raise refused(error) or error from None
    except RuntimeError as error:
        if distributed.is_peer_failure(error):
            raise ConnectionError(str(error)) from None
        raise
