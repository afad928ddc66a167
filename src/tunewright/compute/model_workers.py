"""Ray actors with a model each: a part goes to the next free one, and to another if its actor is lost.

Ray ends the process of a task with a GPU after the task, and a kept process could be given another GPU. Actors keep
theirs.
"""

from __future__ import annotations

import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from tunewright.compute.cluster import (
    AGAIN,
    CHECK_S,
    WHERE,
    Image,
    Places,
    asked,
    connected,
    has_head,
    image,
    own_image,
    places_for,
    require_head,
    require_same,
)
from tunewright.compute.tasks import RETRIES, first_done
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.core.workers import ModelWorkers, Needs, Part, Result, Shared, WorkerFailedError

_WAITS = "this command waits for one."
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
    """Connect to the cluster that the config names, check it, and yield its workers with models.

    Raises:
        UserError: as for :func:`tunewright.compute.open_model_workers`.
    """
    with connected(config):
        places = places_for(threads)
        unit = "GPU" if places.kind == "GPU" else count_of(threads, "thread")
        count = _count(config, places.count, unit)
        text = config.model_dump_json()
        places.require(text, check, needed)
        if ray.available_resources().get(places.kind, 0) < 1:
            reporter.warn(f"Other work uses every {places.kind} of the cluster: {_WAITS}")
        reporter.say(f"Cluster: {count_of(count, 'worker')} with {'a GPU' if places.kind == 'GPU' else unit}")
        workers = _Actors(places, count, threads, image(text), text, release, reporter)
        try:
            yield workers
        finally:
            workers.stop()


def _count(config: Config, most: int, unit: str) -> int:
    wanted = config.compute.workers
    if not most:
        what = f"No machine of the cluster has room for a worker with {unit}"
        fix = "Add a larger one, or set OMP_NUM_THREADS for this command to the CPUs that a worker may use."
        raise UserError(what, where=WHERE, fix=fix)
    if wanted is not None and wanted > most:
        what = f"The cluster has room for {count_of(most, 'worker')} with {unit} (compute.workers: {wanted})"
        raise UserError(what, where=WHERE, fix="Lower compute.workers, or add machines to the cluster.")
    return wanted or most


class _Actor:
    """One worker's process.

    Args:
        expected: the image that its machine must have, which may have joined after the others were checked.
        config: the config as JSON.
    """

    def __init__(self, expected: Image, config: str) -> None:
        self._expected, self._config = expected, config
        self._shared: tuple[str, Any] = ("", None)

    def run(self, compute: Callable[[Any, Any], Any], held: list[Any], part: Any) -> tuple[str, Any]:
        """Return the machine's name in Ray, and the result of a part."""
        require_same(self._expected, own_image(self._config), socket.gethostname())
        name = held[0].hex()
        if name != self._shared[0]:
            self._shared = ("", None)
            self._shared = (name, ray.get(held[0]))
        return ray.get_runtime_context().get_node_id(), compute(self._shared[1], part)

    def release(self, release: Callable[[], object]) -> None:
        """Free what would outlive the process."""
        release()


class _Actors:
    """The workers, started with the first part.

    Args:
        places: those that have room for workers.
        count: number of parts computed at once.
        threads: of a worker without a GPU.
        ours: the image that every machine must have.
        config: the config, as the image's.
        release: called by a worker before it is ended.
        reporter: is warned of lost workers.
    """

    def __init__(
        self,
        places: Places,
        count: int,
        threads: int,
        ours: Image,
        config: str,
        release: Callable[[], object],
        reporter: Reporter,
    ) -> None:
        gpus = places.kind == "GPU"
        self.count = count
        self.device: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
        self.threads = None if gpus else threads
        self._machines, self._release = places.machines, release
        self._needs = Needs(1, 1) if gpus else Needs(threads)
        room = {"num_cpus": self._needs.cpus, "num_gpus": self._needs.gpus}
        # No restarts by Ray: it would have a part wait for a machine that does not come back.
        options = {**room, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
        self._new = ray.remote(_Actor).options(**options)
        self._image, self._config, self._reporter = ours, config, reporter
        self._idle: list[tuple[str, Any]] = []  # with their machines
        self._starting: dict[Any, Any] = {}
        self._failed = 0

    def ask(self, question: Callable[[Shared], Result], needed: Shared) -> Sequence[tuple[str, Result]]:
        """Return each machine's answer."""
        return list(asked(self._machines, question, needed, seconds=CHECK_S))

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
                self._start(min(len(waiting), self.count - len(running)), compute, held, nothing)
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
            what = f"The connection to the cluster is lost: {error}"
            raise UserError(what, where=WHERE, fix=AGAIN) from None
        finally:
            _end([actor for actor, _ in running.values()])

    def _start(self, wanted: int, compute: Callable[[Any, Any], Any], held: list[Any], nothing: object) -> None:
        """Start workers until ``wanted`` are idle or starting."""
        while len(self._idle) + len(self._starting) < wanted:
            actor = self._new.remote(self._image, self._config)
            self._starting[actor.run.remote(compute, held, nothing)] = actor

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
            _released([actor], self._release)
            _end([actor])
        self._reporter.warn(warning)
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self._idle = [(machine, actor) for machine, actor in self._idle if machine in alive]

    def stop(self) -> None:
        """End the processes; the next part starts others."""
        _released([actor for _, actor in self._idle], self._release)
        _end([*(actor for _, actor in self._idle), *self._starting.values()])
        self._idle, self._starting = [], {}


class _LostError(Exception):
    """A worker is lost, or cannot compute its part.

    Args:
        failed: the worker's reason; None: it has ended.
    """

    def __init__(self, failed: WorkerFailedError | None = None) -> None:
        super().__init__()
        self.failed = failed
        fix = "Check its machines and their memory (ray status), and run the same command again."
        ended = UserError(f"The cluster lost the workers of a part {RETRIES + 1} times", where=WHERE, fix=fix)
        self.final: UserError = failed or ended


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


def _released(actors: Sequence[Any], release: Callable[[], object]) -> None:
    """Have idle workers free what would outlive them."""
    if actors and ray.is_initialized() and has_head():
        references = [actor.release.remote(release) for actor in actors]
        with suppress(RayError):
            ray.wait(references, num_returns=len(references), timeout=_RELEASE_S, fetch_local=False)


def _end(actors: Sequence[Any]) -> None:
    if actors and ray.is_initialized() and has_head():
        for actor in actors:
            with suppress(RayError):
                ray.kill(actor)
