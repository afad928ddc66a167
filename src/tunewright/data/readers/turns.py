"""Unchecked turns of a row, with the calls and results of each format in one form."""

from __future__ import annotations

import ast
import re
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tunewright.core.io import canonical_json
from tunewright.core.strict_json import parse_json
from tunewright.data.examples import call_id
from tunewright.data.readers.row_errors import JsonPath, RowError, place


@dataclass(frozen=True)
class RawCall:
    """An unchecked function call of an assistant turn, with its place and the place of its arguments."""

    name: Any
    arguments: Any
    """An object, or its text in JSON."""
    id: Any
    path: JsonPath
    arguments_path: JsonPath


@dataclass(frozen=True)
class Turn:
    """An unchecked turn of a file, with the places of role and content."""

    role: Any
    content: Any
    path: JsonPath
    content_path: JsonPath
    rest: Mapping[str, Any] = field(default_factory=dict)
    """Keys without a meaning for every turn, and the weight."""
    calls: tuple[RawCall, ...] = ()
    call_id: Any = None
    """For a result: the id of the call that it answers."""
    name: Any = None
    """For a result: the function called, if the file names it."""
    reasoning: Any = None
    """For an assistant turn: its thinking, if the file has a key for it."""


class Declared(NamedTuple):
    """The unchecked declarations of a row's functions, and their place."""

    value: Any
    path: JsonPath


_BY_ORDER = object()
"""The id of a call or result in a format that has none."""

_MOST_LITERAL = 1 << 16  # characters: Python's parser takes far more memory than JSON's


@dataclass(frozen=True)
class TurnKeys:
    """The keys and roles of a format's turns; errors name the first key."""

    role: tuple[str, ...]
    content: tuple[str, ...]
    roles: Mapping[str, str]
    """The format's role names, mapped to the role names of OpenAI's API."""
    has_ids: bool = True
    """False if calls and results without ids are matched by their order."""


def read_turn(turn: Any, path: JsonPath, keys: TurnKeys) -> Turn:
    """Return one turn of a list.

    Text parts of a content are joined without a separator, as chat templates do.
    """
    if not isinstance(turn, dict):
        raise RowError("E301", f"{place(path)} must be an object with {keys.role[0]} and {keys.content[0]}", path)
    role_key = _only_key(turn, keys.role, path)
    rest = dict(turn)
    role = rest.pop(role_key)
    role = keys.roles.get(role, role) if isinstance(role, str) else role
    no_id = None if keys.has_ids else _BY_ORDER
    calls = tuple(_calls(rest, path, no_id)) if role == "assistant" else ()
    reasoning = _reasoning(rest, role, path)
    if calls and not any(key in turn for key in keys.content):
        return Turn(role, "", path, (*path, keys.content[0]), rest, calls, reasoning=reasoning)
    content_key = _only_key(turn, keys.content, path)
    at = (*path, content_key)
    given_content = rest.pop(content_key)
    if role == "assistant" and reasoning is None:
        reasoning, given_content = _thinking_parts(given_content)
    content = joined_parts(given_content)
    if role == "function_call":
        return Turn("assistant", "", path, at, rest, tuple(_calls_in_text(content, at)))
    if role in ("tool", "function"):
        given = rest.pop("tool_call_id", None) or no_id
        return Turn(
            "tool", content, path, at, rest, (), _BY_ORDER if role == "function" else given, rest.pop("name", None)
        )
    if rest.get("tool_call_id", "") is None:  # tables and dumps of the API's objects write it like this
        del rest["tool_call_id"]
    if calls and (content is None or (isinstance(content, str) and not content.strip())):
        content = ""
    return Turn(role, content, path, at, rest, calls, reasoning=reasoning)


REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant turn's thinking: of DeepSeek's and vLLM's API, of OpenRouter's, and of gpt-oss' template."""

_MARKS = {"<think>": "</think>", "[THINK]": "[/THINK]"}  # Qwen, DeepSeek and others; Magistral


def split_thinking(text: str) -> tuple[str, str] | None:
    """Return thinking and answer of a text that begins with ``<think>`` or ``[THINK]``; None for other texts.

    A ValueError says that the thinking has no end.
    """
    body = text.lstrip()
    begin = next((mark for mark in _MARKS if body.startswith(mark)), None)
    if begin is None:
        return None
    reasoning, end, answer = body.removeprefix(begin).partition(_MARKS[begin])
    if not end:
        raise ValueError(f"begins with {begin}, but has no {_MARKS[begin]}")
    return reasoning.strip(), answer.lstrip("\n")


def _reasoning(rest: dict[str, Any], role: Any, path: JsonPath) -> Any:
    """Take an assistant turn's thinking out of its keys, and null and empty values out of any turn's."""
    for key in REASONING_KEYS:
        if rest.get(key, "other") in (None, ""):
            del rest[key]
    given = [key for key in REASONING_KEYS if key in rest] if role == "assistant" else []
    if len(given) > 1:
        raise RowError("E310", f'{place(path)} has both "{given[0]}" and "{given[1]}"', (*path, given[1]))
    reasoning = rest.pop(given[0]) if given else None
    if given and not isinstance(reasoning, str):
        at = (*path, given[0])
        raise RowError("E305", f"{place(at)} is {type(reasoning).__name__}, not text", at)
    return reasoning


def _thinking_parts(content: Any) -> tuple[str | None, Any]:
    """Take Mistral's thinking parts out of a content: ``{"type": "thinking", "thinking": [{"type": "text", …}]}``."""
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        return None, content
    first, *others = content
    thinking = joined_parts(first.get("thinking"))
    if first.get("type") != "thinking" or not isinstance(thinking, str):
        return None, content
    return thinking, others


def _only_key(turn: Mapping[str, Any], keys: Sequence[str], path: JsonPath) -> str:
    there = [key for key in keys if key in turn]
    if len(there) > 1:
        named = ", ".join(f'"{key}"' for key in there)
        raise RowError("E303", f"{place(path)} has both {named}", path)
    if not there:
        raise RowError("E302", f'{place(path)} has no "{keys[0]}"', path)
    return there[0]


def joined_parts(content: Any) -> Any:
    """Return the joined texts of a list of text parts, and any other content unchanged."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            return content
        if not isinstance(part["text"], str):
            return content
    return "".join(part["text"] for part in content)


def _calls(rest: dict[str, Any], path: JsonPath, no_id: object) -> Iterator[RawCall]:
    """Take ``tool_calls``, or the earlier ``function_call``, out of a turn's keys."""
    listed, earlier = rest.pop("tool_calls", None), rest.pop("function_call", None)
    if listed and earlier:
        raise RowError("E511", f'{place(path)} has both "tool_calls" and "function_call"', path)
    if earlier:
        yield _named_call(earlier, _BY_ORDER, (*path, "function_call"))
    if listed in (None, []):
        return
    above = (*path, "tool_calls")
    if not isinstance(listed, list):
        raise RowError("E511", f"{place(above)} is {type(listed).__name__}, not a list of calls", above)
    for number, call in enumerate(listed):
        at = (*above, number)
        kind = call.get("type") if isinstance(call, dict) else None
        if not isinstance(call, dict) or "function" not in call or kind not in (None, "function"):
            raise RowError("E511", f'{place(at)} is not {{"id": …, "type": "function", "function": {{…}}}}', at)
        yield _named_call(call["function"], call.get("id") or no_id, at, "function")


def _named_call(function: Any, given: Any, path: JsonPath, *inner: str) -> RawCall:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("E511", f"{place((*path, *inner))} is not an object with name and arguments", path)
    return RawCall(function["name"], function.get("arguments"), given, path, (*path, *inner, "arguments"))


def _calls_in_text(content: Any, path: JsonPath) -> Iterator[RawCall]:
    """Yield the calls of a text: one JSON object with name and arguments, or a list of them."""
    try:
        value = parse_json(content) if isinstance(content, str) else content
    except ValueError as error:
        raise RowError("E511", f"{place(path)} is not a call: {error}", path) from None
    for call in value if isinstance(value, list) and value else [value]:
        yield replace(_named_call(call, _BY_ORDER, path), arguments_path=path)


def numbered(turns: Sequence[Turn]) -> list[Turn]:
    """Give calls and results of a format without ids the ids of their places: a result answers the first open call."""
    done: list[Turn] = []
    calls: list[RawCall] = []
    waiting: dict[str | None, deque[int]] = {}  # places of the last turn's calls by name, and of all under None
    answered: set[int] = set()
    for turn in turns:
        answers = turn.call_id
        if turn.calls:
            waiting = {None: deque()}
            for call in turn.calls:
                for name in (None, call.name):
                    waiting.setdefault(name, deque()).append(len(calls))
                calls.append(replace(call, id=call_id(len(calls))) if call.id is _BY_ORDER else call)
        elif turn.call_id is _BY_ORDER:
            name = turn.name if isinstance(turn.name, str) and turn.name else None
            queue = waiting.get(name, deque())
            while queue and queue[0] in answered:
                queue.popleft()
            if not queue:
                of = f' of "{name}"' if name else ""
                raise RowError("E506", f"{place(turn.path)} is a result{of}, but no such call is open", turn.path)
            answered.add(queue[0])
            answers = calls[queue.popleft()].id
        done.append(replace(turn, calls=tuple(calls[len(calls) - len(turn.calls) :]), call_id=answers))
    return done


def system_tools(turns: Sequence[Turn]) -> tuple[Declared, list[Turn]] | None:
    """Return the functions that a system turn declares in ``<tools>`` (Hermes), and the turns without that text.

    The text around the declarations asks for ``<tool_call>``. It is left out, since each base's template
    has its own. Other text of the system turn is kept.
    """
    first = turns[0] if turns else None
    if first is None or first.role != "system" or not isinstance(first.content, str):
        return None
    text = first.content
    found = _DECLARED.search(text)  # the surrounding text may mention the tags
    end = text.find("</tools>", found.start()) if found else -1
    if found is None or end < 0:
        return None
    start, inner = found.start(), text[found.end() : end].strip()
    try:
        value = json_or_literal(inner)
    except ValueError:
        try:
            value = [json_or_literal(line) for line in inner.splitlines() if line.strip()]
        except ValueError as error:
            raise RowError(
                "E501", f"{place(first.content_path)}: <tools> is not JSON: {error}", first.content_path
            ) from None
    starts = [at for mark in _PREAMBLES if 0 <= (at := text.find(mark)) < start]
    begin = min(starts) if starts else text.rfind("\n\n", 0, text.find("<tools>")) + 1
    last = text.rfind("</tool_call>")
    stop = last + len("</tool_call>") if last > end else end + len("</tools>")
    kept = "\n\n".join(part for part in (text[:begin].strip(), text[stop:].strip()) if part)
    rest = [replace(first, content=kept)] if kept else []
    declared = Declared(value if isinstance(value, list) else [value], first.content_path)
    return declared, [*rest, *turns[1:]]


_DECLARED = re.compile(r"<tools>\s*(?=[\[{])")
_PREAMBLES = ("You are a function calling AI model", "# Tools")


def tagged_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with the calls in ``<tool_call>`` and the results in ``<tool_response>`` (Hermes) taken out."""
    answers = (turn.content for turn in turns if turn.role == "assistant" and isinstance(turn.content, str))
    if any(turn.calls for turn in turns) or not any("<tool_call>" in answer for answer in answers):
        return list(turns)
    done: list[Turn] = []
    for turn in turns:
        if turn.role == "assistant" and isinstance(turn.content, str) and "<tool_call>" in turn.content:
            text, blocks = _blocks(turn, "tool_call")
            try:
                values = list(map(json_or_literal, blocks))
            except ValueError as error:
                what = f"{place(turn.content_path)} has a <tool_call> that is not JSON: {error}"
                raise RowError("E511", what, turn.content_path) from None
            calls = tuple(call for value in values for call in _calls_in_text(value, turn.content_path))
            done.append(replace(turn, content=text, calls=calls))
        elif turn.role == "tool" and isinstance(turn.content, str) and "<tool_response>" in turn.content:
            text, blocks = _blocks(turn, "tool_response")
            if text:
                raise RowError(
                    "E511", f"{place(turn.content_path)} has text outside of <tool_response>", turn.content_path
                )
            done += [replace(turn, content=_result_text(block), call_id=_BY_ORDER) for block in blocks]
        else:
            done.append(turn)
    return done


def _blocks(turn: Turn, tag: str) -> tuple[str, list[str]]:
    """Return the text outside of a tag, and each text inside."""
    first, *parts = turn.content.split(f"<{tag}>")
    outside, inside = [first], []
    for part in parts:
        block, found, after = part.partition(f"</{tag}>")
        if not found:
            raise RowError("E511", f"{place(turn.content_path)} has <{tag}> without </{tag}>", turn.content_path)
        inside.append(block.strip())
        outside.append(after)
    return "\n".join(text for part in outside if (text := part.strip())), inside


def _result_text(block: str) -> str:
    """Return a result's content, which files wrap as ``{"name": …, "content": …}``."""
    try:
        value = json_or_literal(block)
    except ValueError:
        return block
    if not isinstance(value, dict) or "content" not in value or value.keys() - {"name", "content", "tool_call_id"}:
        return block
    return value["content"] if isinstance(value["content"], str) else canonical_json(value["content"])


def json_or_literal(text: str) -> Any:
    """Return the value of a JSON text, or of a Python literal, since Hermes files contain both."""
    try:
        return parse_json(text)
    except ValueError as error:
        if len(text) > _MOST_LITERAL:
            raise
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about escapes in foreign text
                value = ast.literal_eval(text)
            canonical_json(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise error from None
        return value
