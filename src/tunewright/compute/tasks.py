"""Workers on a Ray cluster: the parts of a step as tasks.

A lost machine costs time only: Ray runs its parts again elsewhere, and results are taken in the order of the parts.
"""

from __future__ import annotations

import gc
import pickle
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy
import numpy.typing
import ray
from ray.exceptions import RayError, RayTaskError

from tunewright.compute.cluster import (
    AGAIN,
    CHECK_S,
    WHERE,
    Image,
    Node,
    asked,
    connected,
    has_head,
    image,
    machines_with,
    own_image,
    require_equal,
    require_head,
    require_same,
)
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter, Task
from tunewright.core.text import count_of
from tunewright.core.workers import ONE_CPU, Machine, Needs, Part, Result, Shared, Step, Workers

_LOOK_S = 3.0  # between two looks at the head and the machines while a part is computed
_REPLACED_S = 600.0  # for a lost machine to be replaced, if no other can do its work
_STOP_S = 15.0  # for parts that are being stopped: a training saves its last step
_BRIEF_S = 0.25  # parts of less time are sent more at once: each task takes some 15 ms more
RETRIES = 3  # runs of a part after the first, if its machine or process is lost


@contextmanager
def open_cluster(config: Config, reporter: Reporter) -> Iterator[Workers]:
    """Connect to the cluster that the config names, check it, and yield its workers.

    Raises:
        UserError: as for :func:`tunewright.compute.open_workers`.
    """
    with connected(config):
        machines = machines_with("CPU")
        cpus = sum(int(node["Resources"]["CPU"]) for node in machines)
        count = _count(config, cpus)
        text = config.model_dump_json()
        require_equal(machines, text)
        reporter.say(f"Cluster: {count_of(len(machines), 'machine')} with {count_of(cpus, 'CPU')}")
        if ray.available_resources().get("CPU", 0) < 1:
            reporter.warn("Other work uses every CPU of the cluster: this command waits for it.")
        try:
            yield _RayWorkers(machines, count, cpus, image(text), text, reporter)
        finally:
            gc.unfreeze()


def _count(config: Config, cpus: int) -> int:
    wanted = config.compute.workers
    if not cpus:
        raise UserError("The cluster has no machine with a CPU for workers", where=WHERE, fix="Add one to it.")
    if wanted is not None and wanted > cpus:
        fix = "Lower compute.workers, or add machines to the cluster."
        raise UserError(f"Too few CPUs in the cluster: {cpus} (compute.workers: {wanted})", where=WHERE, fix=fix)
    return wanted or cpus


_Packed = list[numpy.typing.NDArray[numpy.uint8]]


def _packed(value: Any) -> _Packed:
    """Return a value as bytes, and its arrays apart, none of which Ray copies.

    Ray's own pickler asks Python code about each object, which takes twice the time for rows. The bytes are arrays too,
    because Ray's client cannot forward other buffers.
    """
    buffers: list[pickle.PickleBuffer] = []
    with _no_collection():
        parts = [memoryview(pickle.dumps(value, protocol=5, buffer_callback=buffers.append))]
    parts += [buffer.raw() for buffer in buffers]
    return [numpy.frombuffer(part, dtype=numpy.uint8) for part in parts]


def _unpacked(packed: _Packed) -> Any:
    data, *arrays = packed
    with _no_collection():
        return pickle.loads(data.data, buffers=arrays)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Have Python collect no cycles: some thousand new objects, none in a cycle, would have it look at all rows."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _RayWorkers:
    """Tasks of a cluster.

    Args:
        nodes: the machines that were there at the start, as Ray describes them.
        count: number of parts computed at once, if each takes one CPU.
        cpus: number of CPUs, of which the parts use ``count``.
        ours: the image that every machine must have, those that join later too.
        config: the config, as the image's.
        reporter: is warned of parts that wait for a machine.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        count: int,
        cpus: int,
        ours: Image,
        config: str,
        reporter: Reporter,
    ) -> None:
        self.count, self.image, self.config, self._nodes = count, ours, config, nodes
        self.limited = count < cpus
        self.reporter = reporter
        self.machines = [_machine(node) for node in nodes]

    def check(self, question: Callable[[Shared], object], shared: Shared) -> None:
        """Call a function on each machine."""
        for _ in asked(self._nodes, question, shared, seconds=CHECK_S):
            pass

    def map(
        self,
        step: Step[Shared, Part, Result],
        shared: Shared,
        parts: Iterable[Part],
        task: Task,
        batch: int = 1,
        needs: Needs = ONE_CPU,
        *,
        here: bool = True,
    ) -> Iterator[Result]:
        """Yield the result of each part, in order."""
        require_head()
        ahead = _Ahead(self, step, shared, iter(parts), task, batch, needs, here=here)
        try:
            while results := ahead.results():
                yield from results
        finally:
            ahead.stop()


@dataclass(frozen=True)
class _Sent:
    """Parts that were sent to a worker: references to its answer and to their end, and their number."""

    answer: Any
    ended: Any
    parts: int

    def has_ended(self) -> bool:
        """Return True if the answer is there."""
        return bool(ray.wait([self.answer], timeout=0, fetch_local=False)[0])


class _Ahead:
    """The parts of a step that are sent ahead of the results, or done by this process meanwhile, in their order.

    Args:
        workers: the cluster.
        step: computes one part.
        shared: what every part needs.
        parts: are taken as they are needed.
        task: is advanced by what the parts have done.
        batch: number of parts that are sent at once, at first.
        needs: what one part takes of a machine.
        here: whether this process computes parts while it waits.
    """

    def __init__(
        self,
        workers: _RayWorkers,
        step: Step[Any, Any, Any],
        shared: Any,
        parts: Iterator[Any],
        task: Task,
        batch: int,
        needs: Needs,
        *,
        here: bool,
    ) -> None:
        self._workers, self._step, self._shared, self._parts, self._task = workers, step, shared, parts, task
        self._batch, self._needs, self._here = batch, needs, here
        self._many = batch
        self._run = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=RETRIES, num_returns=2)(_run)
        self._held = ray.put(_packed(shared))
        self._sent = deque[_Sent]()
        self._waiting = deque[_Sent | list[Any]]()

    def results(self) -> list[Any]:
        """Return the results of the next parts; none if there are no more."""
        # A thread of Ray collects cycles in this process, again and again, and would look at all rows each time.
        gc.freeze()
        self._send()
        while self._waiting:
            first = self._waiting[0]
            if isinstance(first, _Sent) and self._here and not first.has_ended() and self._compute():
                continue
            results = self._taken(first) if isinstance(first, _Sent) else first
            self._waiting.popleft()
            return results
        return []

    def _send(self) -> None:
        """Send parts until there are twice as many as workers, so that none of these waits. More would take memory."""
        count = self._workers.count
        while len(self._sent) < 2 * count and (some := list(islice(self._parts, self._many))):
            require_head()
            # Without free CPUs to limit them, a part begins once an earlier one has ended.
            before = self._sent[-count].ended if self._workers.limited and len(self._sent) >= count else None
            answer, ended = self._run.remote(
                self._workers.image, self._workers.config, self._step, [self._held], _packed(some), before
            )
            self._sent.append(_Sent(answer, ended, len(some)))
            self._waiting.append(self._sent[-1])

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
            packed, steps, seconds = ray.get(sent.answer)
            results: list[Any] = _unpacked(packed)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except ConnectionError as error:  # of Ray's client
            what = f"The connection to the cluster is lost: {error}"
            raise UserError(what, where=WHERE, fix=AGAIN) from None
        except RayError as error:
            require_head()
            what = f"The cluster lost a part of the work {RETRIES + 1} times: {type(error).__name__}"
            fix = "Check its machines and their memory (ray status), and run the same command again."
            raise UserError(what, where=WHERE, fix=fix) from None
        self._sent.popleft()
        self._task.advance(steps)
        if self._batch > 1 and sent.parts == self._many and seconds < _BRIEF_S:
            self._many *= 2
        return results

    def stop(self) -> None:
        """Cancel what is being computed."""
        if self._sent and ray.is_initialized() and has_head():
            _stop([part.answer for part in self._sent])


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


def _stop(sent: list[Any]) -> None:
    """Cancel parts, and wait for those in progress: their files are free for the next command then."""
    for reference in sent:
        ray.cancel(reference)
    ray.wait(sent, num_returns=len(sent), timeout=_STOP_S)


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
    expected: Image, config: str, step: Step[Any, Any, Any], held: list[Any], parts: _Packed, _before: None
) -> tuple[Any, None]:
    """Compute some parts in a worker; return their results, the steps done and the seconds, and that they ended."""
    require_same(expected, own_image(config), socket.gethostname())
    reference = held[0]
    name = reference.hex()
    if name not in _kept:
        _kept.clear()
        gc.collect()
        _kept[name] = _unpacked(ray.get(reference))
        gc.freeze()  # modules and what is shared: each later collection would look at them, in half of the time
    task = _Counter()
    began = time.perf_counter()
    packed = _packed([step(_kept[name], part, task) for part in _unpacked(parts)])
    return (packed, task.steps, time.perf_counter() - began), None
