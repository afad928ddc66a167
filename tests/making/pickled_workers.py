"""Workers of this process that get pickled parts, with a model each or on several machines."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch

from tunewright.core.errors import UserError
from tunewright.core.progress import Task
from tunewright.core.workers import Machine, Needs, Part, Result, Shared, Step, on_machine

CPUS = torch.get_num_threads()


def copied(value: Any) -> Any:
    """The value as another process gets it, with arrays that cannot be written."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(text, buffers=[bytes(buffer.raw()) for buffer in buffers])


class PickledWorkers:
    """Workers that get pickled parts some time before their results are needed, with arrays that cannot be written."""

    count = 3
    machines = ()

    def ask(self, question: Callable[[Shared], Result], needed: Shared) -> Sequence[tuple[str, Result]]:
        """Return nothing: there is no other machine."""
        return []

    def map(
        self,
        step: Step[Shared, Part, Result],
        shared: Shared,
        parts: Iterable[Part],
        task: Task,
        batch: int = 1,
        needs: Needs | None = None,
    ) -> Iterator[Result]:
        """Yield the result of each part."""
        source = iter(parts)
        sent: deque[Any] = deque()
        while some := list(islice(source, batch)):
            sent.append(copied((step, shared, some)))
            if len(sent) >= 4:
                yield from _done(sent.popleft(), task)
        while sent:
            yield from _done(sent.popleft(), task)


def _done(work: Any, task: Task) -> Any:
    step, shared, parts = work
    return copied([step(shared, part, task) for part in parts])


class PickledCluster:
    """Machines whose work is done here, with pickled inputs and results."""

    def __init__(self, *machines: Machine, changed: Callable[[Any], Any] = lambda asked: asked) -> None:
        self.machines = machines or (Machine("10.0.0.7", CPUS, 0), Machine("10.0.0.8", 2 * CPUS + CPUS // 2, 0))
        self.count = sum(machine.cpus for machine in self.machines)
        self.changed = changed
        self.needs: list[Needs] = []

    def ask(self, question: Callable[[Shared], Result], needed: Shared) -> Sequence[tuple[str, Result]]:
        """Call the function for each machine; the last one sees what is changed."""
        answers = []
        for machine in self.machines:
            seen = self.changed(needed) if machine is self.machines[-1] else needed
            try:
                answers.append((machine.name, question(copied(seen))))
            except UserError as error:
                raise on_machine(machine.name, error) from None
        return answers

    def map(
        self,
        step: Step[Shared, Part, Result],
        shared: Shared,
        parts: Iterable[Part],
        task: Task,
        batch: int = 1,
        needs: Needs | None = None,
    ) -> Iterator[Result]:
        """Yield the result of each part, none of which this process may compute."""
        assert needs is not None
        self.needs.append(needs)
        for part in parts:
            yield copied(step(copied(shared), copied(part), task))


class PickledModels:
    """Workers that get pickled parts, and complete the last one first."""

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = 1
    count = 2

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.stopped = 0

    def ask(self, question: Callable[[Shared], Result], needed: Shared) -> Sequence[tuple[str, Result]]:
        """Return the answers of two machines."""
        return [(host, copied(question(copied(needed)))) for host in ("10.0.0.1", "10.0.0.2")]

    def each(
        self, compute: Callable[[Shared, Part], Result], shared: Shared, parts: Sequence[Part], nothing: Part
    ) -> Iterator[tuple[int, Result]]:
        """Yield the result of each part."""
        copied(compute(*copied((shared, nothing))))
        for number in reversed(range(len(parts))):
            given: Any = parts[number]
            self.sizes.append(len(given.requests))
            yield number, copied(compute(*copied((shared, parts[number]))))

    def stop(self) -> None:
        """Count the call."""
        self.stopped += 1
