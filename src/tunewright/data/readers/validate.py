"""From one row of a file to an example, or to the reason why it is none."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tunewright.config import DataConfig
from tunewright.data.examples import ROLES, Example, Message
from tunewright.data.readers.parents import Parent, names_parent, value_above
from tunewright.data.readers.row_errors import RowError, place
from tunewright.data.readers.schemas import ROW_SHAPES, Turn, conversation_of

__all__ = ["RowError", "example_from_object", "example_from_turns", "groups_of", "json_decoder", "parse_json_row"]


def parse_json_row(line: bytes | str) -> dict[str, Any]:
    """One line of JSON as an object; keys that stand twice, NaN and Infinity are faults, as in RFC 8259 and 7493.

    A byte that is no UTF-8 may stand in a ``str`` as Python's surrogateescape writes it.

    Raises:
        RowError: not UTF-8, not JSON, not an object.
    """
    try:
        text = line.decode() if isinstance(line, bytes) else line
        if not text.isascii():
            text.encode("utf-8", "surrogateescape").decode()
        row = json_decoder.decode(text)
    except UnicodeError as error:
        where = (
            f": {error.reason} at byte {error.start + 1} of the line" if isinstance(error, UnicodeDecodeError) else ""
        )
        raise RowError("E101", f"not UTF-8{where}") from None
    except json.JSONDecodeError as error:
        raise RowError("E102", f"not JSON: {error.msg.removesuffix(' at')} at character {error.colno}") from None
    except RecursionError:
        raise RowError("E106", "nested too deep") from None
    except RowError:
        raise
    except ValueError as error:  # a whole number of more digits than Python reads
        raise RowError("E102", f"not JSON that can be read: {error}") from None
    return row_object(row)


def row_object(value: Any) -> dict[str, Any]:
    """Return the value, if it is an object.

    Raises:
        RowError: it is something else.
    """
    if not isinstance(value, dict):
        raise RowError("E103", f"a row is an object, {ROW_SHAPES}")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise RowError("E104", f'the key "{double}" stands twice')
    return row


def _refuse_constant(name: str) -> None:
    raise RowError("E105", f"{name} is not JSON")


json_decoder = json.JSONDecoder(object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
"""Raises RowError for keys that stand twice, NaN and Infinity."""


def example_from_object(row: Mapping[str, Any], data: DataConfig) -> Example:
    """Return the example in a row of any kind that ``conversation_of`` knows.

    Raises:
        RowError: unknown, missing or mixed keys, or what ``example_from_turns`` refuses.
    """
    return example_from_turns(conversation_of(row, data).turns, data)


def groups_of(row: Mapping[str, Any], data: DataConfig, parent: Parent | None = None) -> dict[str, str]:
    """Return the values of the config's data.group_by in a row, as text; a null or empty value is no group.

    Args:
        parent: the objects above the row in its document, for groups that stand there.

    Raises:
        RowError: a key of data.group_by that the row does not have, or a list or an object in it.
    """
    groups = {}
    for key in data.group_by:
        above = names_parent(key, data)
        if not above and key not in row:
            raise RowError("E205", f'missing key "{key}", which data.group_by names')
        value = value_above(key, parent) if above else row[key]
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # tables write whole numbers as 12.0 where the column has gaps
        if isinstance(value, bool | dict | list | bytes):
            path = () if above else (key,)
            what = key if above else place(path)
            raise RowError("E205", f"{what} is {type(value).__name__}, not text or a number", path)
        if value not in (None, ""):
            groups[key] = unicodedata.normalize("NFC", str(value))
    return groups


def example_from_turns(turns: Sequence[Turn], data: DataConfig) -> Example:
    """Return the example made of these turns, after the config's system turn if they have none of their own.

    Texts are kept in Unicode's composed form (NFC), so that equal digests mean equal text.

    Raises:
        RowError: turns out of order, an unknown role or key, an empty or too long text, half a surrogate pair.
    """
    messages = [_message(turn) for turn in turns]
    if data.system_prompt is not None and messages[0].role != "system":
        messages.insert(0, Message("system", data.system_prompt))
        turns = [Turn("system", data.system_prompt, (), ()), *turns]
    _check_order(messages, turns)
    for message, turn in zip(messages, turns, strict=True):
        if not message.content.strip():
            what = "answer" if message.role == "assistant" else f"{message.role} turn"
            raise RowError("E401", f"an empty {what}", turn.content_path)
        if _has_half_pair(message.content):
            reason = f"half of a surrogate pair in the {message.role} turn: it stands for no character"
            raise RowError("E402", reason, turn.content_path)
    characters = sum(len(message.content) for message in messages)
    if characters > data.max_characters:
        raise RowError("E403", f"{characters:,} characters; the limit is {data.max_characters:,} (data.max_characters)")
    return Example(tuple(Message(m.role, unicodedata.normalize("NFC", m.content), m.weight) for m in messages))


def _has_half_pair(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _message(turn: Turn) -> Message:
    # Of a million turns nearly all are right: nothing is put into words before something is wrong.
    if turn.rest:
        _check_rest(turn)
    if turn.role not in ROLES:
        role = json.dumps(turn.role, default=str)
        raise RowError("E304", f"{place(turn.path)}.role is {role}; roles are {', '.join(ROLES)}", turn.path)
    if not isinstance(turn.content, str):
        raise _not_text(turn)
    return Message(turn.role, turn.content, _weight(turn) if "weight" in turn.rest else 1)


def _check_rest(turn: Turn) -> None:
    name = place(turn.path)
    for key in turn.rest:
        path = (*turn.path, key)
        if key in ("tool_calls", "function_call"):
            reason = f'{name} has "{key}": tool calls cannot be trained; write the call as the text of a turn'
            raise RowError("E204", reason, path)
        if key == "name":
            reason = f'{name} has the unknown key "name": chat templates do not write who is speaking'
            raise RowError("E309", reason, path)
        if key != "weight":
            reason = f'{name} has the unknown key "{key}": a turn is a role, its content and perhaps a weight'
            raise RowError("E303", reason, path)


def _weight(turn: Turn) -> Literal[0, 1]:
    weight, name, path = turn.rest["weight"], place(turn.path), (*turn.path, "weight")
    if weight not in (0, 1) or isinstance(weight, bool):
        told = json.dumps(weight, default=str)
        raise RowError("E307", f"{name}.weight is {told}; it is 1 (trained) or 0 (shown, but not trained)", path)
    if turn.role != "assistant":
        raise RowError("E307", f"{name} has a weight; only assistant turns are trained, so only they have one", path)
    return 1 if weight == 1 else 0


def _not_text(turn: Turn) -> RowError:
    value, name = turn.content, place(turn.content_path)
    if isinstance(value, list) and any(isinstance(p, dict) and "image" in str(p.get("type")) for p in value):
        reason = f"images are not supported: {name} holds one; take it out, or leave the example out"
        return RowError("E208", reason, turn.content_path)
    if isinstance(value, list):
        return RowError("E306", f"{name} is a list of parts, not text: join the texts of its parts", turn.content_path)
    kind = "null" if value is None else type(value).__name__
    return RowError("E305", f"{name} is {kind}, not text", turn.content_path)


def _check_order(messages: Sequence[Message], turns: Sequence[Turn]) -> None:
    """System first or nowhere, then user and assistant in turn, the assistant last: what chat templates render."""
    start = 1 if messages[0].role == "system" else 0
    for i in range(start, len(messages)):
        if messages[i].role == "system":
            raise RowError("E404", "a system turn may only be the first", turns[i].path)
    for i in range(start, len(messages)):
        role = messages[i].role
        if role != ("user", "assistant")[(i - start) % 2]:
            if i == start:
                raise RowError("E405", "the first turn must be the user's", turns[i].path)
            reason = f"two {role} turns in a row; user and assistant must alternate"
            raise RowError("E406", reason, turns[i].path)
    if len(messages) - start < 2 or messages[-1].role != "assistant":
        raise RowError("E407", "the last turn must be the assistant's: it is the ideal output", turns[-1].path)
    if messages[-1].weight == 0:
        reason = "the last turn has the weight 0, but it is the ideal output: end the conversation earlier"
        raise RowError("E308", reason, (*turns[-1].path, "weight"))
