"""An example: a conversation whose last assistant turn is the ideal output."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from tunewright.core.io import canonical_json, digest
from tunewright.core.spill import RecordFile, numbered
from tunewright.core.text import normalize

Kept = TypeVar("Kept")

Role = Literal["tools", "system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")
"""Roles that a row may name."""

INSTRUCTIONS: frozenset[Role] = frozenset({"tools", "system"})
"""Roles of messages that many conversations share, before the user's question."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call of an assistant turn."""

    name: str
    arguments: str
    """A JSON object in its canonical form."""
    id: str
    """The call's place among the conversation's calls (see :func:`call_id`), which the result names."""

    @property
    def text(self) -> str:
        """One line of JSON: ``{"name": "weather", "arguments": {"city":"Oslo"}}``."""
        return f'{{"name": {canonical_json(self.name)}, "arguments": {self.arguments}}}'


def call_id(place: int) -> str:
    """Return the id of a conversation's call by its place: nine letters and digits, as Mistral's templates require.

    The ids in files are random, so that no model could learn them.
    """
    return f"call{place:05d}"


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a conversation, or the functions declared for it (role ``tools``, always the first message)."""

    role: Role
    content: str
    """The turn's text. Role ``tools``: a JSON array of OpenAI's function declarations, in its canonical form."""
    weight: Literal[0, 1] = 1
    """0 for an assistant turn that is shown to the model but not trained (as in OpenAI's chat format)."""
    calls: tuple[ToolCall, ...] = ()
    """An assistant turn's function calls; several are parallel."""
    call_id: str | None = None
    """The call that a turn of role ``tool`` answers."""
    reasoning: str = ""
    """An assistant turn's thinking, which comes before its content; no metric and no duplicate search reads it."""

    @property
    def text(self) -> str:
        """The content, and below it one line for each call."""
        if not self.calls:
            return self.content
        lines = [self.content] if self.content else []
        return "\n".join([*lines, *(call.text for call in self.calls)])

    def as_dict(self) -> dict[str, Any]:
        """Return the turn as JSON files have it, in the form of OpenAI's API except for the role ``tools``."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            turn["reasoning_content"] = self.reasoning
        if self.weight != 1:
            turn["weight"] = self.weight
        if self.calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        if self.call_id is not None:
            turn["tool_call_id"] = self.call_id
        return turn

    @classmethod
    def from_dict(cls, turn: Mapping[str, Any]) -> Message:
        """Rebuild a turn from the JSON that this package wrote itself."""
        calls = tuple(
            ToolCall(call["function"]["name"], call["function"]["arguments"], call["id"])
            for call in turn.get("tool_calls", ())
        )
        reasoning = turn.get("reasoning_content", "")
        return cls(turn["role"], turn["content"], turn.get("weight", 1), calls, turn.get("tool_call_id"), reasoning)


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation of at least one user turn and, last, the assistant turn that is the ideal output.

    Its keys are computed once, on first use.
    """

    messages: tuple[Message, ...]
    _pair_key: str | None = field(default=None, init=False, repr=False, compare=False)
    _prompt_digest: bytes | None = field(default=None, init=False, repr=False, compare=False)
    _input_key: str | None = field(default=None, init=False, repr=False, compare=False)
    _question_key: str | None = field(default=None, init=False, repr=False, compare=False)
    _content_key: str | None = field(default=None, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Rows go to workers and back by the million: one flat tuple takes half the time of an object for each turn. The
        # worker that reads a row computes its keys.
        turns = list(map(_fields, self.messages))
        return rebuilt_example, (turns, self.pair_key, self.prompt_digest)

    def _keep(self, name: str, value: Kept) -> Kept:
        object.__setattr__(self, name, value)
        return value

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns before the ideal output."""
        return self.messages[:-1]

    @property
    def output(self) -> str:
        """The ideal output: the last turn's text, calls included."""
        return self.messages[-1].text

    @property
    def input_text(self) -> str:
        """Text of the prompt without its instructions."""
        return "\n".join(m.text for m in self.prompt if m.role not in INSTRUCTIONS)

    @property
    def instructions(self) -> tuple[str, ...]:
        """Texts of functions and system turns."""
        return tuple(m.content for m in self.prompt if m.role in INSTRUCTIONS)

    @property
    def has_reasoning(self) -> bool:
        """True if a turn has thinking."""
        return any(m.reasoning for m in self.messages)

    @property
    def trained_turns(self) -> int:
        """Number of turns that are not masked, of any role."""
        return sum(m.weight for m in self.messages)

    @property
    def pair_key(self) -> str:
        """SHA-256 of the conversation (NFC, canonical JSON): the example's identity."""
        return self._pair_key or self._keep("_pair_key", digest([_canonical(m) for m in self.messages]))

    @property
    def input_key(self) -> str:
        """SHA-256 of the prompt."""
        return self._input_key or self._keep("_input_key", digest([_canonical(m) for m in self.prompt]))

    @property
    def prompt_key(self) -> str:
        """SHA-256 of the prompt, ignoring case and white space (see ``in_conflict``)."""
        return self.prompt_digest.hex()

    @property
    def prompt_digest(self) -> bytes:
        """The 32 bytes of ``prompt_key``, which take half of the memory."""
        return self._prompt_digest or self._keep(
            "_prompt_digest", bytes.fromhex(digest([_normalised_turn(m) for m in self.prompt]))
        )

    @property
    def question_key(self) -> str:
        """SHA-256 of the prompt without instructions, ignoring case and white space."""
        return self._question_key or self._keep("_question_key", digest(self._question()))

    @property
    def content_key(self) -> str:
        """SHA-256 of the prompt as in ``question_key``, and of the output without surrounding white space."""
        return self._content_key or self._keep("_content_key", digest([*self._question(), self.output.strip()]))

    def _question(self) -> list[list[str]]:
        return [_normalised_turn(m) for m in self.prompt if m.role not in INSTRUCTIONS]

    def as_row(self) -> dict[str, Any]:
        """Return the conversation as a row of OpenAI's chat format, with declarations under ``tools``."""
        first, *others = self.messages
        if first.role != "tools":
            return {"messages": [m.as_dict() for m in self.messages]}
        return {"messages": [m.as_dict() for m in others], "tools": json.loads(first.content)}

    @staticmethod
    def from_dicts(messages: list[dict[str, Any]]) -> Example:
        """Rebuild an example from the JSON that this package wrote itself."""
        return Example(tuple(map(Message.from_dict, messages)))


def _fields(m: Message) -> tuple[Any, ...]:
    return (m.role, m.content, m.weight, m.calls, m.call_id, m.reasoning)


def rebuilt_example(turns: Sequence[Sequence[Any]], pair_key: str, prompt_digest: bytes) -> Example:
    """Return an example from another process."""
    example = Example(tuple([Message(*turn) for turn in turns]))
    object.__setattr__(example, "_pair_key", pair_key)
    object.__setattr__(example, "_prompt_digest", prompt_digest)
    return example


class _Record(NamedTuple):
    """The turns, and the texts and counts that are used often, so that no turns have to be built for them."""

    input_text: str
    output: str
    instructions: tuple[str, ...]
    trained_turns: int
    turns: list[tuple[Any, ...]]


class RowFile:
    """Turns of examples that are being added: the turns are in a temporary file, their keys in memory."""

    def __init__(self) -> None:
        self._records = RecordFile()
        self._prompts = bytearray()
        self._last = (-1, _Record("", "", (), 0, []))

    def stored(self, example: Example) -> Example:
        """Write an example's turns, and return it without them: they are read on demand."""
        turns = list(map(_fields, example.messages))
        record = (example.input_text, example.output, example.instructions, example.trained_turns, turns)
        self._prompts += example.prompt_digest
        return _Stored(self, self._records.append(pickle.dumps(record, protocol=5)), example.pair_key)

    def record(self, number: int) -> _Record:
        """Return the record of an example."""
        last, record = self._last  # a row's input and output are often read one after the other
        if number != last:
            record = _Record(*pickle.loads(self._records[number]))
            self._last = number, record
        return record

    def prompt_digest(self, number: int) -> bytes:
        """Return the digest of an example's prompt."""
        return bytes(self._prompts[32 * number : 32 * (number + 1)])


class _Stored(Example):
    """An example whose turns are in a file."""

    __slots__ = ("_file", "_number")
    _file: RowFile
    _number: int

    def __init__(self, file: RowFile, number: int, pair_key: str) -> None:
        self._keep("_file", file)
        self._keep("_number", number)
        self._keep("_pair_key", pair_key)
        for name in ("_prompt_digest", "_input_key", "_question_key", "_content_key"):
            self._keep(name, None)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Example) and self.messages == other.messages

    __hash__ = Example.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt_example, (self._file.record(self._number).turns, self.pair_key, self.prompt_digest)

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple([Message(*turn) for turn in self._file.record(self._number).turns])

    @property
    def output(self) -> str:
        return self._file.record(self._number).output

    @property
    def input_text(self) -> str:
        return self._file.record(self._number).input_text

    @property
    def instructions(self) -> tuple[str, ...]:
        return self._file.record(self._number).instructions

    @property
    def trained_turns(self) -> int:
        return self._file.record(self._number).trained_turns

    @property
    def prompt_digest(self) -> bytes:
        return self._file.prompt_digest(self._number)


def with_calls_numbered(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the turns of several conversations as one: ids of calls become their places in it."""
    done: list[Message] = []
    ids: dict[str, str] = {}
    count = 0
    for message in messages:
        for call in message.calls:
            ids[call.id] = call_id(count)
            count += 1
        if message.calls or message.call_id is not None:
            calls = tuple(replace(call, id=ids[call.id]) for call in message.calls)
            message = replace(message, calls=calls, call_id=ids[message.call_id] if message.call_id else None)
        done.append(message)
    return tuple(done)


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


def _canonical(message: Message) -> list[Any]:
    # Defaults are left out, so that a pair has the same key with and without them.
    turn: list[Any] = [message.role, normalize(message.content)]
    if message.weight != 1:
        turn.append(message.weight)
    if message.calls:
        turn.append([[call.name, normalize(call.arguments)] for call in message.calls])
    if message.reasoning:
        turn.append({"reasoning": normalize(message.reasoning)})
    return turn if message.call_id is None else [*turn, message.call_id]


def _normalised_turn(message: Message) -> list[str]:
    turn = [message.role, normalised(message.text)]
    return turn if message.call_id is None else [*turn, message.call_id]


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


def class_like(outputs: Iterable[str]) -> bool:
    """Return whether answers are classes: at most 200 distinct ones, with 5 or more rows each on average."""
    return bool(find_labels(outputs))


def find_labels(outputs: Iterable[str]) -> frozenset[str]:
    """Return the distinct outputs, stripped, if they are classes; else the empty set, as soon as there are too many."""
    different: set[str] = set()
    count = 0
    for output in outputs:
        count += 1
        different.add(output.strip())
        if len(different) > MOST_CLASSES:
            return frozenset()
    return frozenset(different) if len(different) > 1 and count >= ROWS_PER_CLASS * len(different) else frozenset()


def answers_repeat(outputs: Iterable[str]) -> bool:
    """Return whether at least half of the rows share their answer with another row, as with 1,000 labels."""
    counts = np.bincount(numbered(outputs))
    return len(counts) > 1 and int(counts[counts > 1].sum()) >= REPEATED * int(counts.sum())
