"""From one row of a file to an example, or to the reason why it is none."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from tunewright.data.examples import ROLES, Example, Message
from tunewright.recipe import DataRecipe

_SHAPES = '{"messages": [...]} or {"prompt": "...", "completion": "..."}'


class RowError(ValueError):
    """Why a row is no example; the caller knows its file and line."""


def parse_json_row(line: bytes) -> dict[str, Any]:
    """One line of JSON as an object; keys that stand twice, NaN and Infinity are faults, as in RFC 8259 and 7493.

    Raises:
        RowError: not UTF-8, not JSON, not an object.
    """
    try:
        row = json.loads(line.decode(), object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: {error.reason} at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at character {error.colno}") from None
    except RecursionError:
        raise RowError("nested too deep") from None
    except RowError:
        raise
    except ValueError as error:  # a whole number of more digits than Python reads
        raise RowError(f"not JSON that can be read: {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"a row is an object, {_SHAPES}")
    return row


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise RowError(f'the key "{double}" stands twice')
    return row


def _refuse_constant(name: str) -> None:
    raise RowError(f"{name} is not JSON")


def example_from_object(row: dict[str, Any], data: DataRecipe) -> Example:
    """The example in a chat row or a prompt/completion row.

    Raises:
        RowError: unknown, missing or mixed keys, or what ``example_from_messages`` refuses.
    """
    if set(row) == {"messages"}:
        turns = row["messages"]
        if not isinstance(turns, list) or not turns:
            raise RowError("messages must be a list of turns")
        return example_from_messages([_message(turn, i) for i, turn in enumerate(turns)], data)
    if set(row) == {"prompt", "completion"}:
        return example_from_pair(_text(row["prompt"], "prompt"), _text(row["completion"], "completion"), data)
    known = {"messages"} if "messages" in row else {"prompt", "completion"}
    unknown = [f'"{key}"' for key in row if key not in known]
    missing = [f'"{key}"' for key in sorted(known) if key not in row]
    told = [f"unknown key {', '.join(unknown)}"] if unknown else []
    told += [f"missing key {', '.join(missing)}"] if missing else []
    raise RowError(f"{' and '.join(told)}: a row is {_SHAPES}")


def _message(turn: Any, index: int) -> Message:
    name = f"messages[{index}]"
    if not isinstance(turn, dict):
        raise RowError(f"{name} must be an object with role and content")
    for key in ("role", "content"):
        if key not in turn:
            raise RowError(f'{name} has no "{key}"')
    for key in turn:
        if key in ("tool_calls", "function_call"):
            raise RowError(f'{name} has "{key}": tool calls cannot be trained; write the call as the text of a turn')
        if key not in ("role", "content", "weight"):
            raise RowError(f'{name} has the unknown key "{key}": a turn is a role, its content and perhaps a weight')
    if turn["role"] not in ROLES:
        raise RowError(f"{name}.role is {_shown(turn['role'])}; roles are {', '.join(ROLES)}")
    return Message(turn["role"], _text(turn["content"], f"{name}.content"), _weight(turn, name))


def _shown(value: Any) -> str:
    """A value as JSON has it, or, from Python, as Python does."""
    try:
        return json.dumps(value)
    except TypeError:
        return repr(value)


def _weight(turn: dict[str, Any], name: str) -> Literal[0, 1]:
    weight = turn.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise RowError(f"{name}.weight is {_shown(weight)}; it is 1 (trained) or 0 (shown, but not trained)")
    if "weight" in turn and turn["role"] != "assistant":
        raise RowError(f"{name} has a weight; only assistant turns are trained, so only they have one")
    return 1 if weight == 1 else 0


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        raise RowError(f"{name} is a list of parts, not text: join the texts of its parts")
    raise RowError(f"{name} is {'null' if value is None else type(value).__name__}, not text")


def example_from_pair(prompt: str, completion: str, data: DataRecipe) -> Example:
    """The example made of a prompt and its ideal output.

    Raises:
        RowError: what ``example_from_messages`` refuses.
    """
    return example_from_messages([Message("user", prompt), Message("assistant", completion)], data)


def example_from_messages(turns: Sequence[Message], data: DataRecipe) -> Example:
    """The example made of these turns, after the recipe's system turn if they have none of their own.

    Texts are kept in Unicode's composed form (NFC), so that equal digests mean equal text.

    Raises:
        RowError: turns out of order, an empty or too long text, half a surrogate pair.
    """
    if data.system is not None and turns[0].role != "system":
        turns = [Message("system", data.system), *turns]
    _check_order(turns)
    for turn in turns:
        if not turn.content.strip():
            what = "answer" if turn.role == "assistant" else f"{turn.role} turn"
            raise RowError(f"an empty {what}")
        if any("\ud800" <= c <= "\udfff" for c in turn.content):
            raise RowError(f"half of a surrogate pair in the {turn.role} turn: it stands for no character")
    characters = sum(len(turn.content) for turn in turns)
    if characters > data.max_characters:
        raise RowError(f"{characters:,} characters; the limit is {data.max_characters:,} (data.max_characters)")
    return Example(tuple(replace(turn, content=unicodedata.normalize("NFC", turn.content)) for turn in turns))


def _check_order(turns: Sequence[Message]) -> None:
    """System first or nowhere, then user and assistant in turn, the assistant last: what chat templates render."""
    roles = [turn.role for turn in turns]
    if "system" in roles[1:]:
        raise RowError("a system turn may only be the first")
    spoken = roles[1:] if roles[0] == "system" else roles
    for place, role in enumerate(spoken):
        if role != ("user", "assistant")[place % 2]:
            raise RowError(
                "the first turn must be the user's"
                if place == 0
                else f"two {role} turns in a row; user and assistant must alternate"
            )
    if len(spoken) < 2 or spoken[-1] != "assistant":
        raise RowError("the last turn must be the assistant's: it is the ideal output")
    if turns[-1].weight == 0:
        raise RowError("the last turn has the weight 0, but it is the ideal output: end the conversation earlier")
