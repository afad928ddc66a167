"""Workers of a Ray cluster: tasks that compute the parts of a step, and actors that keep a model each.

A lost machine costs time only: its parts are computed again elsewhere, and files are written by the command alone.
"""

from __future__ import annotations

import gc
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

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
from tunewright.core.progress import Reporter, Task
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
_REPLACED_S = 600.0  # for a lost machine to be replaced, if no other can do its work
_STOP_S = 15.0  # for parts that are being stopped: a training saves its last step
_BRIEF_S = 0.25  # parts of less time are sent more at once: each task takes some 15 ms more
_RELEASE_S = 30.0  # for a process to free what it holds: vLLM ends within 25 s
_RETRIES = 3  # runs of a part after the first, if its machine or process is lost

Needed = TypeVar("Needed")


@contextmanager
def open_cluster(config: Config, reporter: Reporter) -> Iterator[Workers]:
    """Connect to the cluster that the config names, check it, and yield its workers."""
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
            yield _RayWorkers(cluster, count, reporter, limited=count < cpus)
        finally:
            gc.unfreeze()


class _RayWorkers:
    """Tasks of a cluster, ``count`` at once if each takes one CPU; ``limited`` if the cluster has more CPUs."""

    def __init__(self, cluster: Cluster, count: int, reporter: Reporter, *, limited: bool) -> None:
        self.cluster, self.count, self.reporter, self.limited = cluster, count, reporter, limited
        self.machines = [_machine(node) for node in cluster.machines]

    def ask(self, question: Callable[[Shared], Result], needed: Shared) -> Sequence[tuple[str, Result]]:
        """Return each machine's answer."""
        return self.cluster.ask(question, needed)

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
        ahead = _Ahead(self, step, shared, iter(parts), task, batch, needs)
        try:
            while results := ahead.results():
                yield from results
        finally:
            if ahead.sent and ray.is_initialized() and has_head():
                # Those in progress are waited for: their files are free for the next command then.
                answers = [each.answer for each in ahead.sent]
                for answer in answers:
                    ray.cancel(answer)
                ray.wait(answers, num_returns=len(answers), timeout=_STOP_S)


class _Sent(NamedTuple):
    """Parts that were sent to a worker: references to its answer and to their end, and their number."""

    answer: Any
    ended: Any
    parts: int


class _Ahead:
    """The parts of a step that are sent ahead of the results, or computed by this process meanwhile, in their order.

    ``batch`` parts are sent at once, at first.
    """

    def __init__(
        self,
        workers: _RayWorkers,
        step: Step[Any, Any, Any],
        shared: Any,
        parts: Iterator[Any],
        task: Task,
        batch: int,
        needs: Needs | None,
    ) -> None:
        self._workers, self._step, self._shared, self._parts, self._task = workers, step, shared, parts, task
        self._batch, self._needs, self._here = batch, needs or ONE_CPU, needs is None
        self._many = batch
        room = {"num_cpus": self._needs.cpus, "num_gpus": self._needs.gpus}
        self._run = ray.remote(**room, max_retries=_RETRIES, num_returns=2)(_run)
        self._held = [ray.put(shared)]  # a list: Ray would send what a bare reference stands for with each part
        self.sent = deque[_Sent]()
        self._waiting = deque[_Sent | list[Any]]()

    def results(self) -> list[Any]:
        """Return the results of the next parts; none if there are no more."""
        # A thread of Ray collects cycles in this process, again and again, and would look at all rows each time.
        gc.freeze()
        self._send()
        while self._waiting:
            first = self._waiting[0]
            there = not isinstance(first, _Sent) or ray.wait([first.answer], timeout=0, fetch_local=False)[0]
            if self._here and not there and self._compute():
                continue
            results = self._taken(first) if isinstance(first, _Sent) else first
            self._waiting.popleft()
            return results
        return []

    def _send(self) -> None:
        """Send parts until there are twice as many as workers, so that none of these waits. More would take memory."""
        workers = self._workers
        while len(self.sent) < 2 * workers.count and (some := list(islice(self._parts, self._many))):
            require_head()
            # Without free CPUs to limit them, a part begins once an earlier one has ended.
            before = self.sent[-workers.count].ended if workers.limited and len(self.sent) >= workers.count else None
            answer, ended = self._run.remote(workers.cluster.image, self._step, self._held, some, before)
            self.sent.append(_Sent(answer, ended, len(some)))
            self._waiting.append(self.sent[-1])

    def _compute(self) -> bool:
        """Compute some parts here, unless as many results of this process wait as the workers have parts."""
        done = sum(len(results) for results in self._waiting if not isinstance(results, _Sent))
        if done >= 2 * self._workers.count * self._many or not (some := list(islice(self._parts, self._batch))):
            return False
        require_head()
        self._waiting.append([self._step(self._shared, part, self._task) for part in some])
        return True

    def _taken(self, sent: _Sent) -> list[Any]:
        """Return the results of parts that were sent, and count what they have done."""
        try:
            first_done([sent.answer], self._needs, self._workers.reporter)
            require_head()
            results: list[Any]
            results, steps, seconds = ray.get(sent.answer)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except ConnectionError as error:  # of Ray's client
            raise _disconnected(error) from None
        except RayError as error:
            require_head()
            what = f"The cluster lost a part of the work {_RETRIES + 1} times: {type(error).__name__}"
            raise UserError(what, where=WHERE, fix=_CHECK) from None
        self.sent.popleft()
        self._task.advance(steps)
        if self._batch > 1 and sent.parts == self._many and seconds < _BRIEF_S:
            self._many *= 2
        return results


_CHECK = "Check its machines and their memory (ray status), and run the same command again."


def _disconnected(error: ConnectionError) -> UserError:
    return UserError(f"The connection to the cluster is lost: {error}", where=WHERE, fix=AGAIN)


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


def _machine(node: Node) -> Machine:
    resources = node["Resources"]
    return Machine(str(node["NodeManagerAddress"]), int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


class _Counter:
    """A task that counts the steps of some parts, for the process that shows the progress."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count the steps."""
        del note
        self.steps += steps

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        """Ignore the numbers: the parts of a step have no curves."""


_kept: dict[str, Any] = {}
"""In a worker: what the parts of the current step share, by its object's id. It is read once, not for each part."""


def _run(
    image: Image, step: Step[Any, Any, Any], held: list[Any], parts: list[Any], _before: None
) -> tuple[tuple[list[Any], int, float], None]:
    """Compute some parts in a worker; return their results, the steps done and the seconds, and that they ended."""
    image.require_here()
    name = held[0].hex()
    if name not in _kept:
        _kept.clear()
        gc.collect()
        _kept[name] = ray.get(held[0])
        gc.freeze()  # modules and what is shared: each later collection would look at them, in half of the time
    task = _Counter()
    began = time.perf_counter()
    results = [step(_kept[name], part, task) for part in parts]
    return (results, task.steps, time.perf_counter() - began), None


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
                    if lost[number] > _RETRIES:
                        raise error.final from None
                    waiting.appendleft(number)
                    continue
                self._idle.append((machine, actor))
                yield number, result
                require_head()
        except ConnectionError as error:  # of Ray's client
            raise _disconnected(error) from None
        finally:
            _end([actor for actor, _ in running.values()])

    def _started(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            machine, _ = _result(reference)
        except _LostError as error:
            self._forget(actor, error, "The cluster lost a worker while it loaded the base.")
            self._failed += 1
            if self._failed > _RETRIES:
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
        lost = f"The cluster lost the workers of a part {_RETRIES + 1} times"
        self.final: UserError = failed or UserError(lost, where=WHERE, fix=_CHECK)


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
