"""Checks of a conversation's order, calls and results, and the ids by place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from tunewright.core.strict_json import parse_json
from tunewright.data.examples import Example, Message, ToolCall, call_id
from tunewright.data.readers.row_errors import RowError, place
from tunewright.data.readers.turns import Declared, RawCall, Turn
from tunewright.data.tool_schemas import ArgumentsError, DeclarationError, SchemaLimitError
from tunewright.data.tools import Toolset, canonical_arguments, read_tools


def declared_tools(declared: Declared) -> Toolset:
    """Return the functions that a row declares.

    Raises:
        RowError: an invalid declaration, or a schema over a limit.
    """
    try:
        return read_tools(declared.value)
    except DeclarationError as error:
        code = "E502" if isinstance(error, SchemaLimitError) else "E501"
        path = declared.path if isinstance(declared.value, str) else (*declared.path, *error.path)
        raise RowError(code, f"{place(path)}: {error}", path) from None


def checked_calls(turn: Turn, tools: Toolset | None) -> tuple[ToolCall, ...]:
    """Return a turn's calls with canonical arguments and the file's ids.

    Raises:
        RowError: no declared functions, an undeclared one, or arguments that are not an object or violate its schema.
    """
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


_MOST_NAMES = 8


def edited_answer(example: Example, text: str) -> Message:
    """Return the example's last turn with another text, which may end with calls, one line of JSON each.

    This is the inverse of ``Message.text``. In a conversation without functions the text stays text.

    Raises:
        RowError: the calls are invalid, as in a row.
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

    Raises:
        RowError: another order.
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
    """Return the messages with the ids of calls and results replaced by the calls' places.

    Raises:
        RowError: an id that is missing, repeated or unknown, a result of another function, or a call without a result.
    """
    done: list[Message] = []
    ids: dict[str, str] = {}
    waiting: dict[str, ToolCall] = {}
    for message, turn in zip(messages, turns, strict=True):
        if waiting and message.role != "tool":
            names = ", ".join(f'"{call.name}" ({given})' for given, call in islice(waiting.items(), _MOST_NAMES))
            raise RowError("E508", f"{place(turn.path)} follows calls without a result: {names}", turn.path)
        if message.role == "tool":
            done.append(replace(message, call_id=ids[_answered(turn, ids, waiting)]))
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


def _answered(turn: Turn, ids: dict[str, str], waiting: dict[str, ToolCall]) -> str:
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
