"""An example: a conversation whose last assistant turn is the ideal output."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from tunewright.core.io import digest

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    weight: Literal[0, 1] = 1
    """0 for an assistant turn that is shown to the model but not trained (as in OpenAI's chat format)."""

    def as_dict(self) -> dict[str, str | int]:
        """Return the turn as JSON files hold it."""
        turn: dict[str, str | int] = {"role": self.role, "content": self.content}
        return turn if self.weight == 1 else {**turn, "weight": self.weight}


@dataclass(frozen=True)
class Example:
    """A conversation of at least one user turn and, last, the assistant turn that is the ideal output."""

    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All that comes before the ideal output."""
        return self.messages[:-1]

    @property
    def output(self) -> str:
        """The ideal output."""
        return self.messages[-1].content

    @property
    def input_text(self) -> str:
        """The turns that tell this example from others: the prompt without its system turns."""
        return "\n".join(m.content for m in self.prompt if m.role != "system")

    @cached_property
    def pair_key(self) -> str:
        """SHA-256 of the whole conversation (NFC, canonical JSON): the example's identity."""
        return digest([_canonical(m) for m in self.messages])

    @cached_property
    def input_key(self) -> str:
        """SHA-256 of the prompt alone."""
        return digest([_canonical(m) for m in self.prompt])

    @cached_property
    def asked(self) -> str:
        """SHA-256 of the prompt with case and white space set aside (see ``in_conflict``)."""
        return digest([[m.role, normalised(m.content)] for m in self.prompt])

    @cached_property
    def question(self) -> str:
        """SHA-256 of the prompt without system turns, case and white space set aside."""
        return digest(self._question())

    @cached_property
    def said(self) -> str:
        """SHA-256 of the question as in ``question`` and the output without the white space around it."""
        return digest([*self._question(), self.output.strip()])

    def _question(self) -> list[list[str]]:
        return [[m.role, normalised(m.content)] for m in self.prompt if m.role != "system"]

    @classmethod
    def from_dicts(cls, messages: list[dict[str, Any]]) -> Example:
        """Rebuild an example from the JSON that this package wrote itself."""
        return cls(tuple(Message(m["role"], m["content"], m.get("weight", 1)) for m in messages))


def in_conflict(examples: Sequence[Example]) -> bool:
    """Return whether different examples that ask the same (equal ``asked``) are given different outputs.

    Where inputs differ in case or white space, so may outputs, which often repeat a part of them.
    """
    if len(examples) < 2:
        return False
    same_input = len({example.input_key for example in examples}) < len(examples)
    return same_input or len({normalised(example.output) for example in examples}) > 1


def normalised(text: str) -> str:
    """NFC, case folded, white space collapsed: what is left tells inputs apart."""
    # Casefolding can leave a letter decomposed, hence NFC on both sides of it.
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(folded.split())


def _canonical(message: Message) -> list[str | int]:
    # A weight of 1 is left out, so that it makes no other example of a pair than no weight does.
    turn: list[str | int] = [message.role, unicodedata.normalize("NFC", message.content)]
    return turn if message.weight == 1 else [*turn, message.weight]
