"""Answers of a cluster: requests go to its workers in batches, and their completions come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tunewright.adapters.registry import Adapter
from tunewright.core.progress import Reporter
from tunewright.core.workers import ModelWorkers
from tunewright.data.examples import Message
from tunewright.evaluation.answer_worker import AdapterFiles, RequestBatch, WorkerModel, answer_batch
from tunewright.generation.requests import Completion, Request

# A worker waits for the longest answer of its part with half of its rows: the more full batches a part has, the less
# that takes. The fewer parts an arm has, the fewer workers take part in it, and the more a lost worker loses.
_FULL_BATCHES = range(2, 9)
_PARTS = 16


@dataclass(frozen=True)
class ArmRequests:
    """The requests of an arm.

    Args:
        requests: what to complete.
        functions: the functions that each prompt declares.
        on_finished: called with a request's index and its completion as soon as its batch is complete.
        stop_ids: tokens that end an answer.
        adapter: the adapter that the requests name.
        at_once: number of rows that decode together in one worker; None: the model's number.
        company: answers of one company may share vLLM's prefix cache.
    """

    requests: Sequence[Request]
    functions: Sequence[Message | None]
    on_finished: Callable[[int, Completion], None]
    stop_ids: frozenset[int]
    adapter: Adapter | None = None
    at_once: int | None = None
    company: str = ""

    def batch(self, places: range) -> RequestBatch:
        """Return some of the requests, as a worker gets them."""
        constrained = any(request.constraint is not None for request in self.requests)
        return RequestBatch(
            [replace(self.requests[place], constraint=None) for place in places],
            [self.functions[place] for place in places] if constrained else None,
            self.stop_ids,
            self.at_once,
            self.company,
        )


class ClusterAnswers:
    """Requests answered by the workers of a cluster, each with the base in its own memory.

    Args:
        workers: processes with a model each.
        model: what they load.
        reporter: receives their warnings.
    """

    def __init__(self, workers: ModelWorkers, model: WorkerModel, reporter: Reporter) -> None:
        self.workers = workers
        self._model = replace(model, threads=workers.threads)
        self._reporter = reporter

    @property
    def rows(self) -> int:
        """Number of rows that decode at once in each worker."""
        return self._model.rows

    def generate(self, arms: Sequence[ArmRequests]) -> list[list[Completion]]:
        """Answer the requests of all arms at once, and return each arm's completions in their order.

        Raises:
            UserError: a worker cannot load the model, or the cluster loses a batch again and again.
        """
        parts = [
            (number, places)
            for number, arm in enumerate(arms)
            for places in _parts(len(arm.requests), arm.at_once or self.rows)
        ]
        batches = [arms[number].batch(places) for number, places in parts]
        named = {arm.requests[0].adapter: arm.adapter for arm in arms if arm.requests}
        adapters = {name: AdapterFiles.of(of) for name, of in named.items() if name is not None and of is not None}
        done: list[dict[int, Completion]] = [{} for _ in arms]
        model = replace(self._model, adapters=adapters)
        for part, (completions, warned) in self.workers.each(answer_batch, model, batches, RequestBatch([])):
            for message in warned:
                self._reporter.warn(message)
            number, places = parts[part]
            for place, completion in zip(places, completions, strict=True):
                done[number][place] = completion
                arms[number].on_finished(place, completion)
        return [[done[number][place] for place in range(len(arm.requests))] for number, arm in enumerate(arms)]


def _parts(count: int, rows: int) -> Iterator[range]:
    """Yield ranges that differ in length by one at most, whatever the number of workers."""
    batches = min(max(count // (_PARTS * rows), _FULL_BATCHES[0]), _FULL_BATCHES[-1])
    parts = -(-count // (batches * rows))
    return (range(count * part // parts, count * (part + 1) // parts) for part in range(parts))
