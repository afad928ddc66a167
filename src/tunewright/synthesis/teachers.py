"""The teacher: a model behind an endpoint, or a local base, whose samples are kept as soon as they are complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunewright.chat.answers import answer_message
from tunewright.config import DataConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.data.examples import Message
from tunewright.data.readers import unmapped
from tunewright.data.readers.row_errors import CODES, RowError
from tunewright.data.readers.schemas import parse_conversation
from tunewright.data.readers.validate import example_from_turns
from tunewright.model_io.client import Calls, Endpoint, EndpointUsage
from tunewright.model_io.replies import Budget, ChatRequest, Journal, Reply

if TYPE_CHECKING:
    from tunewright.evaluation.generations import Generator
    from tunewright.generation.requests import Completion

Prompt = tuple[Message, ...]

CUT_OFF = "cut off at the token limit"
EMPTY = "empty answer"

_PARAMETERS = ("temperature", "top_p", "max_tokens")
_LONGEST = 512  # tokens, where the parameters set no limit


@dataclass(frozen=True)
class TeacherSample:
    """One sampled answer, or the reason why it cannot be used."""

    message: Message | None
    unusable: str | None
    model: str
    """The teacher's version."""
    when: str
    """UTC, ISO 8601."""


def with_instruction(prompt: Prompt, instruction: str | None) -> Prompt:
    """Return the prompt with an instruction only for the teacher at the end of its system turn."""
    if instruction is None:
        return prompt
    head = 1 if prompt[0].role == "tools" else 0
    if prompt[head].role == "system":
        system = replace(prompt[head], content=f"{prompt[head].content}\n\n{instruction}")
        return (*prompt[:head], system, *prompt[head + 1 :])
    return (*prompt[:head], Message("system", instruction), *prompt[head:])


def _endpoint_turns(prompt: Prompt) -> list[dict[str, Any]]:
    """Return the turns as an endpoint takes them."""
    return [{**replace(m, weight=1).as_dict()} for m in prompt if m.role != "tools"]


class _Reader:
    """Reads a model's turn as a row's last turn, with the checks of rows."""

    def __init__(self, data: DataConfig) -> None:
        # The prompt has its system turn already, or goes without one.
        self._data = unmapped(data).model_copy(update={"system_prompt": None, "drop_columns": ()})

    def sample(
        self, prompt: Prompt, turn: Mapping[str, Any], unusable: str | None, model: str, when: str
    ) -> TeacherSample:
        """Return the turn as a sample, ``unusable`` for that reason or for a fault that is found here."""
        if not unusable and not str(turn.get("content") or "").strip() and not turn.get("tool_calls"):
            unusable = EMPTY
        if unusable:
            return TeacherSample(None, unusable, model, when)
        row: dict[str, Any] = {"messages": [*_endpoint_turns(prompt), turn]}
        if prompt[0].role == "tools":
            row["tools"] = json.loads(prompt[0].content)
        try:
            conversation = parse_conversation(row, self._data)
            example = example_from_turns(conversation.turns, self._data, conversation.tools)
        except RowError as error:
            return TeacherSample(None, f"invalid answer: {CODES[error.code][0]} ({error.code})", model, when)
        return TeacherSample(example.messages[-1], None, model, when)


class EndpointTeacher:
    """A model behind an endpoint.

    ``schema`` is the JSON schema of answers, to send as ``response_format``.
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
        return self._endpoint.estimate(request for prompt in prompts for request in self._requests(prompt, samples))

    def sample(self, title: str, prompts: Sequence[Prompt], samples: int) -> list[list[TeacherSample]]:
        """Return the samples of each prompt."""
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
        conversation = tuple(_endpoint_turns(with_instruction(prompt, self.config.instruction)))
        return [ChatRequest(conversation, own, number) for number in range(samples)]

    def _sample(self, prompt: Prompt, reply: Reply) -> TeacherSample:
        turn: dict[str, Any] = {"role": "assistant", "content": reply.text}
        if reply.tool_calls:
            turn["tool_calls"] = list(reply.tool_calls)
        unusable = CUT_OFF if reply.refused is None and reply.finish == "length" else reply.refused
        return self._reader.sample(prompt, turn, unusable, reply.model or self.name, reply.when or now())

    @property
    def used(self) -> EndpointUsage:
        """The replies used so far, earlier runs' included."""
        return self._endpoint.usage


class LocalTeacher:
    """A base on this machine, sampled by the engine of evaluations."""

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
        self._journal: Journal[dict[str, Any]] = Journal(
            project.work / "generate" / f"local-{digest(decides)[:16]}.jsonl",
            lambda row: (row.pop("key"), row),
            lambda key, sampled: {"key": key, **sampled},
        )
        self._used: list[tuple[int, int]] = []

    @property
    def about(self) -> dict[str, Any]:
        """The base's files and precision, for provenance."""
        return {"base": self._generator.base.digest[:16], **self._generator.weights}

    def calls(self, prompts: Sequence[Prompt], samples: int) -> Calls:
        """Return what sampling takes."""
        wanted = self._sample_keys(self._encode(prompts), samples)
        missing = self._journal.missing(wanted).values()
        return Calls(
            calls=len(wanted),
            known=len(wanted) - len(missing),
            prompt_tokens=sum(len(ids) for ids, _ in missing),
            most_completion_tokens=self._limit * len(missing),
            most_cost=0.0,
        )

    def sample(self, title: str, prompts: Sequence[Prompt], samples: int) -> list[list[TeacherSample]]:
        """Return the samples of each prompt; a resumed run computes only the missing ones."""
        encoded = self._encode(prompts)
        asked = {ids: prompt for prompt, ids in encoded}
        wanted = self._sample_keys(encoded, samples)
        missing = sorted(self._journal.missing(wanted).values())
        if missing:
            with self._reporter.task(title, len(wanted), "samples") as task, self._journal.keeping() as keep:
                task.advance(len(wanted) - len(missing), kept=True)

                def complete(index: int, completion: Completion) -> None:
                    ids, number = missing[index]
                    turn = answer_message(self._generator.chat, completion, asked[ids]).as_dict()
                    cut = completion.finish == "length"
                    entry = {"turn": turn, "cut": cut, "when": now(), "tokens": len(completion.ids)}
                    keep(_sample_key(ids, number), entry)
                    task.advance()

                self._generator.generate(self._requests(missing), complete)
        found = []
        for prompt, ids in encoded:
            entries = [self._journal.answers[_sample_key(ids, number)] for number in range(samples)]
            self._used += [(len(ids), entry["tokens"]) for entry in entries]
            found.append([self._sample(prompt, entry) for entry in entries])
        return found

    def _sample_keys(
        self, encoded: Sequence[tuple[Prompt, tuple[int, ...]]], samples: int
    ) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return ids and number of each distinct sample by its key."""
        return {_sample_key(ids, number): (ids, number) for _, ids in encoded for number in range(samples)}

    def _encode(self, prompts: Sequence[Prompt]) -> list[tuple[Prompt, tuple[int, ...]]]:
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

    def _sample(self, prompt: Prompt, entry: Mapping[str, Any]) -> TeacherSample:
        version = f"{self.name}@{self._generator.base.digest[:12]}"
        return self._reader.sample(prompt, entry["turn"], CUT_OFF if entry["cut"] else None, version, entry["when"])

    @property
    def used(self) -> EndpointUsage:
        """The samples used so far, earlier runs' included."""
        prompt, completion = (sum(counts) for counts in zip(*self._used, strict=True)) if self._used else (0, 0)
        return EndpointUsage(len(self._used), prompt, completion, 0.0)


Teacher = EndpointTeacher | LocalTeacher


def _sample_key(ids: tuple[int, ...], number: int) -> str:
    return digest([list(ids), number])


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
