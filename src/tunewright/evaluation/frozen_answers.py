"""An incumbent's answers, frozen: asked once from its endpoint, then read from a file that the access log binds."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tunewright.config import IncumbentConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, digest
from tunewright.core.log import numbered_lines, parse_line
from tunewright.core.progress import Reporter
from tunewright.data.examples import Example, Message, ToolCall, call_id
from tunewright.data.readers.turns import split_thinking
from tunewright.data.tools import ArgumentsError, canonical_arguments
from tunewright.data.trace import places_by_key, source_name
from tunewright.data.versions import DatasetVersion, Member
from tunewright.evaluation.access_log import AccessLog
from tunewright.evidence.common import Part
from tunewright.model_io.client import Endpoint
from tunewright.model_io.replies import Budget, ChatRequest, Reply, cost, estimated_tokens

Split = Literal["test", "dev"]

NOT_FROZEN = "no frozen answer"
_UNSTATED = "not stated"
_STOPPED = "stopped by a content filter"


class FrozenAnswer(Part):
    """An answer as the endpoint gave it; a line of the file after the first."""

    key: Annotated[str, Field(description="The row's pair key.")]
    request: Annotated[str, Field(description="Digest of endpoint, model, parameters and conversation.")]
    text: str
    calls: Annotated[tuple[tuple[str, str], ...], Field(description="Function calls: name and arguments.")] = ()
    finish: str | None
    gap: Annotated[str | None, Field(description="Reason why there is no answer; null: there is one.")] = None
    model: Annotated[str | None, Field(description="Model version as the endpoint stated it.")]
    time: Annotated[str | None, Field(description="UTC, ISO 8601.")]
    seconds: Annotated[float | None, Field(description="From the request to its whole reply.")]
    at_once: Annotated[int, Field(description="Most requests in flight when it was asked.")]
    prompt_tokens: int
    completion_tokens: int
    estimated: Annotated[bool, Field(description="The endpoint did not count tokens: guessed.")]
    cost: Annotated[float | None, Field(description="At the prices of that time; null: no prices were set.")]

    @property
    def answer(self) -> str:
        """The answer's text without thinking, and its calls in their canonical form, as references have them."""
        try:
            _, text = split_thinking(self.text) or ("", self.text)
        except ValueError:  # cut off while it thought
            text = ""
        calls = tuple(
            ToolCall(name, _arguments(arguments), call_id(n)) for n, (name, arguments) in enumerate(self.calls)
        )
        return Message("assistant", text, calls=calls).text


class FrozenHeader(Part):
    """The first line of the file."""

    schema_version: Literal[1] = 1
    incumbent: str
    url: str
    model: str
    parameters: dict[str, Any]
    system_prompt: str | None
    split: Split
    rows: Annotated[str, Field(description="Digest of the rows' requests.")]
    frozen: Annotated[str, Field(description="Time of freezing: UTC, ISO 8601.")]


@dataclass(frozen=True)
class FrozenSet:
    """One split's frozen answers, in the rows' order; None for a row without an answer."""

    path: Path
    answers: list[FrozenAnswer | None]

    @property
    def given(self) -> list[FrozenAnswer]:
        """The rows' answers, without gaps."""
        return [answer for answer in self.answers if answer is not None and answer.gap is None]

    @property
    def requests(self) -> list[FrozenAnswer]:
        """The given answers once for each request, since rows with equal prompts share one."""
        return list({answer.request: answer for answer in self.given}.values())

    @property
    def gaps(self) -> dict[int, str]:
        """Position of each row without an answer, to the reason."""
        reasons = [NOT_FROZEN if answer is None else answer.gap for answer in self.answers]
        return {place: reason for place, reason in enumerate(reasons) if reason is not None}

    @property
    def versions(self) -> dict[str, int]:
        """Model versions with their numbers of answers."""
        return dict(Counter(answer.model or _UNSTATED for answer in self.given))


@dataclass(frozen=True)
class IncumbentEstimate:
    """Calls, tokens and cost of an incumbent's answers that are still missing; tokens are guessed from characters."""

    name: str
    calls: int
    known: int
    prompt_tokens: int
    completion_tokens: int
    """As many tokens as the references have."""
    most_completion_tokens: int | None
    """None: the parameters set no limit."""
    cost: float | None
    """None: no prices."""
    most_cost: float | None


class IncumbentModel:
    """An incumbent of the config with its frozen answers."""

    def __init__(self, project: ProjectFolder, config: IncumbentConfig, reporter: Reporter) -> None:
        where = f"evaluate.incumbents.{config.name}"
        self.config = config
        self.reporter = reporter
        self.evaluations = project.evaluations
        self.folder = project.incumbents
        journals = project.work / "incumbents"
        self.endpoint = Endpoint(config, where, journals, Budget(config.budget, f"{where}.budget"), reporter)

    @property
    def arm(self) -> str:
        """The name of its arm."""
        return f"incumbent-{self.config.name}"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides its answers."""
        config = self.config
        return {
            "name": config.name,
            "url": config.base_url,
            "model": config.model,
            "parameters": config.parameters,
            "system_prompt": config.system_prompt,
            "trained_on": list(config.trained_on),
        }

    def request(self, example: Example) -> ChatRequest:
        """Return the request for a row: its messages, and its functions as ``tools``."""
        # Hosted models refuse unknown keys, and their APIs take no thinking of earlier turns.
        own = ("weight", "reasoning_content")
        turns = [{k: v for k, v in m.as_dict().items() if k not in own} for m in example.prompt]
        functions: dict[str, Any] = {}
        if turns[0]["role"] == "tools":
            functions["tools"] = json.loads(turns.pop(0)["content"])
        if self.config.system_prompt is not None:
            turns = [turn for turn in turns if turn["role"] != "system"]
            turns.insert(0, {"role": "system", "content": self.config.system_prompt})
        return ChatRequest(tuple(turns), functions)

    def messages(self, example: Example) -> list[dict[str, Any]]:
        """Return a row's request as messages, its functions as one of the role ``tools``."""
        request = self.request(example)
        functions = [{"role": "tools", "content": canonical_json(tools)} for tools in request.parameters.values()]
        return [*functions, *request.conversation]

    def estimate(self, members: Sequence[Member]) -> IncumbentEstimate:
        """Estimate the calls that these rows still need; nothing is sent."""
        wanted = {self.key(m) for m in members}
        missing = self.endpoint.journal.missing(self._unfrozen(members))
        prompt = sum(estimated_tokens(self.request(m.example).text) for m in missing.values())
        completion = sum(estimated_tokens(m.example.output) for m in missing.values())
        limit = self.config.reply_limit
        most = None if limit is None else limit * len(missing)
        return IncumbentEstimate(
            name=self.config.name,
            calls=len(missing),
            known=sum(key in self._frozen or key in self.endpoint.journal.answers for key in wanted),
            prompt_tokens=prompt,
            completion_tokens=completion,
            most_completion_tokens=most,
            cost=cost(self.config, prompt, completion),
            most_cost=None if most is None else cost(self.config, prompt, most),
        )

    def unfrozen(self, members: Sequence[Member]) -> int:
        """Return the number of rows without a frozen answer that ``frozen: true`` leaves out."""
        return sum(self.key(m) not in self._frozen for m in members) if self.config.frozen else 0

    def require_ready(self, members: Sequence[Member]) -> None:
        """Check that the rows can be answered: there is a key, or with ``frozen`` at least one answer."""
        if members and self.unfrozen(members) == len(members):
            raise UserError(
                f"No answer of {self.config.name} to these {len(members):,} rows is frozen",
                where=f"{self.endpoint.where}.frozen",
                fix="Check base_url, model, parameters and system_prompt, which identify frozen answers, and the "
                "folder incumbents.",
            )
        if self.endpoint.journal.missing(self._unfrozen(members)):
            self.endpoint.require_key()

    def answers(self, members: Sequence[Member], split: Split) -> FrozenSet:
        """Return the split's frozen answers; rows without one are asked, and the file is written once all exist."""
        keys = [self.key(m) for m in members]
        unfrozen = self._unfrozen(members)
        if missing := self.endpoint.journal.missing(unfrozen):
            where = f"{self.config.model} at {self.config.base_url}"
            self.reporter.say(f"{split.capitalize()} items are sent to {where} ({len(missing):,} calls)")
        requests = [self.request(member.example) for member in unfrozen.values()]
        replies = dict(zip(unfrozen, self.endpoint.ask(f"{self.arm} on {split}", requests), strict=True))
        lines = [self._line(m, key, replies) for m, key in zip(members, keys, strict=True)]
        rows = digest(sorted(line.request for line in lines if line is not None))
        frozen = FrozenSet(self.folder / f"{self.config.name}-{split}-{rows[:12]}.jsonl", lines)
        if not frozen.path.exists() and any(line is not None for line in lines):
            self._freeze(frozen, split, rows)
        self._report(frozen, split)
        return frozen

    # Rows and files

    def key(self, member: Member) -> str:
        """Return the digest of a row's request, which identifies its answer."""
        return self.endpoint.journal.key(self.request(member.example))

    def _unfrozen(self, members: Sequence[Member]) -> dict[str, Member]:
        """Return the rows that the endpoint answers, one for each distinct request."""
        if self.config.frozen:
            return {}
        return {key: member for member in members if (key := self.key(member)) not in self._frozen}

    @cached_property
    def _frozen(self) -> Mapping[str, FrozenAnswer]:
        """Answers of all frozen files by request."""
        files = sorted(self.folder.glob("[!.]*.jsonl"))
        AccessLog(self.evaluations).require(*files)
        return {line.request: line for file in files for line in read_frozen(file)}

    def _line(self, member: Member, key: str, replies: Mapping[str, Reply]) -> FrozenAnswer | None:
        if key in self._frozen:
            return self._frozen[key].model_copy(update={"key": member.key})
        reply = replies.get(key)
        if reply is None:
            return None
        return FrozenAnswer(
            key=member.key,
            request=key,
            text=reply.text,
            calls=tuple(map(_named, reply.tool_calls)),
            finish=reply.finish,
            gap=reply.refused or (_STOPPED if reply.finish == "content_filter" else None),
            model=reply.model,
            time=reply.when,
            seconds=reply.seconds,
            at_once=self.config.concurrency,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            estimated=reply.estimated,
            cost=cost(self.config, reply.prompt_tokens, reply.completion_tokens),
        )

    def _freeze(self, frozen: FrozenSet, split: Split, rows: str) -> None:
        config = self.config
        assert config.base_url is not None and config.model is not None
        header = FrozenHeader(
            incumbent=config.name,
            url=config.base_url,
            model=config.model,
            parameters=config.parameters,
            system_prompt=config.system_prompt,
            split=split,
            rows=rows,
            frozen=now(),
        )
        lines = [header, *(line for line in frozen.answers if line is not None)]
        text = "".join(f"{canonical_json(line.model_dump(mode='json'))}\n" for line in lines)
        AccessLog(self.evaluations).write(frozen.path, text)
        self.reporter.say(
            f"Frozen: {len(lines) - 1:,} answers of {self.arm} in {os.path.relpath(frozen.path, self.folder.parent)}"
        )

    def _report(self, frozen: FrozenSet, split: Split) -> None:
        """Report gaps, cut answers and changes of the model."""
        total = len(frozen.answers)
        if frozen.gaps:
            why = "; ".join(f"{reason} ({count:,})" for reason, count in Counter(frozen.gaps.values()).items())
            self.reporter.warn(f"{len(frozen.gaps):,} of {total:,} {split} items have no answer of {self.arm}: {why}")
        cut = sum(answer.finish == "length" for answer in frozen.given)
        if cut:
            self.reporter.warn(
                f"{cut:,} of {total:,} answers of {self.arm} on {split} reached its token limit and are scored "
                "as cut; raise max_tokens in its parameters."
            )
        if len(frozen.versions) > 1:
            counts = ", ".join(f"{name} ({count:,})" for name, count in frozen.versions.items())
            self.reporter.warn(f"{self.arm} changed its model version on {split}: {counts}")


def incumbent_models(project: ProjectFolder, reporter: Reporter) -> list[IncumbentModel]:
    """Return the config's incumbents."""
    return [IncumbentModel(project, config, reporter) for config in project.config.evaluate.incumbents]


def require_ready(project: ProjectFolder, version: DatasetVersion, splits: Sequence[Split], reporter: Reporter) -> None:
    """Check the keys and files of all incumbents, before anything is paid or computed."""
    for model in incumbent_models(project, reporter):
        trained_on(model, project, version)
        for split in splits:
            model.require_ready(version.examples(split))


def trained_on(model: IncumbentModel, project: ProjectFolder, version: DatasetVersion) -> set[str]:
    """Return the pair keys of rows from the files that a model was itself trained on."""
    if not model.config.trained_on:
        return set()
    source_of = {
        key: place.rpartition(":")[0] for key, place in places_by_key(project.dataset, version.manifest).items()
    }
    sources, where = sorted(set(source_of.values())), f"{model.endpoint.where}.trained_on"
    files = {source_name(file, sources, project.root, where) for file in model.config.trained_on}
    return {key for key, source in source_of.items() if source in files}


def read_frozen(path: Path) -> list[FrozenAnswer]:
    """Load the answers of a frozen file."""
    answers = []
    for number, line in numbered_lines(path.read_bytes()):
        validate = FrozenHeader.model_validate_json if number == 1 else FrozenAnswer.model_validate_json
        found = parse_line(validate, line, f"{path}:{number}", "Not a frozen answer")
        if isinstance(found, FrozenAnswer):
            answers.append(found)
    return answers


def _named(call: Any) -> tuple[str, str]:
    """Return a call's name and arguments as the endpoint wrote them; a malformed call has its JSON in place of both."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return "", json.dumps(call)
    arguments = function.get("arguments", "")
    return function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)


def _arguments(text: str) -> str:
    """Return a call's arguments in canonical form, or unchanged if they are no JSON object."""
    try:
        return canonical_arguments(text)[0]
    except ArgumentsError:
        return text
