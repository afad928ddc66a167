"""Generated answers, each journalled as soon as it is complete, so that no answer is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import Adapter
from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_text, stop_strings
from tunewright.chat.call_grammar import CallGrammars
from tunewright.config import Quantization
from tunewright.config.project import ProjectFolder
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.core.workers import ModelWorkers
from tunewright.data.examples import Message
from tunewright.engines.choice import EMBEDDED, AnswerEngine, answer_engine
from tunewright.engines.vllm.answers import VllmAnswers
from tunewright.evaluation.answer_constraints import AnswerConstraints, grammar_of
from tunewright.evaluation.answer_journal import ENGINE, VLLM, Answer, Decoding, answer_journal
from tunewright.evaluation.answer_worker import ArmRequests, ClusterAnswers, WorkerModel
from tunewright.evaluation.countdown import Countdown, tokens_each
from tunewright.evaluation.embedded_answers import EmbeddedAnswers
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


@dataclass(frozen=True)
class ArmPrompts:
    """The prompts of an arm.

    Args:
        title: of its progress display.
        prompts: they may repeat.
        adapter: the adapter that answers; None: the base.
        constrained: answers match the grammar.
    """

    title: str
    prompts: Sequence[Prompt]
    adapter: Adapter | None = None
    constrained: bool = False


class Generator:
    """Greedy generation with the base, adapter off or on; the base is loaded once, and only if needed.

    With the vllm engine a separate process answers, and on a cluster its workers do. Then the base is loaded here only
    for logits (losses). The two never hold the base at the same time: each frees the other's memory first.

    Args:
        base, dtype, quantization: the model, its precision and its quantization.
        chat: the format of prompts and answers.
        batch_size: number of rows that decode at once.
        work: the project's working folder, which holds the journals.
        reporter: shows progress.
        stop: texts that end an answer.
        grammar: the grammar of constrained answers.
        engine: the engine that computes the answers.
        rank: the highest LoRA rank that vLLM starts with, unless an adapter has a higher one.
        workers: a cluster's, which answer (None: this machine).
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
        """Return a generator that follows the project's config.

        Args:
            adapter: the adapter that will answer; None if it is not trained yet.
            workers: a cluster's, which answer.

        Raises:
            UserError: ``evaluate.engine`` is vLLM, and it is not installed or cannot answer this.
        """
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
        self.countdown = Countdown(reporter)
        self.stop = stop
        self.grammar = grammar
        self.engine = engine
        self._functions: dict[Prompt, Message] = {}
        self._embedded = EmbeddedAnswers(base, chat, dtype, quantization, batch_size, reporter)
        self.workers = workers
        self._cluster: ClusterAnswers | None = None
        if workers is not None:
            model = WorkerModel(
                base, chat, dtype, quantization, batch_size, grammar, workers.threads, engine=engine, rank=rank
            )
            self._cluster = ClusterAnswers(workers, model, reporter)
        self._vllm: VllmAnswers | None = None
        if engine.environment is not None and workers is None:
            self._vllm = VllmAnswers(base, dtype, engine.environment, batch_size, rank, reporter)
        self._announced = False

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """Return the ids of a prompt; if it declares functions, calls in its answers are read.

        Raises:
            UserError: the template refuses this conversation.
        """
        ids = self.chat.prompt(messages)
        if messages[0].role == "tools":
            self._functions[ids] = messages[0]
        return ids

    def text(self, prompt: Prompt, completion: Completion) -> str:
        """Return the text of a prompt's answer; calls have their canonical text."""
        functions = self._functions.get(prompt)
        return answer_text(self.chat, completion, () if functions is None else [functions])

    @property
    def rows(self) -> int:
        """Number of rows that decode at once, in each worker of a cluster."""
        if self._cluster is not None:
            return self._cluster.rows
        return self._embedded.rows if self._vllm is None else self._vllm.rows

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
    ) -> list[Answer]:
        """Return the answers in the prompts' order, constrained by the grammar or free."""
        journal = self._journal(max_new_tokens, adapter, constrained=constrained)
        missing = sorted(journal.missing({digest(prompt): prompt for prompt in prompts}).values())
        if missing:
            with (
                self.countdown.arm(title, len(missing), tokens_each(missing, max_new_tokens)) as task,
                journal.keeping() as keep,
            ):
                requests = self.requests(missing, max_new_tokens, adapter, constrained=constrained)
                self.generate(requests, self._keeping(requests, keep, task.advance), adapter=adapter)
        return self._as_answers(prompts, journal.answers)

    def answer_arms(self, arms: Sequence[ArmPrompts], max_new_tokens: int) -> list[list[Answer]]:
        """Return each arm's answers in its prompts' order: one arm after the other, on a cluster all at once."""
        if self._cluster is not None:
            self._answer_together(arms, max_new_tokens)
        return [
            self.answer(arm.title, arm.prompts, max_new_tokens, arm.adapter, constrained=arm.constrained)
            for arm in arms
        ]

    def _answer_together(self, arms: Sequence[ArmPrompts], max_new_tokens: int) -> None:
        """Have the workers of a cluster compute the missing answers of several arms at once, into the journals."""
        claimed: set[tuple[Path, str]] = set()
        with ExitStack() as stack:
            asked = []
            for arm in arms:
                journal = self._journal(max_new_tokens, arm.adapter, constrained=arm.constrained)
                wanted = journal.missing({digest(prompt): prompt for prompt in arm.prompts})
                # An arm with the same prompts finds these answers in the journal.
                missing = sorted(prompt for key, prompt in wanted.items() if (journal.path, key) not in claimed)
                if not missing:
                    continue
                claimed |= {(journal.path, key) for key in wanted}
                tokens = tokens_each(missing, max_new_tokens)
                task = stack.enter_context(self.countdown.arm(arm.title, len(missing), tokens))
                requests = self.requests(missing, max_new_tokens, arm.adapter, constrained=arm.constrained)
                keep = self._keeping(requests, stack.enter_context(journal.keeping()), task.advance)
                asked.append(self._of_arm(requests, keep, self.chat.stop_ids, arm.adapter, None))
            if asked:
                self._by_workers(asked)

    def kept(self, max_new_tokens: int, adapter: Adapter | None = None, *, constrained: bool = False) -> frozenset[str]:
        """Return the digests of the prompts that already have an answer in the journal."""
        return frozenset(self._journal(max_new_tokens, adapter, constrained=constrained).answers)

    def _as_answers(self, prompts: Sequence[Prompt], known: Mapping[str, tuple[str, bool]]) -> list[Answer]:
        """Return the prompts' answers, with token counts from the text, since the journal keeps no token ids."""
        found = [known[digest(prompt)] for prompt in prompts]
        texts = [text for text, _ in found]
        counts = self.chat.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return [
            Answer(text, truncated, prompt, len(ids) + (not truncated))
            for (text, truncated), prompt, ids in zip(found, prompts, counts, strict=True)
        ]

    def _journal(self, max_new_tokens: int, adapter: Adapter | None, *, constrained: bool) -> Journal[tuple[str, bool]]:
        return answer_journal(self.folder, self.decoding(max_new_tokens, adapter, constrained=constrained))

    def _keeping(
        self, requests: Sequence[Request], keep: Callable[[str, tuple[str, bool]], None], advance: Callable[[], None]
    ) -> Callable[[int, Completion], None]:
        """Return a function that keeps a request's answer."""

        def keep_completion(index: int, completion: Completion) -> None:
            prompt = requests[index].prompt_ids
            keep(digest(prompt), (self.text(prompt, completion), completion.finish == "length"))
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
        """Return the decoding requests for the prompts.

        Raises:
            UserError: the grammar cannot be used.
        """
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
            requests: requests from :meth:`requests`.
            on_finished: called with a request's index and its completion, in any order, on a single thread.
            adapter: the adapter that the requests name.
            stop_ids: tokens that end an answer (None: the chat format's).
            at_once: number of rows that decode together (None: the engine's maximum).
            company: answers of one company may share the engine's prefix cache.

        Raises:
            UserError: vLLM does not start, dies, or cannot answer one of them; or the cluster cannot.
        """
        ends = self.chat.stop_ids if stop_ids is None else stop_ids
        if self._cluster is not None:
            return self._by_workers([self._of_arm(requests, on_finished, ends, adapter, at_once, company)])[0]
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
        return self._embedded.generate(requests, on_finished, stop_ids=ends, adapter=_named(adapter), at_once=at_once)

    def _of_arm(
        self,
        requests: Sequence[Request],
        on_finished: Callable[[int, Completion], None],
        ends: frozenset[int],
        adapter: Adapter | None,
        at_once: int | None,
        company: str = "",
    ) -> ArmRequests:
        functions = [self._functions.get(request.prompt_ids) for request in requests]
        return ArmRequests(requests, functions, on_finished, ends, adapter, at_once, company)

    def _by_workers(self, arms: Sequence[ArmRequests]) -> list[list[Completion]]:
        assert self._cluster is not None
        self._announce()
        self._embedded.drop()
        return self._cluster.generate(arms)

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
        return self._embedded.model_with(_named(adapter))

    @property
    def _where(self) -> str:
        """The kind of device that answers, or vLLM's build."""
        if self.engine.environment is not None:
            return self.engine.environment.build
        return device().split(":")[0] if self.workers is None else self.workers.device

    @property
    def used(self) -> EngineUsed:
        """The evidence's entry for the engine."""
        environment = self.engine.environment
        if environment is None:
            numbers = {name: _version(name) for name in ("peft", "torch", "transformers")}
        else:
            numbers = self.engine.versions
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


def _named(adapter: Adapter | None) -> tuple[str, Path] | None:
    return None if adapter is None else (adapter.name, adapter.folder)
