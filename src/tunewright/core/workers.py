"""Work in parts that do not depend on each other, in this process or on many machines.

Steps over many rows take ``Workers``. The workers of this process compute the parts one after the other;
``tunewright.compute`` has a cluster's workers. Function, input and parts are the same, so the results are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from tunewright.core.errors import UserError
from tunewright.core.progress import Task

Shared = TypeVar("Shared")
Part = TypeVar("Part")
Result = TypeVar("Result")

Step = Callable[[Shared, Part, Task], Result]
"""Computes one part, given the shared value. It is a function of a module, changes neither, and advances the task."""


@dataclass(frozen=True)
class Needs:
    """Resources that one part takes of a machine while it is computed."""

    cpus: int = 1
    gpus: int = 0


ONE_CPU = Needs()


@dataclass(frozen=True)
class Machine:
    """A machine of a cluster."""

    name: str
    cpus: int
    gpus: int

    def room(self, needs: Needs) -> int:
        """Return the number of parts that the machine computes at once."""
        by_gpus = self.gpus // needs.gpus if needs.gpus else self.cpus
        return min(self.cpus // needs.cpus, by_gpus)


def on_machine(name: str, error: UserError) -> UserError:
    """Return the error of a machine, with its name."""
    return UserError(f"The machine {name}: {error.what}", where=error.where, fix=error.fix)


class WorkerFailedError(UserError):
    """A worker's process cannot compute a part, which another process may be able to compute."""


class Asked(Protocol):
    """Machines that answer questions."""

    def ask(self, question: Callable[[Shared], Result], needed: Shared) -> Sequence[tuple[str, Result]]:
        """Return the name of each machine with its answer, a function of a module called with ``needed``.

        Raises:
            UserError: as the function raises it, with the machine's name, or a machine does not answer.
        """


class Workers(Asked, Protocol):
    """Processes that compute the parts of a step."""

    @property
    def count(self) -> int:
        """Number of parts computed at once, if each takes one CPU."""

    @property
    def machines(self) -> Sequence[Machine]:
        """The machines of the cluster; empty if parts are computed in this process."""

    def map(
        self,
        step: Step[Shared, Part, Result],
        shared: Shared,
        parts: Iterable[Part],
        task: Task,
        batch: int = 1,
        needs: Needs | None = None,
    ) -> Iterator[Result]:
        """Yield ``step(shared, part, task)`` for each part, in the order of the parts.

        Args:
            step: the function.
            shared: what every part needs.
            parts: taken only a few ahead of the results, so that a long iterable is never held as a whole.
            task: advanced by the parts.
            batch: number of parts that one worker gets at once, if a part is small.
            needs: resources of one part, which this process then does not compute. None means one CPU,
                and this process also computes parts while it waits for the cluster.
        """


class ModelWorkers(Asked, Protocol):
    """Processes of a cluster that each keep a model between the parts that they compute."""

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Device of the models."""

    @property
    def threads(self) -> int | None:
        """Threads of each process's computations; None on a GPU."""

    @property
    def count(self) -> int:
        """Number of parts computed at once."""

    def each(
        self, compute: Callable[[Shared, Part], Result], shared: Shared, parts: Sequence[Part], nothing: Part
    ) -> Iterator[tuple[int, Result]]:
        """Yield the number of each part with its result, as soon as it is computed.

        Args:
            compute: a function of a module; it keeps what it has loaded in its process. If it raises a
                WorkerFailedError, the process is ended, and another one computes the part.
            shared: what every part needs.
            parts: computed again elsewhere if a process is lost.
            nothing: a part without work, which a new process computes first, to load the model.
        """

    def stop(self) -> None:
        """End the processes, which frees their memory; the next parts start others."""


class ThisProcess:
    """The workers of a project without a cluster: parts are computed here, each when its result is requested."""

    count = 1
    machines: Sequence[Machine] = ()

    def ask(self, question: Callable[[Shared], Result], needed: Shared) -> Sequence[tuple[str, Result]]:
        """Return nothing: there is no other machine."""
        del question, needed
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
        del batch, needs
        return (step(shared, part, task) for part in parts)


THIS_PROCESS = ThisProcess()


def slices(items: Sequence[Part], size: int) -> Iterator[Sequence[Part]]:
    """Yield the items in slices of ``size``; the last may be shorter."""
    return (items[at : at + size] for at in range(0, len(items), size))
