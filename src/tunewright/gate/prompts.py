"""The prompts of the gate: dev rows, which selected the adapter and need no test-set access, or general questions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_limit, stop_strings
from tunewright.chat.tool_form import has_functions
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, digest
from tunewright.data.examples import Message, ToolCall, call_id
from tunewright.data.versions import DatasetVersion, Member, has_version, load_version
from tunewright.models.loading import context_length
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.generation.requests import Completion

PROMPTS = 32
"""Held-out prompts that are answered, or all if there are fewer."""

PLACES = 8
"""Places of each answer at which full distributions are compared, spread evenly from its first token to its end."""

ISOLATION_PROMPTS = 16
"""Number of dev items that the isolation test tries first: an adapter differs most on its own task."""

GENERAL = (
    "What is the capital of Norway?",
    "Write a short poem about the sea.",
    "List three uses of copper.",
    "Translate into French: The shop opens at nine.",
    "Why is the sky blue?",
    "2, 4, 8, 16,",
    "Dear customer,",
    "def add(a, b):",
)
"""Prompts tried after the dev items, or instead of them on a machine without the data, such as a server."""

ANSWER_TOKENS = 64
"""Tokens of an answer to a general question in the serving check."""


@dataclass(frozen=True)
class Probe:
    """Prompts, and their generation settings."""

    members: tuple[Member, ...]
    """The dev rows of the prompts; empty for general questions, whose answers have no form to check."""
    prompts: tuple[tuple[int, ...], ...]
    limit: int
    """Tokens of the longest answer."""
    stop: tuple[str, ...]
    functions: tuple[tuple[Message, ...], ...] = ()
    """Conversations with functions, which are only rendered."""

    @property
    def context(self) -> int:
        """The tokens of the longest prompt with the longest answer."""
        return max(map(len, self.prompts)) + self.limit


def draw_probe(project: OpenProject, version: DatasetVersion, system_prompt: str | None) -> Probe:
    """Return dev rows from as many clusters as possible, in an order that the config's seed draws.

    If rows have functions or ``chat.tools`` is hermes, generated conversations with functions are added.
    """
    config, chat, context = project.folder.config, project.chat, context_length(project.base)
    limit = answer_limit(config, chat, version.domain_of("train"))
    dev = sorted(version.domain_of("dev"), key=lambda m: digest([config.seed, m.key]))
    seen: set[str] = set()
    first: list[Member] = []
    later: list[Member] = []
    for member in dev:
        (later if member.cluster in seen else first).append(member)
        seen.add(member.cluster)
    asked = [(member, chat.prompt(member.example.prompt)) for member in (*first, *later)[:PROMPTS]]
    fitting = [(member, ids) for member, ids in asked if len(ids) + limit <= context]
    if len(fitting) < len(asked):
        project.reporter.warn(
            f"{len(asked) - len(fitting)} of {len(asked)} dev prompts are left out of the comparison: with an answer "
            f"of {limit} tokens they do not fit into the base's context of {context:,}"
        )
    if not fitting:
        raise UserError(
            "No dev row is available to compare the exported model on",
            where=f"dataset version {version.digest[:12]}",
            fix="Add a dev split to the dataset, and train on that version.",
        )
    members, prompts = zip(*fitting, strict=True)
    used = chat.template.tools == "hermes" or any(
        has_functions(member.example.messages) for member in version.domain_of("train")
    )
    functions = function_conversations(chat, system_prompt) if used else ()
    return Probe(members, prompts, limit, stop_strings(config, chat), functions)


def serving_probe(project: OpenProject) -> Probe:
    """Return the prompts of the serving check: dev items, or general questions on a machine without the data."""
    config, chat = project.folder.config, project.chat
    if has_version(project.folder.dataset):
        version = load_version(project.folder.dataset)
        if version.domain_of("dev"):
            return draw_probe(project, version, None)
    project.reporter.warn(
        "There are no dev items here: the serving check asks general questions, and no JSON or calls are checked."
    )
    prompts = tuple(chat.prompt((Message("user", text),)) for text in GENERAL)
    return Probe((), prompts, config.evaluate.max_new_tokens or ANSWER_TOKENS, stop_strings(config, chat))


def isolation_prompts(project: OpenProject) -> list[tuple[int, ...]]:
    """Return prompts on which models probably differ, in the order to try them."""
    members: Sequence[Member] = ()
    if has_version(project.folder.dataset):
        members = load_version(project.folder.dataset).domain_of("dev")
    if not members:
        project.reporter.say("There are no dev items here: the isolation test asks general questions.")
    drawn = random.Random(project.folder.config.seed).sample(members, min(ISOLATION_PROMPTS, len(members)))
    asked = [member.example.prompt for member in drawn] + [(Message("user", text),) for text in GENERAL]
    return list(dict.fromkeys(project.chat.prompt(messages) for messages in asked))


def places(tokens: int, *, ended: bool) -> list[int]:
    """Return the numbers of answer tokens before each place, from 0 to all but the last (all if the answer ended)."""
    last = tokens if ended else tokens - 1
    return sorted({round(place) for place in np.linspace(0, last, PLACES).tolist()})


def contexts(probe: Probe, completions: Sequence[Completion]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Return each prompt with its answer, and the numbers of tokens before each place."""
    found = []
    for prompt, answer in zip(probe.prompts, completions, strict=True):
        ended = answer.finish == "stop" and answer.before_stop is None
        before = [len(prompt) + place for place in places(len(answer.ids), ended=ended)]
        found.append(((*prompt, *answer.ids), before))
    return found


_PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": 'Town\'s "name", e.g. Łódź'},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "unit": {"type": "string", "enum": ["°C", "°F"]},
    },
    "required": ["city"],
}
_DECLARED = canonical_json(
    [
        {"type": "function", "function": {"name": name, "description": text, "parameters": _PARAMETERS}}
        for name, text in (("weather", "Weather & temperature of a <place>."), ("clock_time", "d'été\n2nd line"))
    ]
)
_SYSTEM = "Be brief."


def function_conversations(chat: ChatFormat, system_prompt: str | None) -> tuple[tuple[Message, ...], ...]:
    """Return conversations with declarations, a call, parallel calls and results, as far as the format has forms."""
    declared = Message("tools", _DECLARED)
    _ = chat.tool_form  # refuse before any conversation is tried
    found = []
    for turns in _conversations(chat):
        for system in (_SYSTEM, None) if system_prompt is None else (system_prompt,):
            conversation = (declared, *([Message("system", system)] if system else []), *turns)
            try:
                chat.prompt(conversation)
            except UserError:
                continue  # no system turns, or one result a turn (Mistral v2)
            found.append(conversation)
    return tuple(found)


def _conversations(chat: ChatFormat) -> Iterator[tuple[Message, ...]]:
    """Return conversations that wait for an answer, without declarations and system turn."""
    asked = Message("user", "How warm is it?")
    called = (
        _called("", _call(0, "weather", city='Łódź "x" <&>', days=[1, 20])),
        Message("tool", '{"t": "12°C"}', call_id=call_id(0)),
    )
    answered = (asked, *called, Message("assistant", "12°C."), Message("user", "And there, d'été?"))
    yield (asked,)
    yield (asked, *called)
    yield answered
    if chat.tool_form.parallel:
        both = _called("", _call(1, "clock_time"), _call(2, "weather", city="Oslo", unit=None, more={"a": [1.5, True]}))
        results = (Message("tool", "18:00", call_id=call_id(1)), Message("tool", "4\n5", call_id=call_id(2)))
        yield (*answered, both, *results)
    if chat.tool_form.with_text:
        yield (
            asked,
            _called("Let me see.", _call(0, "clock_time", city="Oslo")),
            Message("tool", "8", call_id=call_id(0)),
        )


def _called(content: str, *calls: ToolCall) -> Message:
    return Message("assistant", content, calls=calls)


def _call(place: int, name: str, **arguments: object) -> ToolCall:
    return ToolCall(name, canonical_json(arguments), call_id(place))
