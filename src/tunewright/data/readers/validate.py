"""Validation of a row: its conversation with calls and results, its groups and its metadata; faults are RowErrors."""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import islice
from typing import Any, Literal

from tunewright.config import DataConfig, Split, read_split
from tunewright.core.strict_json import parse_json
from tunewright.core.text import mark_fault, normalize
from tunewright.data.examples import ROLES, Example, Message, ToolCall, call_id
from tunewright.data.readers.mapping import Parent, names_parent, value_above
from tunewright.data.readers.row_errors import RowError, place
from tunewright.data.readers.schemas import Conversation, parse_conversation
from tunewright.data.readers.turns import Declared, RawCall, Turn, split_thinking
from tunewright.data.tools import (
    ArgumentsError,
    DeclarationError,
    SchemaLimitError,
    Toolset,
    canonical_arguments,
    read_tools,
)

REJECTED = "rejected"
"""The metadata key that keeps a row's rejected answer: its text, or its turns if it is not one turn of text."""

_MOST_NAMES = 8


def example_from_object(row: Mapping[str, Any], data: DataConfig) -> Example:
    """Return the example in a row of any supported format."""
    conversation = parse_conversation(row, data)
    return example_from_turns(conversation.turns, data, conversation.tools)


def groups_of(row: Mapping[str, Any], data: DataConfig, parent: Parent | None = None) -> dict[str, str]:
    """Return the row's values of data.group_by, as text; null and empty values are left out."""
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


def split_of(row: Mapping[str, Any], data: DataConfig, of_file: Split | None) -> Split | None:
    """Return the split that the row's column, or else its file, gives it; None: it is drawn."""
    column = data.split_column
    if column is None or (column not in row and of_file is not None):
        return of_file
    if column not in row:
        raise RowError("E210", f'missing key "{column}" of data.split_column')
    value, name = row[column], place((column,))
    if value is None or not str(value).strip():
        raise RowError("E210", f"{name} is empty (data.split_column)", (column,))
    try:
        split = read_split(value)
    except ValueError as error:
        reason = f"{name} is {json.dumps(value, default=str)}: {str(error).lower()}"
        raise RowError("E210", reason, (column,)) from None
    if of_file not in (None, split):
        raise RowError("E211", f"{name} is {split}, but the file is given to {of_file}", (column,))
    return split


def example_from_turns(turns: Sequence[Turn], data: DataConfig, tools: Declared | None = None) -> Example:
    """Return the example with these turns, preceded by the config's system turn if they have none.

    Texts are normalised to NFC, so that equal digests mean equal text.
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
        try:
            (message.text + message.reasoning).encode()
        except UnicodeEncodeError:
            reason = f"half of a surrogate pair in the {message.role} turn, which is not a character"
            raise RowError("E402", reason, turn.content_path) from None
    characters = sum(len(message.text) + len(message.reasoning) for message in messages)
    if characters > data.max_characters:
        raise RowError("E403", f"{characters:,} characters (limit {data.max_characters:,}, data.max_characters)")
    for message, turn in zip(messages, turns, strict=True):
        if fault := mark_fault(message.text) or mark_fault(message.reasoning):
            raise RowError("E408", f"{fault} of the {message.role} turn", turn.content_path)
    return Example(
        tuple(
            message
            if (content := normalize(message.content)) == message.content and not message.reasoning
            else replace(message, content=content, reasoning=normalize(message.reasoning))
            for message in messages
        )
    )


def _message(turn: Turn, tools: Toolset | None) -> Message:
    # Nearly all of a million turns are valid, so texts are formatted only for faults.
    if turn.role not in ROLES:
        role = json.dumps(turn.role, default=str)
        raise RowError("E304", f"{place(turn.path)}.role is {role} (expected {', '.join(ROLES)})", turn.path)
    for key in turn.rest:
        if key == "name":
            reason = f'{place(turn.path)} has the unknown key "name", which chat templates do not render'
            raise RowError("E309", reason, (*turn.path, key))
        if key != "weight":
            known = "role, content and optionally weight or reasoning_content"
            reason = f'{place(turn.path)} has the unknown key "{key}" (expected {known})'
            raise RowError("E303", reason, (*turn.path, key))
    if not isinstance(turn.content, str):
        raise _not_text(turn)
    calls = checked_calls(turn, tools) if turn.calls else ()
    content, reasoning = turn.content, (turn.reasoning or "").strip()
    if turn.role == "assistant":
        try:
            thought = split_thinking(content)
        except ValueError as error:
            raise RowError("E310", f"{place(turn.content_path)} {error}", turn.content_path) from None
        if thought is not None and reasoning:
            reason = f"{place(turn.path)} has its thinking both before the answer and under a key"
            raise RowError("E310", reason, turn.content_path)
        reasoning, content = thought or (reasoning, content)
    return Message(turn.role, content, _weight(turn) if "weight" in turn.rest else 1, calls, reasoning=reasoning)


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


def declared_tools(declared: Declared) -> Toolset:
    """Return the functions that a row declares."""
    try:
        return read_tools(declared.value)
    except DeclarationError as error:
        code = "E502" if isinstance(error, SchemaLimitError) else "E501"
        path = declared.path if isinstance(declared.value, str) else (*declared.path, *error.path)
        raise RowError(code, f"{place(path)}: {error}", path) from None


def checked_calls(turn: Turn, tools: Toolset | None) -> tuple[ToolCall, ...]:
    """Return a turn's calls with canonical arguments and the file's ids."""
    calls = []
    for call in turn.calls:
        if tools is None:
            raise RowError(
                "E509", f'{place(call.path)} calls "{call.name}", but the row declares no functions', call.path
            )
        if call.name not in tools.schemas:
            known = ", ".join(f'"{name}"' for name in list(tools.schemas)[:_MOST_NAMES])
            raise RowError("E503", f'{place(call.path)} calls "{call.name}" (declared: {known})', call.path)
        at = call.arguments_path
        try:
            text, arguments = canonical_arguments(call.arguments)
        except ArgumentsError as error:
            raise RowError("E504", f'arguments of "{call.name}" in {place(at)}: {error}', at) from None
        try:
            tools.check(call.name, arguments)
        except ArgumentsError as error:
            raise RowError("E505", f'call of "{call.name}" in {place(at)}: {error}', at) from None
        except SchemaLimitError as error:
            raise RowError("E502", f'call of "{call.name}" in {place(at)}: {error}', at) from None
        calls.append(ToolCall(call.name, text, call.id))
    return tuple(calls)


def edited_answer(example: Example, text: str) -> Message:
    """Return the example's last turn with another text, which may end with calls, one line of JSON each.

    This is the inverse of ``Message.text``. In a conversation without functions the text stays text. Invalid calls are
    RowErrors, as in a row.
    """
    last = example.messages[-1]
    if example.messages[0].role != "tools":
        return replace(last, content=text)
    lines = text.split("\n")
    calls: list[RawCall] = []
    while lines:
        call = _call_of_line(lines[-1])
        if call is None and lines[-1].strip():
            break
        lines.pop()
        if call is not None:
            calls.append(call)
    if not calls:
        return replace(last, content=text, calls=())
    turn = Turn("assistant", "\n".join(lines), (), (), calls=tuple(reversed(calls)))
    first = sum(len(message.calls) for message in example.prompt)
    made = checked_calls(turn, read_tools(example.messages[0].content))
    numbered = tuple(replace(call, id=call_id(first + n)) for n, call in enumerate(made))
    return replace(last, content=turn.content if turn.content.strip() else "", calls=numbered)


def _call_of_line(line: str) -> RawCall | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"} or not isinstance(value["name"], str):
        return None
    return RawCall(value["name"], value["arguments"], None, ("answer",), ("answer",))


def check_order(messages: Sequence[Message], turns: Sequence[Turn]) -> None:
    """Check the order that chat templates render: optional system, then user and assistant in turn, assistant last.

    Results follow the assistant turn with their calls, and an assistant turn follows the results.
    """
    start = 1 if messages[0].role == "system" else 0
    for i in range(start, len(messages)):
        if messages[i].role == "system":
            raise RowError("E404", "a system turn must be the first turn", turns[i].path)
    before = None
    for message, turn in zip(messages[start:], turns[start:], strict=True):
        role = message.role
        if before is None and role != "user":
            raise RowError("E405", "the first turn must be the user's", turn.path)
        if before is not None and role == before.role and role != "tool" and not before.calls:
            reason = f"two {role} turns in a row (user and assistant must alternate)"
            raise RowError("E406", reason, turn.path)
        if before is not None and before.role == "tool" and role == "user":
            raise RowError("E513", f"{place(turn.path)} is a user turn right after a result", turn.path)
        before = message
    if len(messages) - start < 2 or messages[-1].role != "assistant":
        raise RowError("E407", "the last turn must be the assistant's, which is the ideal output", turns[-1].path)
    if messages[-1].weight == 0:
        reason = "the last turn has the weight 0, but it is the ideal output"
        raise RowError("E308", reason, (*turns[-1].path, "weight"))


def linked(messages: Sequence[Message], turns: Sequence[Turn]) -> list[Message]:
    """Return the messages with the ids of calls and results replaced by the calls' places."""
    done: list[Message] = []
    ids: dict[str, str] = {}
    waiting: dict[str, ToolCall] = {}
    for message, turn in zip(messages, turns, strict=True):
        if waiting and message.role != "tool":
            names = ", ".join(f'"{call.name}" ({given})' for given, call in islice(waiting.items(), _MOST_NAMES))
            raise RowError("E508", f"{place(turn.path)} follows calls without a result: {names}", turn.path)
        if message.role == "tool":
            done.append(replace(message, call_id=ids[_close_call(turn, ids, waiting)]))
            continue
        calls = []
        for call, raw in zip(message.calls, turn.calls, strict=True):
            if not isinstance(call.id, str):
                raise RowError("E512", f"{place(raw.path)} has no id (a text)", raw.path)
            if call.id in ids:
                raise RowError("E507", f'{place(raw.path)} repeats the id "{call.id}"', raw.path)
            ids[call.id] = call_id(len(ids))
            waiting[call.id] = call
            calls.append(replace(call, id=ids[call.id]))
        done.append(replace(message, calls=tuple(calls)) if calls else message)
        if turn is turns[-1]:
            waiting.clear()
    return done


def _close_call(turn: Turn, ids: dict[str, str], waiting: dict[str, ToolCall]) -> str:
    """Return the id of the open call that a result answers, and close it."""
    given = turn.call_id
    if not isinstance(given, str):
        raise RowError("E512", f"{place(turn.path)} has no tool_call_id (a text)", turn.path)
    if given not in waiting:
        reason = "answers a call that has a result" if given in ids else "answers no call"
        raise RowError("E506", f'{place(turn.path)} {reason}: tool_call_id "{given}"', turn.path)
    call = waiting.pop(given)
    if turn.name not in (None, "", call.name):
        raise RowError(
            "E506", f'{place(turn.path)} names "{turn.name}", but call "{given}" is of "{call.name}"', turn.path
        )
    return given


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
    """
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    if (rejected := conversation.rejected) is not None:
        messages = example_from_turns(rejected.turns, data, rejected.tools).messages
        asked = max(i for i, message in enumerate(messages) if message.role == "user")
        kept[REJECTED] = rejected_value(messages[asked + 1 :])
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


def _json_value(value: Any) -> Any:
    """Return the value in a JSON form; values without a JSON form raise TypeError or ValueError when serialised."""
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


def rejected_value(messages: Sequence[Message]) -> str | list[dict[str, Any]]:
    """Return the turns of a rejected answer as metadata keeps them: as ``REJECTED``."""
    turns = [message.as_dict() for message in messages]
    alone = len(turns) == 1 and turns[0].keys() == {"role", "content"}
    return str(turns[0]["content"]) if alone else turns


def rejected_messages(value: Any) -> tuple[Message, ...]:
    """Return the turns of a rejected answer from the metadata."""
    return (Message("assistant", value),) if isinstance(value, str) else tuple(map(Message.from_dict, value))
