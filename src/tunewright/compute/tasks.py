"""Workers of a Ray cluster: tasks that compute the parts of a step.

A lost machine costs time only: Ray computes its parts again elsewhere, and results are taken in the order of the parts.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

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
from tunewright.core.workers import ONE_CPU, Machine, Needs, Part, Result, Shared, Step, Workers

_LOOK_S = 3.0  # between two looks at the head and the machines while a part is computed
_REPLACED_S = 600.0  # for a lost machine to be replaced, if no other can do its work
_STOP_S = 15.0  # for parts that are being stopped: a training saves its last step
_BRIEF_S = 0.25  # parts of less time are sent more at once: each task takes some 15 ms more
RETRIES = 3  # runs of a part after the first, if its machine or process is lost


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
        self._run = ray.remote(**room, max_retries=RETRIES, num_returns=2)(_run)
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
            if not isinstance(first, _Sent):
                results = first
            elif self._here and not ray.wait([first.answer], timeout=0, fetch_local=False)[0] and self._compute():
                continue
            else:
                results = self._taken(first)
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
            raise disconnected(error) from None
        except RayError as error:
            require_head()
            what = f"The cluster lost a part of the work {RETRIES + 1} times: {type(error).__name__}"
            raise UserError(what, where=WHERE, fix=CHECK) from None
        self.sent.popleft()
        self._task.advance(steps)
        if self._batch > 1 and sent.parts == self._many and seconds < _BRIEF_S:
            self._many *= 2
        return results


CHECK = "Check its machines and their memory (ray status), and run the same command again."


def disconnected(error: ConnectionError) -> UserError:
    """Return the error of a lost connection of Ray's client."""
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


class _Counter(LogTask):
    """A task that counts the steps of some parts, for the process that shows the progress."""

    steps = 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count the steps."""
        del note
        self.steps += steps


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
