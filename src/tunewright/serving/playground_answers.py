"""Answers of the playground, without the packages that compute them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunewright.adapters.lineage import count_system_turns
from tunewright.data.examples import Message
from tunewright.data.versions import DatasetVersion

if TYPE_CHECKING:
    from tunewright.generation.requests import Finish

BASE = "base"
Earlier = Sequence[tuple[str, str]]
"""Earlier questions of a conversation with their answers."""
PROMPTING = "prompting"
"""The best prompting arm on dev."""
ALIAS = "alias "
"""What the name of a live alias follows. No adapter's name has a space."""

_UNCERTAIN = math.log(0.5)


@dataclass(frozen=True)
class AnswerToken:
    """A token of an answer."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    """The likeliest tokens in its place with their log probabilities."""

    @property
    def uncertain(self) -> bool:
        """True if the model gave it less than half of the probability."""
        return self.logprob < _UNCERTAIN


@dataclass(frozen=True)
class PlaygroundAnswer:
    """A complete answer."""

    text: str
    finish: Finish
    prompt_tokens: int
    answer_tokens: int
    tokens: tuple[AnswerToken, ...]
    """Empty where the engine reports no probabilities."""
    asked: str
    """The arm or adapter that answered."""
    digest: str | None
    """The adapter's."""
    response_id: str | None = None
    """The id of the response of a server that answered; None from the playground's own base."""


def conversation(question: str, system: str | None, earlier: Earlier = ()) -> tuple[Message, ...]:
    """Return the turns of a question, after its earlier turns."""
    turns = [turn for asked, said in earlier for turn in (Message("user", asked), Message("assistant", said))]
    return (*([] if system is None else [Message("system", system)]), *turns, Message("user", question))


def shared_system(version: DatasetVersion | None) -> str | None:
    """Return the system turn that all rows share; None if there is no such turn."""
    text: str | None = None if version is None else count_system_turns(version.domain)["text"]
    return text
