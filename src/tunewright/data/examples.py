"""An example: a conversation whose last assistant turn is the ideal output."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from tunewright.core.io import digest
from tunewright.core.unicode import normalize

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: Role
    content: str
    weight: Literal[0, 1] = 1
    """0 for an assistant turn that is shown to the model but not trained (as in OpenAI's chat format)."""

    def as_dict(self) -> dict[str, str | int]:
        """Return the turn as JSON files have it."""
        turn: dict[str, str | int] = {"role": self.role, "content": self.content}
        return turn if self.weight == 1 else {**turn, "weight": self.weight}


@dataclass(frozen=True)
class Example:
    """A conversation of at least one user turn and, last, the assistant turn that is the ideal output."""

    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns before the ideal output."""
        return self.messages[:-1]

    @property
    def output(self) -> str:
        """The ideal output."""
        return self.messages[-1].content

    @property
    def input_text(self) -> str:
        """Text of the prompt without its system turns."""
        return "\n".join(m.content for m in self.prompt if m.role != "system")

    @cached_property
    def pair_key(self) -> str:
        """SHA-256 of the conversation (NFC, canonical JSON): the example's identity."""
        return digest([_canonical(m) for m in self.messages])

    @cached_property
    def input_key(self) -> str:
        """SHA-256 of the prompt."""
        return digest([_canonical(m) for m in self.prompt])

    @cached_property
    def prompt_key(self) -> str:
        """SHA-256 of the prompt, ignoring case and white space (see ``in_conflict``)."""
        return digest([[m.role, normalised(m.content)] for m in self.prompt])

    @cached_property
    def question_key(self) -> str:
        """SHA-256 of the prompt without system turns, ignoring case and white space."""
        return digest(self._question())

    @cached_property
    def content_key(self) -> str:
        """SHA-256 of the prompt as in ``question_key``, and of the output without surrounding white space."""
        return digest([*self._question(), self.output.strip()])

    def _question(self) -> list[list[str]]:
        return [[m.role, normalised(m.content)] for m in self.prompt if m.role != "system"]

    @classmethod
    def from_dicts(cls, messages: list[dict[str, Any]]) -> Example:
        """Rebuild an example from the JSON that this package wrote itself."""
        return cls(tuple(Message(m["role"], m["content"], m.get("weight", 1)) for m in messages))


def in_conflict(examples: Sequence[Example]) -> bool:
    """Return whether examples with the same ``prompt_key`` have different outputs.

    Outputs may differ in case or white space if inputs do, since outputs often repeat a part of the input.
    """
    if len(examples) < 2:
        return False
    same_input = len({example.input_key for example in examples}) < len(examples)
    return same_input or len({normalised(example.output) for example in examples}) > 1


def normalised(text: str) -> str:
    """Return the text in NFC, case folded, with white space collapsed."""
    # Case folding can decompose a letter, hence NFC before and after it.
    folded = normalize(normalize(text).casefold())
    return " ".join(folded.split())


def _canonical(message: Message) -> list[str | int]:
    # A weight of 1 is left out, so that a pair has the same key with and without it.
    turn: list[str | int] = [message.role, normalize(message.content)]
    return turn if message.weight == 1 else [*turn, message.weight]


# A string in double or single quotes, including doubled or escaped quotes; or a number. An apostrophe inside a word
# opens no string, and a digit inside a name ("t1", "city_name0") begins no number. Repetitions are possessive, so that
# unpaired quotes cause no backtracking.
_LITERAL = re.compile(
    r"""
    (?P<string> "(?:[^"\\]|\\.|"")*+" | (?<!\w)'(?:[^'\\]|\\.|'')*+'(?!\w) )
    | (?<!\w)[-+]?\d++(?:[.,:/-]\d++)*+
    """,
    re.VERBOSE | re.DOTALL,
)
_COLON = re.compile(r"\s*:(?!:)")

REPEATED = 0.5
"""Share of rows that must share their answer with another row for answers to be judged by other rows."""

MOST_CLASSES = 200
ROWS_PER_CLASS = 5


def output_template(output: str) -> str:
    """Return the output with its literals masked: ``where city = "austin"`` gives ``where city = <string>``.

    Strings in double or single quotes become ``<string>``; numbers, dates and times become ``<number>``. A string
    before a colon is a key, as in JSON, and stays (``::`` is a cast, not a colon). Case and white space are ignored.
    Free text without quotes and digits is its own template.
    """
    text = normalised(output)

    def masked(match: re.Match[str]) -> str:
        if match["string"] is None:
            return "<number>"
        return match[0] if _COLON.match(text, match.end()) else "<string>"

    return _LITERAL.sub(masked, text)


def template_groups(outputs: Mapping[str, str]) -> dict[str, str]:
    """Return the template of each output that shares it with another, as a group value by the same keys."""
    templates = {key: output_template(output) for key, output in outputs.items()}
    counts = Counter(templates.values())
    return {key: f"output_template={template}" for key, template in templates.items() if counts[template] > 1}


def find_labels(outputs: Sequence[str]) -> frozenset[str]:
    """Return the distinct outputs, stripped, if they are labels (``class_like``); else the empty set."""
    stripped = [output.strip() for output in outputs]
    return frozenset(stripped) if class_like(stripped) else frozenset()


def class_like(outputs: Sequence[str]) -> bool:
    """Return whether answers are classes: at most 200 distinct ones, with 5 or more rows each on average."""
    different = len(set(outputs))
    return 1 < different <= MOST_CLASSES and len(outputs) >= ROWS_PER_CLASS * different


def answers_repeat(outputs: Sequence[str]) -> bool:
    """Return whether at least half of the rows share their answer with another row, as with 1,000 labels."""
    counts = Counter(outputs)
    return len(counts) > 1 and sum(n for n in counts.values() if n > 1) >= REPEATED * len(outputs)
