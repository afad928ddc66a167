"""Validation of a row: example, groups and metadata, or a RowError."""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, Literal

from tunewright.config import DataConfig
from tunewright.core.strict_json import ConstantError, DuplicateKeyError, strict_decoder
from tunewright.core.text import mark_fault, normalize
from tunewright.data.examples import ROLES, Example, Message
from tunewright.data.readers.calls import check_order, checked_calls, declared_tools, linked
from tunewright.data.readers.mapping import Parent, names_parent, value_above
from tunewright.data.readers.preferences import REJECTED, rejected_value
from tunewright.data.readers.row_errors import RowError, place
from tunewright.data.readers.schemas import ROW_SHAPES, Conversation, parse_conversation
from tunewright.data.readers.turns import Declared, Turn
from tunewright.data.tools import Toolset

__all__ = ["RowError", "example_from_object", "example_from_turns", "groups_of", "parse_json_row"]


def parse_json_row(line: bytes | str) -> dict[str, Any]:
    """Return a line of JSON as an object; duplicate keys, NaN and Infinity are faults, as in RFC 8259 and 7493.

    In a ``str``, bytes that are not UTF-8 may be lone surrogates, as from Python's surrogateescape.

    Raises:
        RowError: not UTF-8, not JSON, not an object.
    """
    try:
        text = line.decode() if isinstance(line, bytes) else line
        if not text.isascii():
            text.encode("utf-8", "surrogateescape").decode()
        row = strict_decoder.decode(text)
    except UnicodeError as error:
        where = (
            f": {error.reason} at byte {error.start + 1} of the line" if isinstance(error, UnicodeDecodeError) else ""
        )
        raise RowError("E101", f"not UTF-8{where}") from None
    except json.JSONDecodeError as error:
        raise RowError("E102", f"not JSON: {error.msg.removesuffix(' at')} at character {error.colno}") from None
    except RecursionError:
        raise RowError("E106", "nested too deep") from None
    except (DuplicateKeyError, ConstantError) as error:
        raise strict_fault(error) from None
    except ValueError as error:  # a whole number of more digits than Python reads
        raise RowError("E102", f"unreadable JSON: {error}") from None
    return row_object(row)


def row_object(value: Any) -> dict[str, Any]:
    """Return the value, which must be an object.

    Raises:
        RowError: it is something else.
    """
    if not isinstance(value, dict):
        raise RowError("E103", f"a row is an object, {ROW_SHAPES}")
    return value


def strict_fault(error: DuplicateKeyError | ConstantError) -> RowError:
    """Return the error as a fault of a row."""
    return RowError("E104" if isinstance(error, DuplicateKeyError) else "E105", str(error))


def example_from_object(row: Mapping[str, Any], data: DataConfig) -> Example:
    """Return the example in a row of any supported format.

    Raises:
        RowError: unknown, missing or mixed keys, or the errors of ``example_from_turns``.
    """
    conversation = parse_conversation(row, data)
    return example_from_turns(conversation.turns, data, conversation.tools)


def groups_of(row: Mapping[str, Any], data: DataConfig, parent: Parent | None = None) -> dict[str, str]:
    """Return the row's values of data.group_by, as text; null and empty values are left out.

    Args:
        parent: the objects above the row in its document, for groups from there.

    Raises:
        RowError: the row lacks a key of data.group_by, or its value is a list, an object or refused text.
    """
    groups = {}
    for key in data.group_by:
        above = names_parent(key, data)
        if not above and key not in row:
            raise RowError("E205", f'missing key "{key}" of data.group_by')
        value = value_above(key, parent) if above else row[key]
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # tables write whole numbers as 12.0 if the column has gaps
        if isinstance(value, bool | dict | list | bytes):
            path = () if above else (key,)
            what = key if above else place(path)
            raise RowError("E205", f"{what} is {type(value).__name__}, not text or a number", path)
        if value not in (None, ""):
            text = str(value)
            if fault := mark_fault(text):
                path = () if above else (key,)
                raise RowError("E408", f"{fault} of {key if above else place(path)}", path)
            groups[key] = normalize(text)
    return groups


def example_from_turns(turns: Sequence[Turn], data: DataConfig, tools: Declared | None = None) -> Example:
    """Return the example with these turns, preceded by the config's system turn if they have none.

    Texts are normalised to NFC, so that equal digests mean equal text.

    Args:
        tools: the declarations of the row's functions.

    Raises:
        RowError: turns out of order, an unknown role or key, an empty or overlong text, half a surrogate pair, too
            many combining marks in a row, or invalid declarations, calls or results.
    """
    declared = None if tools is None else declared_tools(tools)
    messages = [_message(turn, declared) for turn in turns]
    if data.system_prompt is not None and messages[0].role != "system":
        messages.insert(0, Message("system", data.system_prompt))
        turns = [Turn("system", data.system_prompt, (), ()), *turns]
    check_order(messages, turns)
    messages = linked(messages, turns)
    for message, turn in zip(messages, turns, strict=True):
        if not message.content.strip() and not message.calls and message.role != "tool":
            what = "answer" if message.role == "assistant" else f"{message.role} turn"
            raise RowError("E401", f"an empty {what}", turn.content_path)
    if tools is not None and declared is not None:
        messages.insert(0, Message("tools", declared.text))
        turns = [Turn("tools", declared.text, tools.path, tools.path), *turns]
    for message, turn in zip(messages, turns, strict=True):
        if _has_half_pair(message.text):
            reason = f"half of a surrogate pair in the {message.role} turn, which is not a character"
            raise RowError("E402", reason, turn.content_path)
    characters = sum(len(message.text) for message in messages)
    if characters > data.max_characters:
        raise RowError("E403", f"{characters:,} characters (limit {data.max_characters:,}, data.max_characters)")
    for message, turn in zip(messages, turns, strict=True):
        if fault := mark_fault(message.text):
            raise RowError("E408", f"{fault} of the {message.role} turn", turn.content_path)
    return Example(tuple(map(_normalised, messages)))


def _normalised(message: Message) -> Message:
    content = normalize(message.content)
    return message if content == message.content else replace(message, content=content)


def _has_half_pair(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _message(turn: Turn, tools: Toolset | None) -> Message:
    # Nearly all of a million turns are valid, so texts are formatted only for faults.
    if turn.role not in ROLES:
        role = json.dumps(turn.role, default=str)
        raise RowError("E304", f"{place(turn.path)}.role is {role} (expected {', '.join(ROLES)})", turn.path)
    if turn.rest:
        _check_rest(turn)
    if not isinstance(turn.content, str):
        raise _not_text(turn)
    calls = checked_calls(turn, tools) if turn.calls else ()
    return Message(turn.role, turn.content, _weight(turn) if "weight" in turn.rest else 1, calls)


def _check_rest(turn: Turn) -> None:
    name = place(turn.path)
    for key in turn.rest:
        path = (*turn.path, key)
        if key == "name":
            reason = f'{name} has the unknown key "name", which chat templates do not render'
            raise RowError("E309", reason, path)
        if key != "weight":
            reason = f'{name} has the unknown key "{key}" (expected role, content and optionally weight)'
            raise RowError("E303", reason, path)


def _weight(turn: Turn) -> Literal[0, 1]:
    weight, name, path = turn.rest["weight"], place(turn.path), (*turn.path, "weight")
    if weight not in (0, 1) or isinstance(weight, bool):
        value = json.dumps(weight, default=str)
        raise RowError("E307", f"{name}.weight is {value} (expected 1, trained, or 0, not trained)", path)
    if turn.role != "assistant":
        raise RowError("E307", f"{name} has a weight, but only assistant turns are trained", path)
    return 1 if weight == 1 else 0


def _not_text(turn: Turn) -> RowError:
    value, name = turn.content, place(turn.content_path)
    if isinstance(value, list) and any(isinstance(p, dict) and "image" in str(p.get("type")) for p in value):
        reason = f"images are not supported: {name} contains one"
        return RowError("E208", reason, turn.content_path)
    if isinstance(value, list):
        return RowError("E306", f"{name} is a list of parts that are not all text", turn.content_path)
    kind = "null" if value is None else type(value).__name__
    return RowError("E305", f"{name} is {kind}, not text", turn.content_path)


MOST_CHARACTERS = 1_000
"""Maximum length of a metadata value as JSON, since longer ones would make a version's files large in git."""

_MOST_COUNTED_KEYS = 12  # named in a message
_ABSENT = (None, "")  # tables have empty cells or null for keys that are absent in JSON


def metadata_of(
    row: Mapping[str, Any], conversation: Conversation, data: DataConfig
) -> tuple[dict[str, Any], list[str]]:
    """Return the row's unused keys with JSON values, and the keys whose values cannot be kept.

    Null and empty values are left out. Values longer than ``MOST_CHARACTERS``, or without a JSON form, are not kept.
    ``REJECTED`` is the rejected answer of a preference row.

    Raises:
        RowError: a rejected answer that is invalid, as for ``example_from_turns``, or a completion that is labelled as
            undesirable.
    """
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    if conversation.rejected is not None:
        kept[REJECTED] = _rejected(conversation.rejected, data)
    if row.keys() <= conversation.keys:
        return kept, left_out
    for key, given in row.items():
        if key in conversation.keys or key in data.group_by or key in data.drop_columns:
            continue
        if key == "label" and given is False and "completion" in row:  # trl's unpaired preferences, which KTO takes
            reason = "label is false, so the completion is an undesirable answer and not an ideal output"
            raise RowError("E209", reason, ("label",))
        try:
            value = _json_value(given)
            text = json.dumps({key: value}, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (ValueError, TypeError, RecursionError):
            left_out.append(key)
            continue
        if value in _ABSENT:
            continue
        if len(text) > (data.max_characters if key == REJECTED else MOST_CHARACTERS):
            left_out.append(key)
        else:
            kept[key] = value
    return kept, left_out


def _rejected(conversation: Conversation, data: DataConfig) -> str | list[dict[str, Any]]:
    """Return the rejected answer: its text, or its turns after the last one of the user if there are several."""
    messages = example_from_turns(conversation.turns, data, conversation.tools).messages
    asked = max(i for i, message in enumerate(messages) if message.role == "user")
    return rejected_value(messages[asked + 1 :])


def _json_value(value: Any) -> Any:
    """Return the value in a JSON form; values without one raise TypeError or ValueError when serialised."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, float) and math.isnan(value):
        return None  # tables use NaN for missing numbers
    if isinstance(value, Mapping):
        return {key: _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    return value


def counted(keys: Counter[str]) -> str:
    """Return keys with their numbers of rows: ``id (8,776 rows), source (12)``."""
    unit = " rows"
    parts = []
    for key, count in keys.most_common(_MOST_COUNTED_KEYS):
        parts.append(f"{key} ({count:,}{unit if count != 1 else ' row'})")
        unit = ""
    more = f" and {len(keys) - _MOST_COUNTED_KEYS:,} more keys" if len(keys) > _MOST_COUNTED_KEYS else ""
    return ", ".join(parts) + more


def texts_of(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Yield all texts and numbers in a metadata value, and the keys of its objects, for a scan for secrets.

    Each comes with the nearest key above it, or ``name``, since a password is often recognised only by its key.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield "", str(key)
            yield from texts_of(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner, name)
    elif not isinstance(value, bool):
        yield name, str(value)
