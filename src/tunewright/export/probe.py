"""The prompts that artifacts are compared on: dev rows, which selected the adapter and need no test-set access."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_limit, stop_strings
from tunewright.chat.tool_form import has_functions
from tunewright.config import Config
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.data.examples import Message
from tunewright.data.versions import DatasetVersion, Member
from tunewright.export.function_conversations import function_conversations
from tunewright.export.parity import PLACES, PROMPTS


@dataclass(frozen=True)
class Probe:
    """Prompts, and their generation settings."""

    members: tuple[Member, ...]
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


def draw_probe(
    version: DatasetVersion,
    chat: ChatFormat,
    config: Config,
    context: int,
    system_prompt: str | None,
    reporter: Reporter,
) -> Probe:
    """Return dev rows from as many clusters as possible, in an order that the config's seed draws.

    If rows have functions or ``chat.tools`` is hermes, generated conversations with functions come on top.

    Raises:
        UserError: no dev row fits the base's context.
    """
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
        reporter.warn(
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


def places(tokens: int, *, ended: bool) -> list[int]:
    """Return the numbers of answer tokens before each place, from 0 to all but the last (all if the answer ended)."""
    last = tokens if ended else tokens - 1
    return sorted({round(place) for place in np.linspace(0, last, PLACES).tolist()})


def contexts(
    probe: Probe, answers: Sequence[tuple[int, ...]], ended: Sequence[bool]
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Return each prompt with its answer, and the numbers of tokens before each place."""
    return [
        ((*prompt, *answer), [len(prompt) + place for place in places(len(answer), ended=end)])
        for prompt, answer, end in zip(probe.prompts, answers, ended, strict=True)
    ]
