"""Workers with a model each, in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from tunewright.core.workers import Part, Result, Shared


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
        return [(host, _copied(question(_copied(needed)))) for host in ("10.0.0.1", "10.0.0.2")]

    def each(
        self, compute: Callable[[Shared, Part], Result], shared: Shared, parts: Sequence[Part], nothing: Part
    ) -> Iterator[tuple[int, Result]]:
        """Yield the result of each part."""
        _copied(compute(*_copied((shared, nothing))))
        for number in reversed(range(len(parts))):
            given: Any = parts[number]
            self.sizes.append(len(given.requests))
            yield number, _copied(compute(*_copied((shared, parts[number]))))

    def stop(self) -> None:
        """Count the call."""
        self.stopped += 1


def _copied(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))
