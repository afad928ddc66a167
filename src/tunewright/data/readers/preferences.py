"""Rows with a preferred and a rejected answer to one prompt, as chat rows: one for each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.data.examples import Message
from tunewright.data.readers.row_errors import JsonPath, RowError, place

OUTPUT_KEYS = frozenset({"preferred_output", "non_preferred_output"})
PAIR_KEYS = frozenset({"chosen", "rejected"})
PREFERENCE_KEYS = OUTPUT_KEYS | PAIR_KEYS
REJECTED = "rejected"
"""The metadata key that keeps a row's rejected answer: its text, or its turns if it is not one turn of text."""

_BESIDES = ("tools", "parallel_tool_calls")  # keys of a chat row that both formats have next to the turns


@dataclass(frozen=True)
class Place:
    """The origin of a chat row's turn; a ``text`` has no keys of its own there."""

    path: JsonPath
    text: bool = False

    def of(self, path: JsonPath) -> JsonPath:
        """Return the place of ``("messages", 2, "content")`` in the row."""
        return self.path if self.text else (*self.path, *path[2:])


@dataclass(frozen=True)
class Side:
    """The prompt with one of the two answers, as a chat row, and the place of each of its turns."""

    row: dict[str, Any]
    places: tuple[Place, ...]
    above: JsonPath = ()
    """The place of the object with the row's other keys."""

    def located(self, path: JsonPath) -> JsonPath:
        """Return a place in the chat row as one in the original row."""
        if len(path) > 1 and path[0] == "messages" and isinstance(path[1], int) and path[1] < len(self.places):
            return self.places[path[1]].of(path)
        return (*self.above, *path)

    def located_error(self, error: RowError) -> RowError:
        """Return an error of the chat row as one of the original row."""
        path = self.located(error.path)
        reason = str(error).replace(place(error.path), place(path)) if error.path else str(error)
        return RowError(error.code, reason, path)


@dataclass(frozen=True)
class Preference:
    """A row with two answers: its format, the reason for choosing it, and the keys that it uses."""

    kind: str
    reason: str
    keys: frozenset[str]
    preferred: Side
    rejected: Side


def rejected_value(messages: Sequence[Message]) -> str | list[dict[str, Any]]:
    """Return the turns of a rejected answer as metadata keeps them: as ``REJECTED``."""
    turns = [message.as_dict() for message in messages]
    alone = len(turns) == 1 and turns[0].keys() == {"role", "content"}
    return str(turns[0]["content"]) if alone else turns


def rejected_messages(value: Any) -> tuple[Message, ...]:
    """Return the turns of a rejected answer from the metadata."""
    return (Message("assistant", value),) if isinstance(value, str) else tuple(map(Message.from_dict, value))


_Turns = list[tuple[Any, Place]]


def parse_preference(row: Mapping[str, Any]) -> Preference:
    """Return both sides of a row that has one of ``PREFERENCE_KEYS``.

    Formats: OpenAI's preference fine-tuning and Together's (input, preferred_output, non_preferred_output); TRL's
    preference datasets (prompt, chosen, rejected), as texts or as lists of turns, also without a prompt.

    Raises:
        RowError: a missing answer or prompt.
    """
    openai = not OUTPUT_KEYS.isdisjoint(row)
    keys = ("preferred_output", "non_preferred_output") if openai else ("chosen", "rejected")
    for key in keys:
        if row.get(key) in (None, "", []):
            raise RowError("E209", f'the row has no "{key}"', (key,) if key in row else ())
    if openai:
        prompt, besides = _input(row)
        answers = [_turns(row[key], (key,)) for key in keys]
        used = frozenset({"input", *keys})
        kind, reason = "preference pairs (OpenAI, Together)", "rows have preferred_output and non_preferred_output"
    else:
        besides = {key: row[key] for key in ("system", *_BESIDES) if row.get(key) not in (None, "")}
        answers = [_turns(row[key], (key,)) for key in keys]
        prompt, answers = _shared_prompt(row, answers)
        used = frozenset({"prompt", "system", *_BESIDES, *keys})
        kind, reason = "preference pairs", "rows have chosen and rejected"
    for turn, where in (*answers[0], *answers[1]):
        if isinstance(turn, dict) and turn.get("role") == "user":
            raise RowError("E209", f"{place(where.path)} is a user turn, in which the answers differ", where.path)
    above = ("input",) if openai else ()
    preferred, rejected = (_side(prompt + answer, besides, above) for answer in answers)
    if preferred.row == rejected.row:
        raise RowError("E209", "both answers are equal", (keys[1],))
    return Preference(kind, reason, used, preferred, rejected)


def _side(turns: _Turns, besides: Mapping[str, Any], above: JsonPath) -> Side:
    return Side({**besides, "messages": [turn for turn, _ in turns]}, tuple(place for _, place in turns), above)


def _input(row: Mapping[str, Any]) -> tuple[_Turns, dict[str, Any]]:
    given = row.get("input")
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise RowError("E209", "input must be an object with messages", ("input",) if "input" in row else ())
    other = [key for key in given if key not in ("messages", *_BESIDES)]
    if other:
        raise RowError("E201", f'unknown key "{other[0]}" of input', ("input", other[0]))
    besides = {key: given[key] for key in _BESIDES if key in given}
    return _turns(given["messages"], ("input", "messages")), besides


def _turns(value: Any, path: JsonPath) -> _Turns:
    if isinstance(value, str):
        return [({"role": "assistant", "content": value}, Place(path, text=True))]
    if isinstance(value, list):
        return [(turn, Place((*path, i))) for i, turn in enumerate(value)]
    return [(value, Place(path))]


def _shared_prompt(row: Mapping[str, Any], answers: Sequence[_Turns]) -> tuple[_Turns, list[_Turns]]:
    """Return the prompt, and the answers without the turns of the prompt that they repeat."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return _turns(prompt, ("prompt",)), list(answers)
    firsts = [row[key][0] if isinstance(row[key], list) and row[key] else None for key in ("chosen", "rejected")]
    if not all(isinstance(first, dict) and first.get("role") != "assistant" for first in firsts):
        if prompt in (None, ""):
            raise RowError("E209", 'the row has no "prompt", and its answers are not conversations')
        return [({"role": "user", "content": prompt}, Place(("prompt",), text=True))], list(answers)
    turns = [[turn for turn, _ in answer] for answer in answers]
    most = min(map(len, turns)) - 1
    shared = next((i for i in range(most) if turns[0][i] != turns[1][i]), most)
    asked = [turn.get("content") for turn in turns[0][:shared] if isinstance(turn, dict)]
    if not shared or (prompt not in (None, "") and prompt not in asked):
        other = "the prompt" if shared else "each other"
        raise RowError("E209", f"chosen and rejected do not begin with the same turns as {other}", ("rejected",))
    return answers[0][:shared], [answer[shared:] for answer in answers]
