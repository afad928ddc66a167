"""Generated answers, each journalled as soon as it is complete, so that no answer is computed twice."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tunewright.adapters.registry import Adapter
from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_text, stop_strings
from tunewright.chat.call_grammar import CallGrammars
from tunewright.config import Quantization
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.core.workers import ModelWorkers
from tunewright.data.examples import Message
from tunewright.engines.choice import EMBEDDED, AnswerEngine, answer_engine
from tunewright.engines.vllm.answers import VllmAnswers
from tunewright.evaluation.answer_constraints import AnswerConstraints, grammar_of
from tunewright.evaluation.answer_worker import (
    AnswerModel,
    ArmRequests,
    ClusterAnswers,
    EmbeddedAnswers,
    RequestBatch,
)
from tunewright.evaluation.speeds import Speeds
from tunewright.evaluation.time_limit import AnswerRate
from tunewright.evidence.common import EngineUsed
from tunewright.generation.constraints import Grammar
from tunewright.generation.requests import Completion, Request
from tunewright.model_io.replies import Journal
from tunewright.models.bases import Base
from tunewright.models.loading import device
from tunewright.training.self_samples import BATCH

# Reading a package's metadata takes a millisecond, and every batch of answers names its packages.
_version = cache(version)
_PACKAGES = ("torch", "transformers", "tokenizers", "peft")

Prompt = tuple[int, ...]

ENGINE = "decoding-2"
"""Part of every key with peft: increment it when a change to the decoding loop changes answers."""
VLLM = "vllm-1"
"""Part of every key with vLLM: increment it when a change to the vLLM requests changes answers."""


@dataclass(frozen=True)
class ArmAnswer:
    """The text of an answer. The token ids are in the decoding loop's `Completion`, not in the journal."""

    text: str
    truncated: bool
    """The answer reached the token limit."""
    prompt: Prompt
    tokens: int
    """Token count of the answer, including its end token, which a truncated answer lacks."""


@dataclass(frozen=True)
class Decoding:
    """Everything that decides an answer apart from its prompt.

    The batch size is left out. Resumed runs batch rows differently anyway, and that changes an answer only where two
    tokens nearly tie.
    """

    base: str
    template: str
    adapter: str | None
    """Digests of each."""
    dtype: str
    quantization: Quantization
    device: str
    """cpu or cuda: their kernels add in different orders."""
    max_new_tokens: int
    stop: tuple[str, ...]
    grammar: str | None
    packages: Mapping[str, str]
    """Versions of the libraries that produce logits and text."""
    engine: str = ENGINE
    """The engine that computes, and its settings."""

    @property
    def key(self) -> str:
        """SHA-256 over all fields."""
        return digest(asdict(self))


class KeptAnswer(NamedTuple):
    """An answer in the journal."""

    text: str
    """The text without thinking."""
    truncated: bool
    thinking: int = 0
    """Tokens besides those of the text: thinking and its marks."""


def answer_journal(folder: Path, decoding: Decoding) -> Journal[KeptAnswer]:
    """Return the journal of answers decoded in this way, by the digest of the prompt."""

    def row(prompt: str, answer: KeptAnswer) -> dict[str, Any]:
        thinking = {"thinking": answer.thinking} if answer.thinking else {}
        return {"prompt": prompt, "text": answer.text, "truncated": answer.truncated, **thinking}

    return Journal(
        folder / f"{decoding.key[:16]}.jsonl",
        lambda row: (row["prompt"], KeptAnswer(row["text"], row["truncated"], row.get("thinking", 0))),
        row,
    )


@dataclass(frozen=True)
class ArmPrompts:
    """The prompts of an arm, which may repeat, and how they are answered."""

    title: str
    prompts: Sequence[Prompt]
    adapter: Adapter | None = None
    constrained: bool = False
    """Answers match the grammar."""


class Generator:
    """Greedy generation with the base, adapter off or on; the base is loaded once, and only if needed.

    With the vllm engine a separate process answers, and on a cluster its workers do. Then the base is loaded here only
    for logits (losses). The two never hold the base at the same time: each frees the other's memory first.
    """

    @classmethod
    def of(
        cls,
        project: ProjectFolder,
        base: Base,
        chat: ChatFormat,
        quantization: Quantization,
        reporter: Reporter,
        adapter: Adapter | None = None,
        workers: ModelWorkers | None = None,
    ) -> Generator:
        """Return a generator that follows the project's config; ``adapter`` will answer, if it is trained already."""
        config = project.config
        constrained = config.evaluate.structured_outputs is not None
        folder = None if adapter is None else adapter.folder
        engine = answer_engine(
            config, quantization, adapter=folder, constrained=constrained, workers=workers, start_on=(base, reporter)
        )
        return cls(
            base,
            chat,
            config.train.dtype,
            quantization,
            config.evaluate.batch_size,
            project.work,
            reporter,
            stop=stop_strings(config, chat),
            grammar=grammar_of(project),
            engine=engine,
            rank=config.train.lora_r,
            workers=workers,
        )

    def __init__(
        self,
        base: Base,
        chat: ChatFormat,
        dtype: str,
        quantization: Quantization,
        batch_size: int,
        work: Path,
        reporter: Reporter,
        *,
        stop: tuple[str, ...] = (),
        grammar: Grammar | CallGrammars | None = None,
        engine: AnswerEngine = EMBEDDED,
        rank: int = 1,
        workers: ModelWorkers | None = None,
    ) -> None:
        self.base = base
        self.chat = chat
        self.dtype = dtype
        self.quantization = quantization
        self.folder = work / "generations"
        self.reporter = reporter
        self.stop = stop
        self.grammar = grammar
        self.engine = engine
        self._functions: dict[Prompt, Message] = {}
        model = AnswerModel(base, chat, dtype, quantization, batch_size, grammar, engine, rank)
        self._embedded = EmbeddedAnswers(model, reporter)
        self.workers = workers
        self._cluster = None if workers is None else ClusterAnswers(workers, model, reporter)
        self._vllm: VllmAnswers | None = None
        if engine.environment is not None and workers is None:
            self._vllm = VllmAnswers(base, dtype, engine.environment, batch_size, rank, reporter)
        # Weak, as a generator without references must free its model immediately, and not in a later collection.
        weak = weakref.proxy(self)
        # Arms that a cluster answers at the same time do not say how long one takes.
        self.rate = AnswerRate(reporter, None if workers else lambda *timed: weak.speeds.add_answers(*timed))
        self._announced = False

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """Return the ids of a prompt; if it declares functions, calls in its answers are read."""
        ids = self.chat.prompt(messages)
        if messages[0].role == "tools":
            self._functions[ids] = messages[0]
        return ids

    def text(self, prompt: Prompt, completion: Completion) -> str:
        """Return the text of a prompt's answer; calls have their canonical text."""
        return answer_text(self.chat, completion, [self._functions[prompt]] if prompt in self._functions else ())

    @property
    def rows(self) -> int:
        """Number of rows that decode at once, in each worker of a cluster."""
        return (self._cluster or self._vllm or self._embedded).rows

    @cached_property
    def speeds(self) -> Speeds:
        """The times of earlier answers here."""
        return Speeds(self.folder.parent, {"base": self.base.digest, **self.inputs, "device": self._where})

    @cached_property
    def constraints(self) -> AnswerConstraints | None:
        """The constraints that constrained answers have to match."""
        return AnswerConstraints(self.chat, self.grammar) if self.grammar else None

    def answer(
        self,
        title: str,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        adapter: Adapter | None = None,
        *,
        constrained: bool = False,
    ) -> list[ArmAnswer]:
        """Return the answers in the prompts' order, constrained by the grammar or free."""
        (answers,) = self.answer_arms([ArmPrompts(title, prompts, adapter, constrained)], max_new_tokens)
        return answers

    def answer_arms(self, arms: Sequence[ArmPrompts], max_new_tokens: int) -> list[list[ArmAnswer]]:
        """Return each arm's answers in its prompts' order: one arm after the other, on a cluster all together."""
        for together in [[arm] for arm in arms] if self._cluster is None else [arms]:
            self._answer_missing(together, max_new_tokens)
        return [self._answers(arm, max_new_tokens) for arm in arms]

    def _answer_missing(self, arms: Sequence[ArmPrompts], max_new_tokens: int) -> None:
        """Compute the missing answers of these arms together, and write them to the journals."""
        claimed: set[tuple[Path | None, str]] = set()
        with ExitStack() as stack:
            asked: list[ArmRequests] = []
            for arm in arms:
                journal = self._journal(max_new_tokens, arm.adapter, constrained=arm.constrained)
                wanted = journal.missing({digest(prompt): prompt for prompt in arm.prompts})
                # An arm with the same prompts finds these answers in the journal.
                missing = sorted(prompt for key, prompt in wanted.items() if (journal.path, key) not in claimed)
                self.rate.advance(len(arm.prompts) - len(missing), kept=True)
                if not missing:
                    continue
                claimed |= {(journal.path, key) for key in wanted}
                advance = stack.enter_context(self.rate.arm(arm.title, len(missing)))
                requests = self.requests(missing, max_new_tokens, arm.adapter, constrained=arm.constrained)
                keep = self._keeping(requests, stack.enter_context(journal.keeping()), advance)
                asked.append(ArmRequests(RequestBatch(requests, stop_ids=self.chat.stop_ids), keep, arm.adapter))
            if self._cluster is None:
                for each in asked:
                    self.generate(each.batch.requests, each.on_finished, adapter=each.adapter)
            elif asked:
                self._by_workers(asked)

    def kept(self, max_new_tokens: int, adapter: Adapter | None = None, *, constrained: bool = False) -> frozenset[str]:
        """Return the digests of the prompts that already have an answer in the journal."""
        return frozenset(self._journal(max_new_tokens, adapter, constrained=constrained).answers)

    def _answers(self, arm: ArmPrompts, max_new_tokens: int) -> list[ArmAnswer]:
        """Return an arm's answers from the journal, with token counts from the text, since it keeps no token ids.

        Tokens of thinking are counted too.
        """
        journal = self._journal(max_new_tokens, arm.adapter, constrained=arm.constrained)
        known, keys = journal.answers, [digest(prompt) for prompt in arm.prompts]
        if lost := sum(key not in known for key in keys):
            what = f"The journal has lost {count_of(lost, 'answer')} that this command had stored in it"
            raise UserError(what, where=str(journal.path), fix="Do not remove files meanwhile, and run it again.")
        found = [known[key] for key in keys]
        counts = self._text_tokens([answer.text for answer in found])
        return [
            ArmAnswer(answer.text, answer.truncated, prompt, answer.thinking + count + (not answer.truncated))
            for answer, prompt, count in zip(found, arm.prompts, counts, strict=True)
        ]

    def _text_tokens(self, texts: Sequence[str]) -> list[int]:
        encoded = self.chat.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return list(map(len, encoded))

    def _journal(self, max_new_tokens: int, adapter: Adapter | None, *, constrained: bool) -> Journal[KeptAnswer]:
        return answer_journal(self.folder, self.decoding(max_new_tokens, adapter, constrained=constrained))

    def _keeping(
        self, requests: Sequence[Request], keep: Callable[[str, KeptAnswer], None], advance: Callable[[], None]
    ) -> Callable[[int, Completion], None]:
        """Return a function that keeps a request's answer."""

        def keep_completion(index: int, completion: Completion) -> None:
            prompt = requests[index].prompt_ids
            text, thinking = self.text(prompt, completion), 0
            if self.chat.thinking is not None:
                thinking = max(0, len(completion.ids) - self._text_tokens([text])[0])
            keep(digest(prompt), KeptAnswer(text, completion.finish == "length", thinking))
            advance()

        return keep_completion

    def requests(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        adapter: Adapter | None = None,
        *,
        constrained: bool = False,
    ) -> list[Request]:
        """Return the decoding requests for the prompts."""
        name = None if adapter is None else self._name(adapter)
        free = [Request(p, name, max_new_tokens, stop=self.stop) for p in prompts]
        if not constrained:
            return free
        assert self.constraints is not None
        return [replace(r, constraint=self.constraints.of_row(self._functions.get(r.prompt_ids))) for r in free]

    def generate(
        self,
        requests: Sequence[Request],
        on_finished: Callable[[int, Completion], None] = lambda _index, _completion: None,
        *,
        adapter: Adapter | None = None,
        stop_ids: frozenset[int] | None = None,
        at_once: int | None = None,
        company: str = "",
    ) -> list[Completion]:
        """Generate answers, even if the journal has them.

        Args:
            requests: from :meth:`requests`; ``adapter`` is the adapter that they name.
            on_finished: called with a request's index and its completion, in any order, on a single thread.
            stop_ids: tokens that end an answer (None: the chat format's).
            at_once: number of rows that decode together (None: the engine's maximum).
            company: answers of one company may share the engine's prefix cache.
        """
        ends = self.chat.stop_ids if stop_ids is None else stop_ids
        if self._cluster is not None:
            batch = RequestBatch(requests, stop_ids=ends, at_once=at_once, company=company)
            return self._by_workers([ArmRequests(batch, on_finished, adapter)])[0]
        self._announce()
        if self._vllm is not None:
            self._embedded.drop()
            return self._vllm.generate(
                requests,
                stop_ids=ends,
                decode=self.chat.text,
                adapters={} if adapter is None else {self._name(adapter): adapter.folder},
                at_once=at_once,
                tenant=company,
                on_finished=on_finished,
            )
        named = None if adapter is None else (adapter.name, adapter.folder)
        return self._embedded.generate(requests, on_finished, stop_ids=ends, adapter=named, at_once=at_once)

    def _by_workers(self, arms: Sequence[ArmRequests]) -> list[list[Completion]]:
        assert self._cluster is not None
        self._announce()
        self._embedded.drop()
        declared = [[self._functions.get(request.prompt_ids) for request in arm.batch.requests] for arm in arms]
        batches = [replace(arm.batch, functions=each) for arm, each in zip(arms, declared, strict=True)]
        return self._cluster.generate([replace(arm, batch=of) for arm, of in zip(arms, batches, strict=True)])

    def write(
        self, requests: Sequence[Request], ends: frozenset[int], on_finished: Callable[[int, Completion], None]
    ) -> list[Completion]:
        """Complete requests of :class:`Sampler`; with peft, in batches of the size in the samples' key."""
        at_once = BATCH if self.engine.environment is None else None
        return self.generate(requests, on_finished, stop_ids=ends, at_once=at_once)

    def _name(self, adapter: Adapter) -> str:
        """Return the adapter's name in the engine."""
        return adapter.name if self.engine.environment is None else adapter.digest

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            self.reporter.say(f"Answers are computed by {self.engine.name}: {self.engine.why}.")

    def model_with(self, adapter: Adapter | None = None) -> Any:
        """Return the base in this process with this adapter and earlier ones; vLLM and workers are stopped first."""
        if not self._embedded.loaded:
            if self._vllm is not None:
                self._vllm.stop()
            if self.workers is not None:
                self.workers.stop()
        return self._embedded.model_with(None if adapter is None else (adapter.name, adapter.folder))

    @property
    def _where(self) -> str:
        """The kind of device that answers, or vLLM's build."""
        if self.engine.environment is not None:
            return self.engine.environment.build
        return device().split(":")[0] if self.workers is None else self.workers.device

    @property
    def used(self) -> EngineUsed:
        """The evidence's entry for the engine."""
        numbers = self.engine.versions
        if self.engine.environment is None:
            numbers = {name: _version(name) for name in ("peft", "torch", "transformers")}
        return EngineUsed(
            name=self.engine.name,
            version=numbers[self.engine.name],
            packages=numbers,
            device=self._where,
            dtype=self.dtype,
            rows=self.rows,
            why=self.engine.why,
        )

    @property
    def inputs(self) -> dict[str, Any]:
        """Everything that decides samples drawn from the base: its loaded weights and the engine."""
        return {**self.weights, **self.engine.identity}

    @property
    def weights(self) -> dict[str, Any]:
        """Everything that decides the base's predictions apart from its files."""
        return {"dtype": self.dtype, "quantization": self.quantization}

    @contextmanager
    def answering(self, adapter: Adapter | None) -> Iterator[Any]:
        """Provide the model with this adapter, or the base alone, active for every forward pass."""
        model = self.model_with(adapter)
        if adapter is not None:
            model.set_adapter(adapter.name)
            yield model
        elif self._embedded.adapters:
            with model.disable_adapter():
                yield model
        else:
            yield model

    def decoding(self, max_new_tokens: int, adapter: Adapter | None, *, constrained: bool = False) -> Decoding:
        """Return everything that decides these answers; its key names their journal."""
        if self.engine.environment is None:
            names = [*_PACKAGES, *(["bitsandbytes"] if self.quantization == "nf4" else [])]
            if constrained:
                names.append("llguidance")
            engine, packages = ENGINE, {name: _version(name) for name in names}
        else:
            # Tokens become text here, with either engine.
            text = {name: _version(name) for name in ("transformers", "tokenizers")}
            engine, packages = VLLM, {**text, **self.engine.versions}
        return Decoding(
            base=self.base.digest,
            template=self.chat.digest,
            adapter=adapter.digest if adapter else None,
            dtype=self.dtype,
            quantization=self.quantization,
            device=self._where,
            max_new_tokens=max_new_tokens,
            stop=self.stop,
            grammar=self.grammar.rule if self.grammar and constrained else None,
            packages=packages,
            engine=engine,
        )
