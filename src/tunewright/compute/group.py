"""Processes of a cluster that compute one thing together, as torchrun starts them, through Ray Train.

Ray Train places them, connects them (RANK, WORLD_SIZE, torch's process group) and, if one is lost, starts all of them
again. What they compute resumes from its own checkpoints.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import RayTrainError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tunewright.compute.cluster import (
    WHERE,
    Cluster,
    Image,
    connected,
    machines_with,
    require_available,
    require_head,
)
from tunewright.compute.relay import Display, Inbox, RelayReporter
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter, Reporter
from tunewright.core.text import count_of

_RESTARTS = 3
"""Starts of all processes after the first, if one is lost."""
_POLL_S = 0.25
_LOOK_S = 5.0
"""Time between two looks at the machines that are left."""
_RESUMES = "The cluster lost a process of this run. All of them start again and resume from the last checkpoint."

Together = Callable[[Any, Reporter, Callable[[], bool]], None]
"""Computes with the other processes; takes an argument, where to report, and whether a stop was requested.
A stop raises KeyboardInterrupt in all processes, and the loss of another process ConnectionError."""


@contextmanager
def open_group(config: Config, reporter: Reporter) -> Iterator[WorkerGroup | None]:
    """Connect to the cluster that the config names, check it, and yield its group; None if it has too few resources."""
    with connected(config):
        kind = "GPU" if machines_with("GPU") else "CPU"
        machines = machines_with(kind)
        if kind == "CPU" and (config.compute.workers or 1) == 1:
            yield None
            return
        if ray.util.client.ray.is_connected():  # losing the connection would end the work
            what = "A training in several processes cannot be started through ray://"
            fix = "Run the command on a machine of the cluster with --cluster auto, or send it there (ray job submit)."
            raise UserError(what, where=WHERE, fix=fix)
        count = require_available(kind, _total(kind), config.compute.workers)
        group = WorkerGroup(count, kind, Cluster.of_equal(machines, config))
        reporter.say(f"Cluster: {count_of(len(machines), 'machine')}; {count_of(count, kind)}, each for one process")
        yield group


def _total(kind: str) -> int:
    return sum(int(machine["Resources"][kind]) for machine in machines_with(kind))


@dataclass(frozen=True)
class WorkerGroup:
    """Processes with a CPU or a GPU each."""

    count: int
    kind: str
    cluster: Cluster

    def run(
        self, function: Together, argument: Any, storage: Path, reporter: Reporter, stop_asked: Callable[[], bool]
    ) -> None:
        """Call a function of a module in all processes, which compute together.

        ``storage`` is a folder that all machines see, for Ray Train's own files; it is removed at
        the end. ``reporter`` gets the messages of the first process.

        Raises:
            UserError: as the function raises it, or the cluster has lost a process too often.
            KeyboardInterrupt: stopped.
        """
        shutil.rmtree(storage, ignore_errors=True)  # left by a killed command
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        inbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Inbox).remote()
        trainer = self._trainer(_Work(function, argument, inbox, self.cluster.image), storage)
        run: Future[bool] = Future()
        # In a thread, because in the main thread Ray Train would replace the handler of SIGINT.
        threading.Thread(target=_fit, args=[trainer, run], name="tunewright-ray-train", daemon=True).start()
        display = Display(reporter, _RESUMES)
        try:
            self._wait(run, inbox, display, reporter, stop_asked)
        except RayError as error:
            what = f"The cluster was lost: {type(error).__name__}"
            fix = "Start the cluster, and run the same command again: it resumes."
            raise UserError(what, where=WHERE, fix=fix) from None
        finally:
            display.close()
            shutil.rmtree(storage, ignore_errors=True)
        _require_done(run)

    def _trainer(self, work: _Work, storage: Path) -> Any:
        return TorchTrainer(
            _process,
            train_loop_config={"work": work},
            # With FSDP a whole state dict passes through the CPU.
            torch_config=TorchConfig(backend="cuda:nccl,cpu:gloo" if self.kind == "GPU" else "gloo"),
            scaling_config=ScalingConfig(num_workers=self.count, use_gpu=self.kind == "GPU"),
            run_config=RunConfig(
                name=storage.name,
                storage_path=str(storage.parent),
                failure_config=FailureConfig(max_failures=_RESTARTS),
                callbacks=[_UserErrorIsFinal()],
            ),
        )

    def _wait(
        self, run: Future[bool], inbox: Any, display: Display, reporter: Reporter, stop_asked: Callable[[], bool]
    ) -> None:
        """Report until the run has ended.

        Raises:
            UserError: the head is lost.
            KeyboardInterrupt: a stop was asked for while no process could save anything.
        """
        looked, missing = time.monotonic(), False
        while not wait([run], _POLL_S).done:
            require_head()
            display.show(ray.get(inbox.take.remote()))
            if stop_asked():
                if missing or not display.stoppable:
                    raise KeyboardInterrupt
                ray.get(inbox.stop.remote())
            if time.monotonic() - looked > _LOOK_S:
                looked, there = time.monotonic(), _total(self.kind)
                if there < self.count and not missing:
                    reporter.warn(
                        f"Too few {self.kind}s are left in the cluster: {there} (needed: {self.count}). This "
                        "command waits for a machine."
                    )
                missing = there < self.count
        with suppress(RayError):  # the run ends with the cluster
            display.show(ray.get(inbox.take.remote()))


def _fit(trainer: Any, run: Future[bool]) -> None:
    try:
        run.set_result(trainer.fit().return_value)
    except BaseException as error:  # noqa: BLE001 (raised by the thread that waits)
        run.set_exception(error)


class _UserErrorIsFinal(UserCallback):  # type: ignore[misc]
    """Ends the run at a UserError, which would recur after a restart."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise the UserError: Ray Train does not restart after an error in a callback."""
        del run_context
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise error


@dataclass(frozen=True)
class _Work:
    """The work of each process."""

    function: Together
    argument: Any = field(repr=False)  # has rows, and Ray's dashboard can show what a training was given
    inbox: Any
    image: Image


def _process(arguments: dict[str, _Work]) -> bool:
    """Compute in one of the processes; return whether it was stopped."""
    work = arguments["work"]
    work.image.require_here()
    try:
        if ray.train.get_context().get_world_rank() > 0:
            work.function(work.argument, LogReporter(), lambda: False)
            return False
        inbox = work.inbox
        try:
            work.function(
                work.argument, RelayReporter(inbox.put.remote), lambda: bool(ray.get(inbox.stop_asked.remote()))
            )
        finally:
            ray.get(inbox.stop_asked.remote())  # earlier messages have arrived by now, so this process may be ended
    except KeyboardInterrupt:
        return True
    return False


def _require_done(run: Future[bool]) -> None:
    """Raise the error of a run that has ended, or KeyboardInterrupt if it was stopped."""
    error = run.exception()
    if error is None:
        if run.result():
            raise KeyboardInterrupt
        return
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, UserError):
        raise error.controller_failure from None
    if isinstance(error, WorkerGroupError):
        for failure in error.worker_failures.values():
            if not isinstance(failure, (ConnectionError, RayError, RayTrainError)):
                raise failure
    if not isinstance(error, (TrainingFailedError, RayError)):
        raise error
    what = f"The cluster lost the run {_RESTARTS + 1} times: {str(error).strip().splitlines()[-1]}"
    fix = "Check its machines and their memory (ray status), and run the same command again: it resumes."
    raise UserError(what, where=WHERE, fix=fix) from None
