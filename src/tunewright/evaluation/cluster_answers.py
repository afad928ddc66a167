"""Answers of a cluster: requests go to its workers in batches, and their completions come back."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from tunewright.adapters.registry import CONFIG, WEIGHTS, Adapter
from tunewright.chat import ChatFormat
from tunewright.chat.call_grammar import CallGrammars
from tunewright.config import Quantization
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import LogReporter, Reporter
from tunewright.core.workers import ModelWorkers
from tunewright.data.examples import Message
from tunewright.evaluation.answer_constraints import AnswerConstraints
from tunewright.evaluation.embedded_answers import EmbeddedAnswers
from tunewright.generation.constraints import Grammar
from tunewright.generation.requests import Completion, Request
from tunewright.models.bases import Base, base_here
from tunewright.models.loading import device

_FULL_BATCHES = 2
"""Batches that a worker gets at once. With more, fewer workers take part in a small arm, and a lost worker loses more;
with fewer, a worker more often waits for the longest answer of its part with half of its rows."""


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter that a model is loaded from, for workers that do not see the project's folder."""

    name: str
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, adapter: Adapter) -> AdapterFiles:
        """Return the files of an adapter."""
        return cls(adapter.name, {name: (adapter.folder / name).read_bytes() for name in (CONFIG, WEIGHTS)})


@dataclass(frozen=True)
class WorkerModel:
    """Everything that a worker's answers need besides the requests."""

    base: Base
    chat: ChatFormat
    dtype: str
    quantization: Quantization
    batch_size: int
    grammar: Grammar | CallGrammars | None
    threads: int | None
    """Threads of a CPU's computations; None: with a GPU they decide nothing."""
    adapters: Mapping[str, AdapterFiles] = field(default_factory=dict)
    """By the name that requests give."""

    @cached_property
    def key(self) -> str:
        """Digest of everything but the adapters, which are added to a loaded base."""
        rule = None if self.grammar is None else self.grammar.rule
        decides = [self.base.digest, self.chat.digest, self.dtype, self.quantization, self.batch_size, rule]
        return digest(decides)


@dataclass(frozen=True)
class RequestBatch:
    """Some requests of an arm. They are sent without their constraints, which are compiled again where they are used.

    Args:
        requests: what to complete, without constraints.
        functions: the functions that each prompt declares; None: the answers are free.
        stop_ids: tokens that end an answer.
        at_once: number of rows that decode together; None: the model's batch size.
    """

    requests: Sequence[Request]
    functions: Sequence[Message | None] | None = None
    stop_ids: frozenset[int] = frozenset()
    at_once: int | None = None


@dataclass(frozen=True)
class ArmRequests:
    """The requests of an arm.

    Args:
        requests: what to complete.
        functions: the functions that each prompt declares.
        on_finished: called with a request's index and its completion as soon as its batch is complete.
        stop_ids: tokens that end an answer.
        adapter: the adapter that the requests name.
        at_once: number of rows that decode together in one worker; None: the model's batch size.
    """

    requests: Sequence[Request]
    functions: Sequence[Message | None]
    on_finished: Callable[[int, Completion], None]
    stop_ids: frozenset[int]
    adapter: Adapter | None = None
    at_once: int | None = None

    def batch(self, places: range) -> RequestBatch:
        """Return some of the requests, as a worker gets them."""
        constrained = any(request.constraint is not None for request in self.requests)
        return RequestBatch(
            [replace(self.requests[place], constraint=None) for place in places],
            [self.functions[place] for place in places] if constrained else None,
            self.stop_ids,
            self.at_once,
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

    def generate(self, arms: Sequence[ArmRequests]) -> list[list[Completion]]:
        """Answer the requests of all arms at once, and return each arm's completions in their order.

        Raises:
            UserError: a worker cannot load the model, or the cluster loses a batch again and again.
        """
        parts = [
            (number, places)
            for number, arm in enumerate(arms)
            for places in _parts(len(arm.requests), _FULL_BATCHES * (arm.at_once or self._model.batch_size))
        ]
        adapters = {arm.adapter.name: AdapterFiles.of(arm.adapter) for arm in arms if arm.adapter is not None}
        batches = [arms[number].batch(places) for number, places in parts]
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


def _parts(count: int, size: int) -> Iterator[range]:
    """Yield ranges of at most ``size`` that differ in length by one at most, whatever the number of workers."""
    parts = -(-count // size)
    return (range(count * part // parts, count * (part + 1) // parts) for part in range(parts))


# In a worker


class _Warnings(LogReporter):
    """A reporter that keeps its warnings."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        """Keep the warning."""
        self.warned.append(message)


class _Loaded:
    """The model of this process."""

    def __init__(self, model: WorkerModel) -> None:
        self.reporter = _Warnings()
        base = base_here(model.base)
        self.answers = EmbeddedAnswers(
            base, model.chat, model.dtype, model.quantization, model.batch_size, self.reporter
        )
        self.constraints = AnswerConstraints(model.chat, model.grammar) if model.grammar else None

    def add(self, adapter: AdapterFiles) -> None:
        """Add an adapter to the base, unless it has it."""
        if adapter.name not in self.answers.adapters:
            with TemporaryDirectory() as folder:
                for name, content in adapter.files.items():
                    Path(folder, name).write_bytes(content)
                self.answers.model_with((adapter.name, Path(folder)))


def _require_device(threads: int | None) -> None:
    """Set the number of threads, and check that models are loaded where the journal says that answers come from."""
    import torch

    wanted, found = "cuda" if threads is None else "cpu", device().split(":")[0]
    if wanted != found:
        what = f"torch on {socket.gethostname()} computes on {found}, and the cluster's workers are on {wanted}"
        fix = "Install torch for its GPUs there, or start Ray there with --num-gpus 0."
        raise UserError(what, where="compute.cluster", fix=fix)
    if threads is not None:
        torch.set_num_threads(threads)


_loaded: dict[str, _Loaded] = {}
"""At most one model by its key."""


def answer_batch(model: WorkerModel, batch: RequestBatch) -> tuple[list[Completion], list[str]]:
    """Return the completions of a batch, and what there is to warn of. An empty batch only loads the model.

    Raises:
        UserError: the base or its device is not on this machine, or memory does not suffice.
    """
    _require_device(model.threads)
    if model.key not in _loaded:
        _loaded.clear()
        _loaded[model.key] = _Loaded(model)
    loaded = _loaded[model.key]
    loaded.answers.model_with()
    requests = batch.requests
    for name in {request.adapter for request in requests if request.adapter is not None}:
        loaded.add(model.adapters[name])
    if batch.functions is not None:
        assert loaded.constraints is not None
        rows = zip(requests, batch.functions, strict=True)
        requests = [replace(request, constraint=loaded.constraints.of_row(declared)) for request, declared in rows]
    completions = loaded.answers.generate(requests, stop_ids=batch.stop_ids, at_once=batch.at_once)
    warned, loaded.reporter.warned = loaded.reporter.warned, []
    return completions, warned
