"""Workers of a Ray cluster: tasks that compute the parts of a step, and actors that keep a model each.

A lost machine costs only time: Ray computes the parts of its tasks again elsewhere, and another
actor computes the parts of a lost actor.
"""

from __future__ import annotations

import gc
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from tunewright.compute.cluster import (
    AGAIN,
    WHERE,
    Cluster,
    Image,
    Node,
    connected,
    has_head,
    machines_with,
    require_available,
    require_head,
)
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.progress import LogTask, Reporter, Task
from tunewright.core.text import count_of
from tunewright.core.workers import (
    ONE_CPU,
    Machine,
    ModelWorkers,
    Needs,
    Part,
    Result,
    Shared,
    Step,
    WorkerFailedError,
    Workers,
)

_LOOK_S = 3.0  # between two looks at the head and the machines while a part is computed
_REPLACED_S = 600.0  # time to replace a lost machine, if no other machine can do its work
_GRACE_S = 1.0  # time for brief parts to end by themselves, when the command stops
_STOP_S = 15.0  # time for stopped parts to end: a training saves its last step
_BRIEF_S = 0.25  # parts that take less time are sent several to a task: each task adds some 15 ms
_RELEASE_S = 30.0  # time for a process to free its resources: vLLM ends within 25 s
_RETRIES = 3  # runs of a part after the first, if its machine or process is lost
_CHECK = "Check its machines and their memory (ray status), and run the same command again."


@contextmanager
def open_tasks(config: Config, reporter: Reporter) -> Iterator[Workers]:
    """Connect to the cluster that the config names, check it, and yield workers of one CPU each."""
    with connected(config):
        machines = machines_with("CPU")
        cpus = sum(int(node["Resources"]["CPU"]) for node in machines)
        if not cpus:
            raise UserError("The cluster has no machine with a CPU for workers", where=WHERE, fix="Add one to it.")
        count = require_available("CPU", cpus, config.compute.workers)
        cluster = Cluster.of_equal(machines, config)
        reporter.say(f"Cluster: {count_of(len(machines), 'machine')} with {count_of(cpus, 'CPU')}")
        if ray.available_resources().get("CPU", 0) < 1:
            reporter.warn("Other work uses every CPU of the cluster: this command waits for it.")
        try:
            yield _Tasks(cluster, count, reporter, limited=count < cpus)
        finally:
            gc.unfreeze()


class _Tasks:
    """Tasks of a cluster, ``count`` at once if each takes one CPU; ``limited`` if the cluster has more CPUs."""

    def __init__(self, cluster: Cluster, count: int, reporter: Reporter, *, limited: bool) -> None:
        self.count, self.ask = count, cluster.ask
        self.machines = [_machine(node) for node in cluster.machines]
        self._image, self._reporter, self._limited = cluster.image, reporter, limited

    def map(
        self,
        step: Step[Shared, Part, Result],
        shared: Shared,
        parts: Iterable[Part],
        task: Task,
        batch: int = 1,
        needs: Needs | None = None,
    ) -> Iterator[Result]:
        """Yield the result of each part, in order."""
        require_head()
        room, size = needs or ONE_CPU, batch
        run = ray.remote(num_cpus=room.cpus, num_gpus=room.gpus, max_retries=_RETRIES)(_run)
        held = [ray.put(shared)]  # a list, because Ray would resolve a bare reference and send its value with each part
        source = iter(parts)
        waiting: deque[Any] = deque()  # in the order of the parts: references of tasks, and results computed here
        sent: dict[Any, int] = {}  # the tasks' references, with their number of parts
        try:
            while True:
                # A thread of Ray keeps collecting garbage cycles in this process, and would traverse all rows.
                gc.freeze()
                while self._may_send(sent) and (some := list(islice(source, size))):
                    require_head()
                    reference = run.remote(self._image, step, held, some)
                    sent[reference] = len(some)
                    waiting.append(reference)
                if not waiting:
                    return
                first = waiting[0]
                if isinstance(first, list):
                    yield from waiting.popleft()
                elif not _unfinished([first]):
                    waiting.popleft()
                    count = sent.pop(first)
                    results, steps, seconds = _result_of_task(first)
                    if batch > 1 and count == size and seconds < _BRIEF_S:
                        size *= 2
                    task.advance(steps)
                    yield from results
                elif needs is None and self._may_compute(waiting, size) and (some := list(islice(source, batch))):
                    # One worker takes 1.33 times the seconds of no cluster without this: steps wait for each other.
                    require_head()
                    waiting.append([step(shared, part, task) for part in some])
                elif pending := _unfinished(sent):  # none: the first part has ended since the last look
                    first_done(pending, room, self._reporter)
        except ConnectionError as error:
            raise _disconnected(error) from None
        finally:
            if sent and ray.is_initialized() and has_head():
                # Ray aborts this process if a task completes while it is cancelled: let brief parts complete first.
                _, running = ray.wait(list(sent), num_returns=len(sent), timeout=_GRACE_S, fetch_local=False)
                for reference in running:
                    ray.cancel(reference)
                # Wait for parts in progress: afterwards their files are free for the next command.
                ray.wait(list(sent), num_returns=len(sent), timeout=_STOP_S)

    def _may_send(self, sent: Mapping[Any, int]) -> bool:
        """Return whether to send another part, so that no worker waits; two parts a worker take little memory."""
        if len(sent) >= 2 * self.count:
            return False
        return not self._limited or len(_unfinished(sent)) < self.count

    def _may_compute(self, waiting: Iterable[Any], size: int) -> bool:
        """Return whether this process has fewer results that wait than the workers have parts."""
        return sum(len(each) for each in waiting if isinstance(each, list)) < 2 * self.count * size


def _unfinished(references: Iterable[Any]) -> list[Any]:
    asked = list(references)
    return list(ray.wait(asked, num_returns=len(asked), timeout=0, fetch_local=False)[1]) if asked else []


def first_done(references: Sequence[Any], needs: Needs, reporter: Reporter) -> Any:
    """Wait for the first of some parts, as long as the head answers and a machine has room for one; return it.

    Raises:
        UserError: the head is lost, or no machine has had room for minutes.
    """
    lost: float | None = None
    while not (done := ray.wait(list(references), timeout=_LOOK_S, fetch_local=False)[0]):
        require_head()
        if any(_machine(node).room(needs) for node in ray.nodes() if node["Alive"]):
            lost = None
        elif lost is None:
            lost = time.monotonic()
            reporter.warn("The cluster has lost every machine that can compute this: waiting for another.")
        elif time.monotonic() - lost > _REPLACED_S:
            what = f"The cluster has had no machine that can compute this for {_REPLACED_S:.0f} s"
            raise UserError(what, where=WHERE, fix="Add machines, and run the same command again.")
    return done[0]


class _LostError(Exception):
    """The process or machine of a part is lost."""


def _get(reference: Any) -> Any:
    """Return a finished result, or raise the UserError of its part.

    Raises:
        _LostError: the result is lost.
    """
    require_head()
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except RayError as error:
        require_head()
        raise _LostError(type(error).__name__) from None


def _result_of_task(reference: Any) -> tuple[list[Any], int, float]:
    try:
        found: tuple[list[Any], int, float] = _get(reference)
    except _LostError as error:
        what = f"The cluster lost a part of the work {_RETRIES + 1} times: {error}"
        raise UserError(what, where=WHERE, fix=_CHECK) from None
    return found


def _disconnected(error: ConnectionError) -> Exception:
    """Return the error of a lost connection of Ray's client; a part's own ConnectionError stays what it is."""
    of_part = isinstance(error, RayTaskError)  # Ray raises it as an error of both classes
    return error if of_part else UserError(f"The connection to the cluster is lost: {error}", where=WHERE, fix=AGAIN)


def _machine(node: Node) -> Machine:
    resources = node["Resources"]
    return Machine(str(node["NodeManagerAddress"]), int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


class _Counter(LogTask):
    """A task that counts the steps of some parts, for the process that shows the progress."""

    steps = 0

    def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
        """Count the steps."""
        del note, kept
        self.steps += steps


_kept: dict[str, Any] = {}
"""In a worker: the value that the parts of the current step share, by object id. It is read once, not for each part."""


def _shared(held: list[Any]) -> Any:
    name = held[0].hex()
    if name not in _kept:
        _kept.clear()
        gc.collect()
        _kept[name] = ray.get(held[0])
    return _kept[name]


def _run(image: Image, step: Step[Any, Any, Any], held: list[Any], parts: list[Any]) -> tuple[list[Any], int, float]:
    """Compute some parts in a worker; return their results, the steps done and the seconds."""
    image.require_here()
    known = held[0].hex() in _kept
    shared, task = _shared(held), _Counter()
    if not known:
        # Each later collection would traverse modules and shared values: half of the time. Not in
        # an actor: cycles of a replaced model would never be collected.
        gc.freeze()
    began = time.perf_counter()
    results = [step(shared, part, task) for part in parts]
    return results, task.steps, time.perf_counter() - began


# Actors


@contextmanager
def open_actors(
    config: Config,
    threads: int,
    check: Callable[[Any], object],
    needed: object,
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

    def run(self, compute: Callable[[Any, Any], Any], held: list[Any], part: Any) -> tuple[str, Any]:
        """Return the machine's name in Ray, and the result of a part."""
        self._image.require_here()
        return ray.get_runtime_context().get_node_id(), compute(_shared(held), part)

    def release(self, release: Callable[[], object]) -> None:
        """Free resources that would outlive the process."""
        release()


class _Actors:
    """Processes with a model each, started with the first part: a part goes to the next free process.

    Ray ends the process of a task with a GPU after the task, and a kept process could be given
    another GPU. Actors keep theirs. Ray does not restart a lost actor, because its part would wait
    for a machine that may not return: another actor computes the part.
    """

    def __init__(
        self, cluster: Cluster, count: int, needs: Needs, release: Callable[[], object], reporter: Reporter
    ) -> None:
        self.count, self.ask = count, cluster.ask
        self.device: Literal["cpu", "cuda"] = "cuda" if needs.gpus else "cpu"
        self.threads = None if needs.gpus else needs.cpus
        self._image, self._needs, self._release, self._reporter = cluster.image, needs, release, reporter
        self._new = ray.remote(_Actor).options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self._idle: list[tuple[str, Any]] = []  # with their machines
        self._busy: dict[Any, tuple[Any, int | None]] = {}
        """Actors with the number of the part that they compute, or None while an actor loads its model."""

    def each(
        self, compute: Callable[[Shared, Part], Result], shared: Shared, parts: Sequence[Part], nothing: Part
    ) -> Iterator[tuple[int, Result]]:
        """Yield the number of each part with its result, as soon as it is computed."""
        require_head()
        held = [ray.put(shared)]
        waiting = deque(range(len(parts)))
        lost: Counter[int | None] = Counter()
        try:
            while waiting or self._computing():
                while waiting and self._idle:
                    # The actor that was busy last: it has loaded the model that this part needs.
                    (_, actor), number = self._idle.pop(), waiting.popleft()
                    self._busy[actor.run.remote(compute, held, parts[number])] = (actor, number)
                starting = len(self._busy) - len(self._computing())
                for _ in range(min(len(waiting) - starting, self.count - len(self._busy))):
                    actor = self._new.remote(self._image)
                    self._busy[actor.run.remote(compute, held, nothing)] = (actor, None)
                done = first_done(list(self._busy), self._needs, self._reporter)
                actor, part = self._busy.pop(done)
                try:
                    machine, result = _get(done)
                except (WorkerFailedError, _LostError) as error:
                    self._forget(actor, part, error)
                    lost[part] += 1
                    if lost[part] > _RETRIES:
                        what = f"The cluster lost the workers of a part {_RETRIES + 1} times"
                        final = error if isinstance(error, UserError) else UserError(what, where=WHERE, fix=_CHECK)
                        raise final from None
                    if part is not None:
                        waiting.appendleft(part)
                    continue
                self._idle.append((machine, actor))
                if part is None:
                    lost[None] = 0
                else:
                    yield part, result
                    require_head()
        except ConnectionError as error:
            raise _disconnected(error) from None
        finally:
            _end(self._computing())
            self._busy = {reference: each for reference, each in self._busy.items() if each[1] is None}

    def _computing(self) -> list[Any]:
        return [actor for actor, part in self._busy.values() if part is not None]

    def _forget(self, actor: Any, part: int | None, error: WorkerFailedError | _LostError) -> None:
        """Warn of a lost worker; end a failed one, and forget idle workers of lost machines."""
        if isinstance(error, WorkerFailedError):
            self._reporter.warn(f"{error.what}\nAnother worker computes its part again.")
            self._free([actor])
            _end([actor])
        elif part is None:
            self._reporter.warn("The cluster lost a worker while it loaded the base.")
        else:
            self._reporter.warn("The cluster lost a worker: its part is computed again by another.")
        # Otherwise a part that is given to several lost actors in turn would soon count as lost too often.
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self._idle = [(machine, actor) for machine, actor in self._idle if machine in alive]

    def _free(self, actors: Sequence[Any]) -> None:
        """Have idle workers free resources that would outlive them."""
        if actors and ray.is_initialized() and has_head():
            references = [actor.release.remote(self._release) for actor in actors]
            with suppress(RayError):
                ray.wait(references, num_returns=len(references), timeout=_RELEASE_S, fetch_local=False)

    def stop(self) -> None:
        """End the processes; the next part starts new ones."""
        idle = [actor for _, actor in self._idle]
        self._free(idle)
        _end([*idle, *(actor for actor, _ in self._busy.values())])
        self._idle, self._busy = [], {}


def _end(actors: Sequence[Any]) -> None:
    if actors and ray.is_initialized() and has_head():
        for actor in actors:
            with suppress(RayError):
                ray.kill(actor)
