"""Actors of a Ray cluster that keep a model each: a part goes to the next free one.

A lost actor costs time only: another one computes its part.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from tunewright.compute.cluster import (
    WHERE,
    Cluster,
    Image,
    connected,
    has_head,
    machines_with,
    require_head,
)
from tunewright.compute.tasks import CHECK, RETRIES, disconnected, first_done
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.core.workers import ModelWorkers, Needs, Part, Result, Shared, WorkerFailedError

_RELEASE_S = 30.0  # for a process to free what it holds: vLLM ends within 25 s

Needed = TypeVar("Needed")


@contextmanager
def open_actors(
    config: Config,
    threads: int,
    check: Callable[[Needed], object],
    needed: Needed,
    release: Callable[[], object],
    reporter: Reporter,
) -> Iterator[ModelWorkers]:
    """Connect to the cluster that the config names, check it, and yield its workers with models."""
    with connected(config):
        machines = machines_with("GPU")
        kind: Literal["GPU", "CPU"] = "GPU" if machines else "CPU"
        needs = Needs(1, 1) if machines else Needs(threads)
        machines = machines or machines_with("CPU", threads)
        room = sum(int(node["Resources"][kind]) // max(needs.gpus, needs.cpus) for node in machines)
        unit = "GPU" if kind == "GPU" else count_of(threads, "thread")
        count = config.compute.workers or room
        if not room:
            what = f"No machine of the cluster has room for a worker with {unit}"
            fix = "Add a larger one, or set OMP_NUM_THREADS for this command to the CPUs that a worker may use."
            raise UserError(what, where=WHERE, fix=fix)
        if count > room:
            what = f"The cluster has room for {count_of(room, 'worker')} with {unit} (compute.workers: {count})"
            raise UserError(what, where=WHERE, fix="Lower compute.workers, or add machines to the cluster.")
        cluster = Cluster.of_equal(machines, config)
        cluster.ask(check, needed)
        if ray.available_resources().get(kind, 0) < 1:
            reporter.warn(f"Other work uses every {kind} of the cluster: this command waits for one.")
        reporter.say(f"Cluster: {count_of(count, 'worker')} with {'a GPU' if kind == 'GPU' else unit}")
        workers = _Actors(cluster, count, needs, release, reporter)
        try:
            yield workers
        finally:
            workers.stop()


class _Actor:
    """One worker's process. Its machine may have joined after the others were compared with ``image``."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._shared: tuple[str, Any] = ("", None)

    def run(self, compute: Callable[[Any, Any], Any], held: list[Any], part: Any) -> tuple[str, Any]:
        """Return the machine's name in Ray, and the result of a part."""
        self._image.require_here()
        name = held[0].hex()
        if name != self._shared[0]:
            self._shared = ("", None)
            self._shared = (name, ray.get(held[0]))
        return ray.get_runtime_context().get_node_id(), compute(self._shared[1], part)

    def release(self, release: Callable[[], object]) -> None:
        """Free what would outlive the process."""
        release()


class _Actors:
    """Processes with a model each, started with the first part: a part goes to the next free one.

    Ray ends the process of a task with a GPU after the task, and a kept process could be given another GPU. Actors keep
    theirs. A lost one is not restarted by Ray, which would have its part wait for a machine that does not come back:
    another one computes the part.

    ``needs`` is what one worker takes of a machine. It calls ``release`` before it is ended.
    """

    def __init__(
        self, cluster: Cluster, count: int, needs: Needs, release: Callable[[], object], reporter: Reporter
    ) -> None:
        self.count = count
        self.device: Literal["cpu", "cuda"] = "cuda" if needs.gpus else "cpu"
        self.threads = None if needs.gpus else needs.cpus
        self._cluster, self._needs, self._release, self._reporter = cluster, needs, release, reporter
        self._new = ray.remote(_Actor).options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self._idle: list[tuple[str, Any]] = []  # with their machines
        self._starting: dict[Any, Any] = {}
        self._failed = 0

    def ask(self, question: Callable[[Shared], Result], needed: Shared) -> Sequence[tuple[str, Result]]:
        """Return each machine's answer."""
        return self._cluster.ask(question, needed)

    def each(
        self, compute: Callable[[Shared, Part], Result], shared: Shared, parts: Sequence[Part], nothing: Part
    ) -> Iterator[tuple[int, Result]]:
        """Yield the number of each part with its result, as soon as it is there."""
        require_head()
        held = [ray.put(shared)]
        waiting = deque(range(len(parts)))
        running: dict[Any, tuple[Any, int]] = {}
        lost: Counter[int] = Counter()
        try:
            while waiting or running:
                while waiting and self._idle:
                    # The last one that was busy: it has loaded what this part needs.
                    (_, actor), number = self._idle.pop(), waiting.popleft()
                    running[actor.run.remote(compute, held, parts[number])] = (actor, number)
                while len(self._idle) + len(self._starting) < min(len(waiting), self.count - len(running)):
                    actor = self._new.remote(self._cluster.image)
                    self._starting[actor.run.remote(compute, held, nothing)] = actor
                done = first_done([*running, *self._starting], self._needs, self._reporter)
                if done in self._starting:
                    self._started(done)
                    continue
                actor, number = running.pop(done)
                try:
                    machine, result = _result(done)
                except _LostError as error:
                    self._forget(actor, error, "The cluster lost a worker: its part is computed again by another.")
                    lost[number] += 1
                    if lost[number] > RETRIES:
                        raise error.final from None
                    waiting.appendleft(number)
                    continue
                self._idle.append((machine, actor))
                yield number, result
                require_head()
        except ConnectionError as error:  # of Ray's client
            raise disconnected(error) from None
        finally:
            _end([actor for actor, _ in running.values()])

    def _started(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            machine, _ = _result(reference)
        except _LostError as error:
            self._forget(actor, error, "The cluster lost a worker while it loaded the base.")
            self._failed += 1
            if self._failed > RETRIES:
                raise error.final from None
            return
        self._idle.append((machine, actor))
        self._failed = 0

    def _forget(self, actor: Any, error: _LostError, warning: str) -> None:
        """Forget a lost worker, and the idle ones of lost machines."""
        if error.failed is not None:
            warning = f"{error.failed.what}\nAnother worker computes its part again."
            self._free([actor])
            _end([actor])
        self._reporter.warn(warning)
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self._idle = [(machine, actor) for machine, actor in self._idle if machine in alive]

    def _free(self, actors: Sequence[Any]) -> None:
        """Have idle workers free what would outlive them."""
        if actors and ray.is_initialized() and has_head():
            references = [actor.release.remote(self._release) for actor in actors]
            with suppress(RayError):
                ray.wait(references, num_returns=len(references), timeout=_RELEASE_S, fetch_local=False)

    def stop(self) -> None:
        """End the processes; the next part starts others."""
        idle = [actor for _, actor in self._idle]
        self._free(idle)
        _end([*idle, *self._starting.values()])
        self._idle, self._starting = [], {}


class _LostError(Exception):
    """A worker is lost, or cannot compute its part for the reason ``failed``."""

    def __init__(self, failed: WorkerFailedError | None = None) -> None:
        super().__init__()
        self.failed = failed
        lost = f"The cluster lost the workers of a part {RETRIES + 1} times"
        self.final: UserError = failed or UserError(lost, where=WHERE, fix=CHECK)


def _result(reference: Any) -> tuple[str, Any]:
    """Return a machine and the result of its part.

    Raises:
        _LostError: another worker has to compute it.
    """
    require_head()
    try:
        found: tuple[str, Any] = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, WorkerFailedError):
            raise _LostError(error.cause) from None
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except RayError:
        require_head()
        raise _LostError from None
    return found


def _end(actors: Sequence[Any]) -> None:
    if actors and ray.is_initialized() and has_head():
        for actor in actors:
            with suppress(RayError):
                ray.kill(actor)
