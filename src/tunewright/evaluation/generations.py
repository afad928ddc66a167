"""Generated answers, each journalled as soon as it is there, so that no answer is ever computed twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from tunewright.adapters.registry import Adapter
from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_text, constraint_on, stop_strings
from tunewright.disk import digest, writing
from tunewright.models.bases import Base
from tunewright.models.constraints import Constraint, Grammar
from tunewright.models.decoding import Completion, Request, generate
from tunewright.models.loading import device, load_model, named, with_adapters
from tunewright.progress import Reporter
from tunewright.project import Project
from tunewright.recipe import Quantize

_ENGINE = "decoding-2"
"""Part of every key: to be counted up when a change of the decoding loop changes answers."""

_PACKAGES = ("torch", "transformers", "tokenizers", "peft")

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """One answer."""

    text: str
    truncated: bool
    """It ran into the token limit."""


@dataclass(frozen=True)
class Decoding:
    """All that decides an answer beside its prompt.

    Not the batch size: which rows share a batch differs from run to run anyway, as stopped ones go on, and moves an
    answer only where two tokens all but tie.
    """

    base: str
    template: str
    adapter: str | None
    """Digests of each."""
    dtype: str
    quantize: Quantize
    device: str
    """cpu or cuda: their kernels add up in different orders."""
    max_new_tokens: int
    stop: tuple[str, ...]
    grammar: str | None
    packages: Mapping[str, str]
    """Versions of those that make logits and text."""
    engine: str = _ENGINE

    @property
    def key(self) -> str:
        """SHA-256 over all of it."""
        return digest(asdict(self))


class Generator:
    """Answers prompts greedily with the base, adapter off or on; the base is loaded once, and only if needed.

    Args:
        base, dtype, quantize: the model, and how it is held.
        chat: the format of prompts and answers.
        batch_size: rows that decode at once.
        work: the project's working folder, which has the journals.
        reporter: shows progress.
        stop: texts that end an answer.
        grammar: what constrained answers have to be.

    Raises:
        UserError: the grammar cannot be used with this base's tokenizer.
    """

    @classmethod
    def of(cls, project: Project, base: Base, chat: ChatFormat, quantize: Quantize, reporter: Reporter) -> Generator:
        """Answers as the project's recipe says."""
        recipe = project.recipe
        return cls(
            base,
            chat,
            recipe.train.dtype,
            quantize,
            recipe.evaluate.batch_size,
            project.work,
            reporter,
            stop=stop_strings(recipe, chat),
            grammar=grammar_of(project),
        )

    def __init__(
        self,
        base: Base,
        chat: ChatFormat,
        dtype: str,
        quantize: Quantize,
        batch_size: int,
        work: Path,
        reporter: Reporter,
        *,
        stop: tuple[str, ...] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self.base = base
        self.chat = chat
        self.dtype = dtype
        self.quantize = quantize
        self.batch_size = batch_size
        self.folder = work / "generations"
        self.reporter = reporter
        self.stop = stop
        self.grammar = grammar
        self._model: Any = None
        self._loaded: set[str] = set()

    @cached_property
    def constraint(self) -> Constraint | None:
        """What constrained answers have to match.

        Raises:
            UserError: the grammar engine does not take it.
        """
        return constraint_on(self.chat, self.grammar) if self.grammar else None

    def answer(
        self,
        title: str,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        adapter: Adapter | None = None,
        *,
        constrained: bool = False,
    ) -> list[Generation]:
        """Answers in the prompts' order, held to the grammar or free."""
        journal = self.folder / f"{self.decoding(max_new_tokens, adapter, constrained=constrained).key[:16]}.jsonl"
        known = dict(_read(journal))
        missing = sorted({p for p in prompts if digest(p) not in known})
        if missing:
            with (
                writing(journal),
                _appending(journal) as file,
                self.reporter.task(title, len(missing), "answers") as task,
            ):
                model = self.model_with(adapter)

                def keep(index: int, completion: Completion) -> None:
                    key = digest(missing[index])
                    known[key] = Generation(answer_text(self.chat, completion), completion.finish == "length")
                    file.write(json.dumps({"prompt": key, **asdict(known[key])}, ensure_ascii=False) + "\n")
                    file.flush()
                    task.advance()

                requests = self.requests(missing, max_new_tokens, adapter, constrained=constrained)
                self.generate(model, requests, keep, self.batch_size)
        return [known[digest(p)] for p in prompts]

    def requests(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        adapter: Adapter | None = None,
        *,
        constrained: bool = False,
    ) -> list[Request]:
        """What the decoding loop is asked for each prompt."""
        assert self.grammar or not constrained
        name = adapter.name if adapter else None
        held_to = self.constraint if constrained else None
        return [Request(p, name, max_new_tokens, stop=self.stop, constraint=held_to) for p in prompts]

    def generate(
        self, model: Any, requests: Sequence[Request], on_finished: Callable[[int, Completion], None], batch_size: int
    ) -> list[Completion]:
        """Answer anew, whatever the journal has."""
        return generate(
            model,
            requests,
            stop_ids=self.chat.stop_ids,
            pad_id=self.chat.tokenizer.pad_token_id,
            batch_size=batch_size,
            decode=self.chat.text,
            on_finished=on_finished,
        )

    def model_with(self, adapter: Adapter | None = None) -> Any:
        """The base, with this adapter beside those that were asked for before."""
        if self._model is None:
            self.reporter.say(f"Loading {named(self.base, self.quantize)}")
            self._model = load_model(self.base, self.dtype, self.quantize)
        if adapter is not None and adapter.name not in self._loaded:
            self._model = with_adapters(self._model, {adapter.name: adapter.folder})
            self._loaded.add(adapter.name)
        return self._model

    @property
    def weights(self) -> dict[str, Any]:
        """What decides the base's predictions beside its files."""
        return {"dtype": self.dtype, "quantize": self.quantize}

    @contextmanager
    def answering(self, adapter: Adapter | None) -> Iterator[Any]:
        """The model while this adapter, or the base alone, answers every pass over it."""
        model = self.model_with(adapter)
        if adapter is not None:
            model.set_adapter(adapter.name)
            yield model
        elif self._loaded:
            with model.disable_adapter():
                yield model
        else:
            yield model

    def decoding(self, max_new_tokens: int, adapter: Adapter | None, *, constrained: bool = False) -> Decoding:
        """What decides these answers; its key names their journal."""
        names = [*_PACKAGES, *(["bitsandbytes"] if self.quantize == "nf4" else [])]
        if constrained:
            names.append("llguidance")
        return Decoding(
            base=self.base.digest,
            template=self.chat.digest,
            adapter=adapter.digest if adapter else None,
            dtype=self.dtype,
            quantize=self.quantize,
            device=device().split(":")[0],
            max_new_tokens=max_new_tokens,
            stop=self.stop,
            grammar=self.grammar.rule if self.grammar and constrained else None,
            packages={name: version(name) for name in names},
        )


def grammar_of(project: Project) -> Grammar | None:
    """What the project's constrained answers have to be.

    Raises:
        UserError: the recipe names a schema that cannot be read.
    """
    constrain = project.recipe.evaluate.constrain
    return Grammar.of(constrain, project.root) if constrain else None


def _read(journal: Path) -> Iterator[tuple[str, Generation]]:
    if not journal.exists():
        return
    for line in journal.read_text(encoding="utf-8").split("\n"):
        try:
            row: Mapping[str, Any] = json.loads(line)
            yield row["prompt"], Generation(row["text"], row["truncated"])
        except json.JSONDecodeError:
            # The last line of a run that was killed while writing it: that answer is made again.
            continue


@contextmanager
def _appending(journal: Path) -> Iterator[TextIO]:
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:
        # Ends a half-written line, if there is one.
        file.write("\n")
        yield file
