"""The teacher: a model behind an endpoint, or a local base, whose samples are kept as soon as they are complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunewright.chat.answers import answer_message
from tunewright.config import DataConfig, GenerateConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.log import journal, keep, read_journal
from tunewright.core.progress import Reporter
from tunewright.data.examples import Message
from tunewright.data.readers.generated_rows import unmapped
from tunewright.data.readers.row_errors import CODES, RowError
from tunewright.data.readers.schemas import parse_conversation
from tunewright.data.readers.validate import example_from_turns
from tunewright.endpoints.budget import Budget
from tunewright.endpoints.client import Endpoint
from tunewright.endpoints.replies import ChatRequest, Reply, cost, estimated_tokens

if TYPE_CHECKING:
    from tunewright.evaluation.generations import Generator
    from tunewright.generation.requests import Completion

Prompt = tuple[Message, ...]

CUT_OFF = "cut off at the token limit"
EMPTY = "empty answer"

_PARAMETERS = ("temperature", "top_p", "max_tokens")
_LONGEST = 512  # tokens, where the parameters set no limit


@dataclass(frozen=True)
class Sample:
    """One sampled answer, or the reason why it cannot be used."""

    message: Message | None
    unusable: str | None
    model: str
    """The teacher's version."""
    when: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class Usage:
    """Calls and tokens of a run; ``cost`` is None without prices, and 0 for a local teacher."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


@dataclass(frozen=True)
class Calls:
    """The calls of a run before it is started; tokens are guessed from characters (4 each).

    ``known`` calls have a kept answer. The other numbers are of the calls still to make; None: no limit on replies, or
    no prices.
    """

    calls: int
    known: int
    prompt_tokens: int
    most_completion_tokens: int | None
    most_cost: float | None


def with_instruction(prompt: Prompt, instruction: str | None) -> Prompt:
    """Return the prompt with an instruction for the teacher alone at the end of its system turn."""
    if instruction is None:
        return prompt
    head = 1 if prompt[0].role == "tools" else 0
    if prompt[head].role == "system":
        system = replace(prompt[head], content=f"{prompt[head].content}\n\n{instruction}")
        return (*prompt[:head], system, *prompt[head + 1 :])
    return (*prompt[:head], Message("system", instruction), *prompt[head:])


def _sent(prompt: Prompt) -> list[dict[str, Any]]:
    """Return the turns as an endpoint takes them."""
    return [{**replace(m, weight=1).as_dict()} for m in prompt if m.role != "tools"]


class _Reader:
    """Reads a model's turn as a row's last turn, with the checks of rows."""

    def __init__(self, data: DataConfig) -> None:
        # The prompt has its system turn already, or goes without one.
        self._data = unmapped(data).model_copy(update={"system_prompt": None, "drop_columns": ()})

    def message(self, prompt: Prompt, turn: Mapping[str, Any]) -> tuple[Message | None, str | None]:
        """Return the turn, or the reason why it cannot be used."""
        if not str(turn.get("content") or "").strip() and not turn.get("tool_calls"):
            return None, EMPTY
        row: dict[str, Any] = {"messages": [*_sent(prompt), turn]}
        if prompt[0].role == "tools":
            row["tools"] = json.loads(prompt[0].content)
        try:
            conversation = parse_conversation(row, self._data)
            return example_from_turns(conversation.turns, self._data, conversation.tools).messages[-1], None
        except RowError as error:
            return None, f"invalid answer: {CODES[error.code][0]} ({error.code})"


class EndpointTeacher:
    """A model behind an endpoint.

    Args:
        project: its config's generate section names the endpoint.
        schema: the JSON schema of answers, to send as ``response_format``.
        reporter: shows the progress.

    Raises:
        UserError: the section names no model.
    """

    def __init__(self, project: ProjectFolder, schema: Mapping[str, Any] | None, reporter: Reporter) -> None:
        self.config = project.config.generate
        if self.config.model is None:
            raise UserError(
                "The teacher has no model", where="generate.model", fix="Name the model at generate.base_url."
            )
        self.name = self.config.model
        self._schema = schema if self.config.response_format else None
        self._reader = _Reader(project.config.data)
        self.folder = project.work / "generate"
        self._endpoint = Endpoint(
            self.config, "generate", self.folder, Budget(self.config.budget, "generate.budget"), reporter
        )
        self._reporter = reporter

    @property
    def about(self) -> dict[str, Any]:
        """The endpoint, for provenance."""
        return {"url": str(self.config.base_url)}

    def calls(self, prompts: Sequence[Prompt], samples: int) -> Calls:
        """Return what sampling takes."""
        requests = {self._endpoint.journal.key(r): r for prompt in prompts for r in self._requests(prompt, samples)}
        missing = [request for request in requests.values() if not self._endpoint.is_known(request)]
        tokens = sum(estimated_tokens(request.text) for request in missing)
        limit = self.config.reply_limit
        most = None if limit is None else limit * len(missing)
        return Calls(
            calls=len(requests),
            known=len(requests) - len(missing),
            prompt_tokens=tokens,
            most_completion_tokens=most,
            most_cost=None if most is None else cost(self.config, tokens, most),
        )

    def sample(self, title: str, prompts: Sequence[Prompt], samples: int) -> list[list[Sample]]:
        """Return the samples of each prompt.

        Raises:
            UserError: no key, a permanent failure, or the budget is used up; finished replies are kept.
        """
        self._reporter.say(f"Inputs are sent to {self.name} at {self.config.base_url}")
        requests = [request for prompt in prompts for request in self._requests(prompt, samples)]
        replies = iter(self._endpoint.ask(title, requests))
        return [[self._sample(prompt, next(replies)) for _ in range(samples)] for prompt in prompts]

    def _requests(self, prompt: Prompt, samples: int) -> list[ChatRequest]:
        own: dict[str, Any] = {}
        if prompt[0].role == "tools":
            own["tools"] = json.loads(prompt[0].content)
        if self._schema is not None:
            own["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": dict(self._schema)},
            }
        conversation = tuple(_sent(with_instruction(prompt, self.config.instruction)))
        return [ChatRequest(conversation, own, number) for number in range(samples)]

    def _sample(self, prompt: Prompt, reply: Reply) -> Sample:
        model, when = reply.model or self.name, reply.when or now()
        if reply.refused is not None:
            return Sample(None, reply.refused, model, when)
        if reply.finish == "length":
            return Sample(None, CUT_OFF, model, when)
        turn: dict[str, Any] = {"role": "assistant", "content": reply.text}
        if reply.tool_calls:
            turn["tool_calls"] = list(reply.tool_calls)
        message, unusable = self._reader.message(prompt, turn)
        return Sample(message, unusable, model, when)

    @property
    def used(self) -> Usage:
        """The replies used so far, earlier runs' included."""
        replies = self._endpoint.used.values()
        prompt, completion = sum(r.prompt_tokens for r in replies), sum(r.completion_tokens for r in replies)
        return Usage(len(replies), prompt, completion, cost(self.config, prompt, completion))


class LocalTeacher:
    """A base on this machine, sampled by the engine of evaluations.

    Args:
        project: its config's generate section names the base.
        generator: has the base and its chat format.
        reporter: shows the progress.

    Raises:
        UserError: a parameter that a local teacher does not take.
    """

    def __init__(self, project: ProjectFolder, generator: Generator, reporter: Reporter) -> None:
        self.config = project.config.generate
        others = sorted(self.config.parameters.keys() - set(_PARAMETERS))
        if others:
            raise UserError(
                f"A local teacher does not take {', '.join(others)} (it takes {', '.join(_PARAMETERS)})",
                where="generate.parameters",
                fix="Remove it.",
            )
        self.name = generator.base.spec
        self._generator = generator
        self._seed = project.config.seed
        self._reader = _Reader(project.config.data)
        self._constrained = project.config.evaluate.structured_outputs is not None
        self._limit = self.config.reply_limit or _LONGEST
        self._reporter = reporter
        decides = [
            generator.decoding(self._limit, None, constrained=self._constrained).key,
            self.config.parameters,
            self._seed,
        ]
        self._journal = project.work / "generate" / f"local-{digest(decides)[:16]}.jsonl"
        self._used: list[tuple[int, int]] = []

    @property
    def about(self) -> dict[str, Any]:
        """The base's files and precision, for provenance."""
        return {"base": self._generator.base.digest[:16], **self._generator.weights}

    def calls(self, prompts: Sequence[Prompt], samples: int) -> Calls:
        """Return what sampling takes."""
        kept = {row["key"]: row for row in read_journal(self._journal)}
        wanted = {(ids, number) for _, ids in self._encoded(prompts) for number in range(samples)}
        missing = [each for each in wanted if _sample_key(*each) not in kept]
        return Calls(
            calls=len(wanted),
            known=len(wanted) - len(missing),
            prompt_tokens=sum(len(ids) for ids, _ in missing),
            most_completion_tokens=self._limit * len(missing),
            most_cost=0.0,
        )

    def sample(self, title: str, prompts: Sequence[Prompt], samples: int) -> list[list[Sample]]:
        """Return the samples of each prompt; a resumed run computes only the missing ones."""
        encoded = self._encoded(prompts)
        kept = {row["key"]: row for row in read_journal(self._journal)}
        asked = {ids: prompt for prompt, ids in encoded}
        missing = sorted(
            (ids, number) for ids in asked for number in range(samples) if _sample_key(ids, number) not in kept
        )
        if missing:
            with self._reporter.task(title, len(asked) * samples, "samples") as task, journal(self._journal) as file:
                task.advance(len(asked) * samples - len(missing))

                def complete(index: int, completion: Completion) -> None:
                    ids, number = missing[index]
                    turn = answer_message(self._generator.chat, completion, asked[ids]).as_dict()
                    cut = completion.finish == "length"
                    entry = {"key": _sample_key(ids, number), "turn": turn, "cut": cut, "when": now()}
                    entry["tokens"] = len(completion.ids)
                    kept[str(entry["key"])] = entry
                    keep(file, entry)
                    task.advance()

                self._generator.generate(self._requests(missing), complete)
        found = []
        for prompt, ids in encoded:
            entries = [kept[_sample_key(ids, number)] for number in range(samples)]
            self._used += [(len(ids), entry["tokens"]) for entry in entries]
            found.append([self._sample(prompt, entry) for entry in entries])
        return found

    def _encoded(self, prompts: Sequence[Prompt]) -> list[tuple[Prompt, tuple[int, ...]]]:
        instruction = self.config.instruction
        return [(prompt, self._generator.prompt(with_instruction(prompt, instruction))) for prompt in prompts]

    def _requests(self, missing: Sequence[tuple[tuple[int, ...], int]]) -> list[Any]:
        free = self._generator.requests([ids for ids, _ in missing], self._limit, constrained=self._constrained)
        parameters = self.config.parameters
        return [
            replace(
                request,
                temperature=float(parameters.get("temperature", 1.0)),
                top_p=float(parameters.get("top_p", 1.0)),
                seed=_seed(f"{self._seed}:{_sample_key(ids, number)}"),
            )
            for request, (ids, number) in zip(free, missing, strict=True)
        ]

    def _sample(self, prompt: Prompt, entry: Mapping[str, Any]) -> Sample:
        version = f"{self.name}@{self._generator.base.digest[:12]}"
        if entry["cut"]:
            return Sample(None, CUT_OFF, version, entry["when"])
        message, unusable = self._reader.message(prompt, entry["turn"])
        return Sample(message, unusable, version, entry["when"])

    @property
    def used(self) -> Usage:
        """The samples used so far, earlier runs' included."""
        prompt, completion = (sum(counts) for counts in zip(*self._used, strict=True)) if self._used else (0, 0)
        return Usage(len(self._used), prompt, completion, 0.0)


Teacher = EndpointTeacher | LocalTeacher


def require_teacher(config: GenerateConfig) -> None:
    """Refuse a config without a teacher or its licence.

    Raises:
        UserError: as it says.
    """
    if config.base_url is None and config.base is None:
        raise UserError(
            "The config has no teacher",
            where="generate.base_url",
            fix="Set generate.base_url, model and api_key_env, or generate.base for a local model.",
        )
    if config.license is None:
        raise UserError(
            "The teacher's licence is not stated",
            where="generate.license",
            fix="Read the licence or terms of the teacher on training with its outputs, and put a note of it there.",
        )


def _sample_key(ids: tuple[int, ...], number: int) -> str:
    return digest([list(ids), number])


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
