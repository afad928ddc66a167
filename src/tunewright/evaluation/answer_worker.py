"""The model that answers requests, in this process or in the workers of a cluster, which return their completions."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils.memory import clear_device_cache

from tunewright.adapters.registry import CONFIG, WEIGHTS, Adapter
from tunewright.chat import ChatFormat
from tunewright.chat.call_grammar import CallGrammars
from tunewright.compute.relay import KeptMessages
from tunewright.config import Quantization
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.core.workers import ModelWorkers, WorkerFailedError, on_machine
from tunewright.data.examples import Message
from tunewright.engines.child import PrivateFolder
from tunewright.engines.choice import EMBEDDED, AnswerEngine, require_equal, vllm_here
from tunewright.engines.vllm.answers import VllmAnswers, VllmStoppedError, rows_at_once
from tunewright.evaluation.answer_constraints import AnswerConstraints
from tunewright.generation.constraints import Grammar
from tunewright.generation.generate import BatchSize, generate_halving
from tunewright.generation.requests import Completion, Request
from tunewright.models.bases import Base, base_here
from tunewright.models.loading import device, load_model, named, with_adapters
from tunewright.training.proving import proved


@dataclass(frozen=True)
class AnswerModel:
    """Everything that answers depend on besides the requests and their adapters, and how many are computed at once."""

    base: Base
    chat: ChatFormat
    dtype: str
    quantization: Quantization
    batch_size: int
    grammar: Grammar | CallGrammars | None
    engine: AnswerEngine = EMBEDDED
    rank: int = 1
    """The highest LoRA rank that vLLM starts with."""
    threads: int | None = None
    """Threads of a CPU's computations in a worker; None means that with a GPU they decide nothing."""

    @cached_property
    def key(self) -> str:
        """Digest of everything but the threads."""
        rule = None if self.grammar is None else self.grammar.rule
        decides = [self.base.digest, self.chat.digest, self.dtype, self.quantization, self.batch_size, rule]
        return digest([*decides, self.engine.versions, self.engine.card, self.rank])

    @property
    def rows(self) -> int:
        """Number of rows that decode at once in each worker."""
        return self.batch_size if self.engine.card is None else rows_at_once(self.engine.card)


class EmbeddedAnswers:
    """The embedded loop: a base that is loaded once, and only if needed, with its adapters."""

    def __init__(self, model: AnswerModel, reporter: Reporter) -> None:
        self._of = model
        self._reporter = reporter
        self._model: Any = None
        self._size = BatchSize(model.batch_size)
        self._sizes: dict[int, BatchSize] = {}
        self.adapters: set[str] = set()
        """Names of the adapters on the base."""

    @property
    def rows(self) -> int:
        """Number of rows that decode at once; fewer than at the start if memory ran out."""
        return self._size.rows

    @property
    def loaded(self) -> bool:
        """True if the base is in memory."""
        return self._model is not None

    def model_with(self, adapter: tuple[str, Path] | None = None) -> Any:
        """Return the base with this adapter, given as name and folder, and earlier ones."""
        of = self._of
        if self._model is None:
            base = proved(of.base, self._reporter)
            self._reporter.say(f"Loading {named(of.base, of.quantization)}")
            self._model = load_model(base, of.dtype, of.quantization)
        if adapter is not None and adapter[0] not in self.adapters:
            self._model = with_adapters(self._model, dict([adapter]))
            self.adapters.add(adapter[0])
        return self._model

    def drop(self) -> None:
        """Free the base."""
        if self._model is None:
            return
        self._model = None
        self.adapters.clear()
        # Models hold reference cycles, and torch caches GPU memory.
        clear_device_cache(garbage_collection=True)

    def generate(
        self,
        requests: Sequence[Request],
        on_finished: Callable[[int, Completion], None] = lambda _index, _completion: None,
        *,
        stop_ids: Collection[int],
        adapter: tuple[str, Path] | None = None,
        at_once: int | None = None,
    ) -> list[Completion]:
        """Answer all requests, ``at_once`` or as many as ``rows``; the number is halved when memory runs out."""
        return generate_halving(
            self.model_with(adapter),
            requests,
            self._size if at_once is None else self._sizes.setdefault(at_once, BatchSize(at_once)),
            self._reporter,
            stop_ids=stop_ids,
            pad_id=self._of.chat.tokenizer.pad_token_id,
            decode=self._of.chat.text,
            on_finished=on_finished,
        )


# In a worker

AdapterFiles = Mapping[str, bytes]
"""The files of an adapter that a model is loaded from, for workers that do not see the project's folder."""


@dataclass(frozen=True)
class WorkerModel:
    """The model of a worker, and the adapters by the name that requests give."""

    model: AnswerModel
    adapters: Mapping[str, AdapterFiles] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestBatch:
    """Some requests of an arm, sent without their constraints, which are compiled again in the worker.

    ``functions`` are the functions that each prompt declares (None: the answers are free). ``at_once`` rows
    decode together (None: the model's number). Answers of one ``company`` may share vLLM's prefix cache.
    """

    requests: Sequence[Request]
    functions: Sequence[Message | None] | None = None
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    at_once: int | None = None
    company: str = ""

    @property
    def adapters(self) -> set[str]:
        """The names of the adapters that answer."""
        return {request.adapter for request in self.requests if request.adapter is not None}


def _write(files: AdapterFiles, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


class _Embedded:
    """The embedded loop, with a base in this process."""

    def __init__(self, model: AnswerModel) -> None:
        self.reporter = KeptMessages()
        self.answers = EmbeddedAnswers(replace(model, base=base_here(model.base)), self.reporter)
        self.constraints = AnswerConstraints(model.chat, model.grammar) if model.grammar else None

    def answer(self, batch: RequestBatch, adapters: Mapping[str, AdapterFiles]) -> list[Completion]:
        """Return the completions of a batch."""
        self.answers.model_with()
        for name in batch.adapters - self.answers.adapters:
            with TemporaryDirectory() as folder:
                _write(adapters[name], Path(folder))
                self.answers.model_with((name, Path(folder)))
        requests = batch.requests
        if batch.functions is not None:
            assert self.constraints is not None
            rows = zip(requests, batch.functions, strict=True)
            requests = [replace(request, constraint=self.constraints.of_row(declared)) for request, declared in rows]
        return self.answers.generate(requests, stop_ids=batch.stop_ids, at_once=batch.at_once)

    def end(self) -> None:
        """Free the base."""
        self.answers.drop()


class _Vllm:
    """vLLM in a child process of this one, started by the first batch.

    It reads adapters from a private folder. If this process is killed, the system kills vLLM, and the next vLLM that
    starts on this machine removes the folder.
    """

    def __init__(self, model: AnswerModel) -> None:
        self.reporter = KeptMessages()
        expected = model.engine.environment
        assert expected is not None
        here = vllm_here(expected.build).environment
        require_equal(expected, here)  # the machine may have joined after the check
        self.answers = VllmAnswers(
            base_here(model.base),
            model.dtype,
            here,
            model.batch_size,
            model.rank,
            self.reporter,
            card=model.engine.card,
            threads=model.threads,
        )
        self._chat = model.chat
        self._private = PrivateFolder()

    def answer(self, batch: RequestBatch, adapters: Mapping[str, AdapterFiles]) -> list[Completion]:
        """Return the completions of a batch."""
        assert batch.functions is None, "vLLM does not constrain answers"
        folders = {name: self._private.path / name for name in batch.adapters}
        for name, folder in folders.items():
            if not folder.exists():
                folder.mkdir()
                _write(adapters[name], folder)
        return self.answers.generate(
            batch.requests,
            stop_ids=batch.stop_ids,
            decode=self._chat.text,
            adapters=folders,
            at_once=batch.at_once,
            tenant=batch.company,
        )

    def end(self) -> None:
        """End vLLM, and remove the adapters."""
        self.answers.stop()
        self._private.remove()


_loaded: dict[str, _Embedded | _Vllm] = {}
"""The model of this process by its key, if there is one."""


def answer_batch(of: WorkerModel, batch: RequestBatch) -> tuple[list[Completion], list[str]]:
    """Return the completions of a batch, and the warnings. An empty batch only loads the model."""
    _require_device(of.model.threads)
    try:
        if of.model.key not in _loaded:
            unload()
            _loaded[of.model.key] = (_Embedded if of.model.engine.environment is None else _Vllm)(of.model)
        loaded = _loaded[of.model.key]
        completions = loaded.answer(batch, of.adapters)
    except UserError as error:
        named_error = on_machine(socket.gethostname(), error)
        if isinstance(error, VllmStoppedError):
            raise WorkerFailedError(named_error.what, where=named_error.where, fix=named_error.fix) from None
        raise named_error from None
    messages, loaded.reporter.messages = loaded.reporter.messages, []
    return completions, [text for text, is_warning in messages if is_warning]


def unload() -> None:
    """Free the model of this process and its resources outside of it."""
    for loaded in _loaded.values():
        loaded.end()
    _loaded.clear()


def _require_device(threads: int | None) -> None:
    """Set the number of threads, and check that models are loaded on the device that the journal names."""
    import torch

    wanted, found = "cuda" if threads is None else "cpu", device().split(":")[0]
    if wanted != found:
        what = f"torch on {socket.gethostname()} computes on {found}, and the cluster's workers are on {wanted}"
        fix = "Install torch for its GPUs there, or start Ray there with --num-gpus 0."
        raise UserError(what, where="compute.cluster", fix=fix)
    if threads is not None:
        torch.set_num_threads(threads)


# In the command

# Half of a worker's rows idle until the longest answer of its part has ended: more full batches per
# part waste less time. But with fewer parts, fewer workers share an arm, and a lost worker loses more.
_FULL_BATCHES = range(2, 9)
_PARTS = 16


@dataclass(frozen=True)
class ArmRequests:
    """The requests of an arm."""

    batch: RequestBatch
    on_finished: Callable[[int, Completion], None]
    adapter: Adapter | None = None

    def part(self, places: range) -> RequestBatch:
        """Return some of the requests, as a worker gets them."""
        whole = self.batch
        constrained = any(request.constraint is not None for request in whole.requests)
        functions = [whole.functions[place] for place in places] if constrained and whole.functions else None
        requests = [replace(whole.requests[place], constraint=None) for place in places]
        return replace(whole, requests=requests, functions=functions)


class ClusterAnswers:
    """Requests answered by the workers of a cluster, each with the model in its own memory."""

    def __init__(self, workers: ModelWorkers, model: AnswerModel, reporter: Reporter) -> None:
        self.workers = workers
        self._model = replace(model, threads=workers.threads)
        self._reporter = reporter

    @property
    def rows(self) -> int:
        """Number of rows that decode at once in each worker."""
        return self._model.rows

    def generate(self, arms: Sequence[ArmRequests]) -> list[list[Completion]]:
        """Answer the requests of all arms together, and return each arm's completions in their order."""
        parts = [
            (number, places)
            for number, arm in enumerate(arms)
            for places in _parts(len(arm.batch.requests), arm.batch.at_once or self.rows)
        ]
        batches = [arms[number].part(places) for number, places in parts]
        named_by = {name: arm.adapter.folder for arm in arms if arm.adapter for name in arm.batch.adapters}
        adapters = {
            name: {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}
            for name, folder in named_by.items()
        }
        done: list[dict[int, Completion]] = [{} for _ in arms]
        model = WorkerModel(self._model, adapters)
        for part, (completions, warned) in self.workers.each(answer_batch, model, batches, RequestBatch([])):
            for message in warned:
                self._reporter.warn(message)
            number, places = parts[part]
            for place, completion in zip(places, completions, strict=True):
                done[number][place] = completion
                arms[number].on_finished(place, completion)
        return [[found[place] for place in range(len(found))] for found in done]


def _parts(count: int, rows: int) -> Iterator[range]:
    """Yield ranges that differ in length by one at most, whatever the number of workers."""
    batches = min(max(count // (_PARTS * rows), _FULL_BATCHES[0]), _FULL_BATCHES[-1])
    parts = -(-count // (batches * rows))
    return (range(count * part // parts, count * (part + 1) // parts) for part in range(parts))
