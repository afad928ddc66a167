"""Processes of a cluster that compute one thing together, as torchrun starts them, through Ray Train.

Ray Train places them, connects them (RANK, WORLD_SIZE, torch's process group) and, if one is lost, starts all of them
again. What they compute resumes from its own checkpoints.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
    Node,
    connected,
    is_client,
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

Together = Callable[[Any, Reporter, Callable[[], bool]], Any]
"""Computes with the other processes, given an argument, where to report, and if a stop was asked for. The first
process's result is that of the group. A stop raises KeyboardInterrupt in all of them, and the loss of another process
ConnectionError."""


@contextmanager
def open_group(config: Config, reporter: Reporter) -> Iterator[WorkerGroup | None]:
    """Connect to the cluster that the config names, check it, and yield its group; None if it has nothing for one."""
    with connected(config):
        kind = "GPU" if machines_with("GPU") else "CPU"
        machines = machines_with(kind)
        if kind == "CPU" and (config.compute.workers or 1) == 1:
            yield None
            return
        if is_client():
            what = "A training in several processes cannot be started through ray://"
            fix = "Run the command on a machine of the cluster with --cluster auto, or send it there (ray job submit)."
            raise UserError(what, where=WHERE, fix=fix)
        count = require_available(kind, _total(kind, machines), config.compute.workers)
        group = WorkerGroup(count, kind, Cluster.of_equal(machines, config))
        reporter.say(f"Cluster: {count_of(len(machines), 'machine')}; {count_of(count, kind)}, each for one process")
        yield group


def _total(kind: str, machines: Sequence[Node]) -> int:
    return sum(int(machine["Resources"].get(kind, 0)) for machine in machines)


@dataclass(frozen=True)
class WorkerGroup:
    """Processes with a CPU or a GPU each."""

    count: int
    kind: str
    cluster: Cluster

    def run(
        self, function: Together, argument: Any, storage: Path, reporter: Reporter, stop_asked: Callable[[], bool]
    ) -> Any:
        """Call a function in all processes, which compute together; return the first one's result.

        Args:
            function: the function of a module.
            argument: what it needs.
            storage: a folder that all machines see, for Ray Train's own files; removed at the end.
            reporter: gets what the first process reports.
            stop_asked: returns True once this command was asked to stop.

        Raises:
            UserError: as the function raises it, or the cluster has lost a process too often.
            KeyboardInterrupt: stopped.
        """
        shutil.rmtree(storage, ignore_errors=True)  # left by a command that was killed
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        inbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Inbox).remote()
        work = _Work(function, argument, inbox, self.cluster.image)
        run = _Run(self._trainer(work, storage))
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
        return _result(run)

    def _trainer(self, work: _Work, storage: Path) -> Any:
        # With FSDP a whole state dict passes through the CPU.
        backend = "cuda:nccl,cpu:gloo" if self.kind == "GPU" else "gloo"
        return TorchTrainer(
            _process,
            train_loop_config={"work": work},
            torch_config=TorchConfig(backend=backend),
            scaling_config=ScalingConfig(num_workers=self.count, use_gpu=self.kind == "GPU"),
            run_config=RunConfig(
                name=storage.name,
                storage_path=str(storage.parent),
                failure_config=FailureConfig(max_failures=_RESTARTS),
                callbacks=[_UserErrorIsFinal()],
            ),
        )

    def _wait(
        self, run: _Run, inbox: Any, display: Display, reporter: Reporter, stop_asked: Callable[[], bool]
    ) -> None:
        """Report until the run has ended.

        Raises:
            UserError: the head is lost.
            KeyboardInterrupt: a stop was asked for while no process could save anything.
        """
        stop_sent, looked, missing = False, time.monotonic(), False
        while not run.ended.wait(_POLL_S):
            require_head()
            display.show(ray.get(inbox.take.remote()))
            if stop_asked():
                if missing or not display.stoppable:
                    raise KeyboardInterrupt
                if not stop_sent:
                    ray.get(inbox.stop.remote())
                stop_sent = True
            if time.monotonic() - looked > _LOOK_S:
                looked, there = time.monotonic(), _total(self.kind, machines_with(self.kind))
                if there < self.count and not missing:
                    reporter.warn(
                        f"Too few {self.kind}s are left in the cluster: {there} (needed: {self.count}). This "
                        "command waits for a machine."
                    )
                missing = there < self.count
        with suppress(RayError):  # it ends with the cluster
            display.show(ray.get(inbox.take.remote()))


@dataclass(frozen=True)
class _Work:
    """The work of each process."""

    function: Together
    argument: Any
    inbox: Any
    image: Image


class _Run:
    """A trainer's run, in a thread: in the main thread Ray Train would replace the handler of SIGINT."""

    def __init__(self, trainer: Any) -> None:
        self.ended = threading.Event()
        self.ended_as = _Ended()
        self.error: Exception | None = None
        threading.Thread(target=self._fit, args=[trainer], name="tunewright-ray-train", daemon=True).start()

    def _fit(self, trainer: Any) -> None:
        try:
            self.ended_as = trainer.fit().return_value
        except Exception as error:  # noqa: BLE001 (raised by the thread that waits)
            self.error = error
        finally:
            self.ended.set()


class _UserErrorIsFinal(UserCallback):  # type: ignore[misc]
    """Ends the run at a UserError, which another start would meet again."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise it: Ray Train starts nothing again after an error of a callback."""
        del run_context
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise error


@dataclass(frozen=True)
class _Ended:
    """The end of the function in one process."""

    result: Any = None
    stopped: bool = False


def _process(arguments: dict[str, _Work]) -> _Ended:
    """Compute in one of the processes."""
    work = arguments["work"]
    work.image.require_here()
    if ray.train.get_context().get_world_rank() > 0:
        return _call(work, LogReporter(), lambda: False)
    reporter = RelayReporter(lambda events: bool(ray.get(work.inbox.put.remote(events))))
    with reporter.sending():
        return _call(work, reporter, reporter.stop_asked)


def _call(work: _Work, reporter: Reporter, stop_asked: Callable[[], bool]) -> _Ended:
    try:
        return _Ended(work.function(work.argument, reporter, stop_asked))
    except KeyboardInterrupt:
        return _Ended(stopped=True)


def _result(run: _Run) -> Any:
    """Return the result of a run that has ended, or raise its error."""
    error = run.error
    if error is None:
        if run.ended_as.stopped:
            raise KeyboardInterrupt
        return run.ended_as.result
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
