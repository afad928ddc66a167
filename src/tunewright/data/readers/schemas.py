"""Row formats, distinguished by their keys, and the turns in each."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunewright.config import DataConfig
from tunewright.data.readers.mapping import Parent, pair_mapping
from tunewright.data.readers.preferences import PAIR_KEYS, PREFERENCE_KEYS, Preference, Side, parse_preference
from tunewright.data.readers.row_errors import JsonPath, RowError, place
from tunewright.data.readers.turns import (
    Declared,
    Turn,
    TurnKeys,
    numbered,
    read_turn,
    system_tools,
    tagged_turns,
)

ROW_SHAPES = '{"messages": [...]} or {"prompt": "...", "completion": "..."}'

_MOST_KEYS = 8  # named in one fault: an object of a thousand rows has a thousand keys
_NEAR = 0.8  # of 1: "mesages", "promt" and "imput" reach it, "context" does not
_CHAT_TURNS = TurnKeys(("role",), ("content", "text"), {"developer": "system"})
_SHARE_TURNS = TurnKeys(
    ("from", "role"),
    ("value", "content"),
    {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "developer": "system", "observation": "tool"},
    has_ids=False,
)
_DECLARING = ("tools", "available_tools", "functions")
_TOOL_KEYS = (*_DECLARING, "tool_calls", "function_call")
_UNTRAINABLE = {
    "input_ids": "rows of token ids depend on one base's tokenizer",
    "text": "rows of plain text (Together's general format) do not separate input and ideal output",
}

KNOWN_KEYS = frozenset(
    (
        "messages",
        "interactions",
        "conversation",
        "conversations",
        "instruction",
        "prompt",
        "completion",
        *PREFERENCE_KEYS,
        *_UNTRAINABLE,
    )
)
"""An object with one of these keys is a row, if a faulty one."""


@dataclass(frozen=True)
class Conversation:
    """The turns of a row, the name of its format, the reason for choosing it, and the keys that it uses."""

    kind: str
    reason: str
    turns: tuple[Turn, ...]
    keys: frozenset[str] = frozenset()
    tools: Declared | None = None
    rejected: Conversation | None = None
    """Of a preference row: the same prompt with the answer that is not the ideal one."""


def parse_conversation(
    row: Mapping[str, Any], data: DataConfig, above: JsonPath = (), parent: Parent | None = None
) -> Conversation:
    """Return the unchecked turns of a row in any supported format, ignoring keys in data.drop_columns.

    Args:
        above: the path of the row in its document, for templates of the config.
        parent: the objects above the row in its document, for templates of the config.

    Raises:
        RowError: an unknown format, missing or misspelt keys, turns that are not a list of objects, or a failing
            template. Other keys are allowed: ``metadata_of`` keeps them.
    """
    if data.drop_columns:
        row = {key: value for key, value in row.items() if key not in data.drop_columns}
    mapping = pair_mapping(data)
    if mapping is not None and mapping.templated:
        sides = (("user", mapping.input), ("assistant", mapping.output))
        turns = tuple(Turn(role, side.value(row, above, parent), side.path, side.path) for role, side in sides)
        return Conversation(
            "mapped pairs", mapping.reason, turns, frozenset(row) if mapping.whole_row else mapping.keys
        )
    if data.input in row and data.output in row:
        assert data.input is not None and data.output is not None
        keys = _used(row, {data.input, data.output}, (), data)
        reason = f"the config names {data.input} as input and {data.output} as output"
        return Conversation("mapped pairs", reason, _pair(row, data.input, data.output), keys)
    _refuse_images(row, data)
    if _is_preference(row, data):
        return _preferred(parse_preference(row), data)
    for key in ("messages", "interactions", "conversation"):
        if key in row:
            return _chat(row, key, data)
    if "conversations" in row:
        return _share_gpt(row, data)
    _refuse_untrainable(row, data)
    if "instruction" in row:
        return _alpaca(row, data)
    if meant := misspelled_keys(row):
        key, known = next(iter(meant.items()))
        raise RowError("E201", f'unknown key "{key}", did you mean "{known}"?', (key,))
    keys = _used(row, {"prompt", "completion"}, (), data)
    return Conversation(
        "prompt/completion pairs", "rows have prompt and completion", _pair(row, "prompt", "completion"), keys
    )


def _used(row: Mapping[str, Any], needed: set[str], also: Collection[str], data: DataConfig) -> frozenset[str]:
    """Return the keys that this row format uses; refuse a row with a missing or misspelt one."""
    used = frozenset((*needed, *also, *_TOOL_KEYS))
    if row.keys() == needed:
        return used
    for key in row:
        if key in _TOOL_KEYS and key not in {*needed, *also, *data.group_by}:
            if row[key] in (None, [], "", "[]"):
                continue
            raise RowError("E204", f'the row has "{key}", which this row format does not hold', (key,))
    unknown = [key for key in row if key not in used and key not in data.group_by]
    meant = {key: known for key in unknown if (known := nearest_known_key(key, (*needed, *also)))}
    faults = [f'unknown key "{key}", did you mean "{known}"?' for key, known in list(meant.items())[:_MOST_KEYS]]
    missing = [key for key in sorted(needed) if key not in row and key not in meant.values()]
    if missing:
        others = [key for key in unknown if key not in meant]
        faults = [f"unknown key {_quoted(others)}"] * bool(others) + faults + [f"missing key {_quoted(missing)}"]
        of = ROW_SHAPES if needed <= {"messages", "prompt", "completion"} else _quoted([*sorted(needed), *also])
        faults[-1] += f": a row is {of}"
    if faults:
        first = (next(iter(meant or unknown)),) if unknown else ()
        raise RowError("E201" if unknown else "E202", " and ".join(faults).replace("? and ", " and "), first)
    return used


def misspelled_keys(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys that seem to be misspellings of known ones, in a row without any known key."""
    if not KNOWN_KEYS.isdisjoint(row):
        return {}
    known = KNOWN_KEYS - _UNTRAINABLE.keys()
    return {key: near for key in row if (near := nearest_known_key(key, known))}


def nearest_known_key(key: str, known: Iterable[str]) -> str | None:
    """Return the known key that this one seems to misspell; ``prompt_id`` does not misspell ``prompt``."""
    plain = key.strip().lower()
    near = difflib.get_close_matches(plain, sorted(known), n=1, cutoff=_NEAR)
    return near[0] if near and plain.count("_") == near[0].count("_") else None


def _refuse_images(row: Mapping[str, Any], data: DataConfig) -> None:
    for key in ("image", "images"):
        if row.get(key) and key not in data.group_by:
            raise RowError("E208", f'images are not supported: the row has "{key}"', (key,))


def _quoted(keys: Sequence[str]) -> str:
    text = ", ".join(f'"{key}"' for key in keys[:_MOST_KEYS])
    return f"{text} and {len(keys) - _MOST_KEYS:,} more" if len(keys) > _MOST_KEYS else text


def _is_preference(row: Mapping[str, Any], data: DataConfig) -> bool:
    """Return whether the row has two answers; a rejected answer next to messages is metadata, as exports write it."""
    there = (PREFERENCE_KEYS & row.keys()) - set(data.group_by)
    chats = {"messages", "interactions", "conversation", "conversations"}
    return bool(there) and not row.keys() & {"completion", "output"} and (there == PAIR_KEYS or chats.isdisjoint(row))


def _preferred(pair: Preference, data: DataConfig) -> Conversation:
    preferred, rejected = (_side(side, data) for side in (pair.preferred, pair.rejected))
    return replace(preferred, kind=pair.kind, reason=pair.reason, keys=pair.keys, rejected=rejected)


def _side(side: Side, data: DataConfig) -> Conversation:
    try:
        conversation = _chat(side.row, "messages", data)
    except RowError as error:
        raise side.located_error(error) from None
    turns = []
    for turn in conversation.turns:
        calls = (
            replace(call, path=side.located(call.path), arguments_path=side.located(call.arguments_path))
            for call in turn.calls
        )
        here, content = side.located(turn.path), side.located(turn.content_path)
        turns.append(replace(turn, path=here, content_path=content, calls=tuple(calls)))
    tools = conversation.tools and conversation.tools._replace(path=side.located(conversation.tools.path))
    return replace(conversation, turns=tuple(turns), tools=tools)


def _refuse_untrainable(row: Mapping[str, Any], data: DataConfig) -> None:
    for key, reason in _UNTRAINABLE.items():
        if key in row and key not in data.group_by and "completion" not in row and "output" not in row:
            raise RowError("E203", f"{reason}, which is not supported", (key,))


def _pair(row: Mapping[str, Any], prompt: str, completion: str) -> tuple[Turn, ...]:
    return (
        Turn("user", row[prompt], (prompt,), (prompt,)),
        Turn("assistant", row[completion], (completion,), (completion,)),
    )


def _alpaca(row: Mapping[str, Any], data: DataConfig) -> Conversation:
    """Parse Stanford Alpaca's format, with LLaMA-Factory's system and history (its data/README.md)."""
    keys = _used(row, {"instruction", "output"}, ("input", "system", "history"), data)
    history = row.get("history")
    if history is None:
        history = []
    if not isinstance(history, list):
        raise RowError("E206", "history must be a list of [input, output]", ("history",))
    turns = _system(row, "system")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("E206", f"history[{i}] must be [input, output]", ("history", i))
        for j, role in enumerate(("user", "assistant")):
            turns.append(Turn(role, pair[j], ("history", i), ("history", i, j)))
    asked = row["instruction"]
    more = row.get("input")
    if more is not None and not isinstance(more, str):
        raise RowError("E305", f"input is {type(more).__name__}, not text", ("input",))
    if isinstance(asked, str) and more:
        asked = f"{asked}\n{more}"
    turns.append(Turn("user", asked, ("instruction",), ("instruction",)))
    turns.append(Turn("assistant", row["output"], ("output",), ("output",)))
    return Conversation("Alpaca instructions", "rows have instruction and output", tuple(turns), keys)


def _system(row: Mapping[str, Any], *keys: str) -> list[Turn]:
    """Return the system turn from a key next to the turns; none if the key is absent, null or empty."""
    return [Turn("system", row[key], (key,), (key,)) for key in keys if row.get(key) not in (None, "")]


def _share_gpt(row: Mapping[str, Any], data: DataConfig) -> Conversation:
    """Parse ShareGPT's format, with the functions of LLaMA-Factory (its data/README.md) and of Hermes."""
    keys = _used(row, {"conversations"}, ("system", *_DECLARING), data)
    turns = [*_system(row, "system"), *_listed(row, "conversations", _SHARE_TURNS)]
    first = turns[-1].content_path[-1]
    reason = f"rows have conversations[].{'from' if first == 'value' else 'role'}/{first}"
    return _with_functions(Conversation("ShareGPT conversations", reason, tuple(turns), keys), row, data)


def _chat(row: Mapping[str, Any], key: str, data: DataConfig) -> Conversation:
    """Parse OpenAI's and Together's formats, and Mistral's with interactions, text and system_prompt."""
    mistral = key == "interactions" or not {"system", "system_prompt", "only_last"}.isdisjoint(row)
    used = _used(row, {key}, ("system", "system_prompt", "only_last", *_DECLARING), data)
    turns = _listed(row, key, _CHAT_TURNS)
    first = turns[0].content_path[-1]
    mistral = mistral or first == "text"
    if _flag(row, "only_last"):
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        for i in answers[:-1]:
            turns[i] = replace(turns[i], rest={**turns[i].rest, "weight": 0})
    kind = "Mistral conversations" if mistral else "OpenAI chats"
    if key == "conversation":
        kind = "Together conversations"
    reason = f"rows have {key}[].role/{first}"
    turns = [*_system(row, "system", "system_prompt"), *turns]
    return _with_functions(Conversation(kind, reason, tuple(turns), used), row, data)


def _with_functions(conversation: Conversation, row: Mapping[str, Any], data: DataConfig) -> Conversation:
    """Return the conversation with the row's declarations, and with calls and results in one form."""
    declared = _declared(row, data)
    turns = list(conversation.turns)
    kind, reason = conversation.kind, conversation.reason
    hermes = system_tools(turns)
    if hermes is not None:
        kind, reason = (
            "Hermes conversations",
            "system turns declare functions in <tools>, read without the text on tags",
        )
        turns = hermes[1]
        declared = declared or hermes[0]
    if declared is not None:
        turns = tagged_turns(turns)
    turns = numbered(turns)
    if row.get("parallel_tool_calls") is not None and not _flag(row, "parallel_tool_calls"):
        several = next((turn for turn in turns if len(turn.calls) > 1), None)
        if several is not None:
            count = len(several.calls)
            reason = f"{place(several.path)} has {count} calls, but parallel_tool_calls is false"
            raise RowError("E510", reason, several.path)
    return replace(conversation, kind=kind, reason=reason, turns=tuple(turns), tools=declared)


def _declared(row: Mapping[str, Any], data: DataConfig) -> Declared | None:
    keys = [key for key in _DECLARING if row.get(key) not in (None, [], "", "[]") and key not in data.group_by]
    if len(keys) > 1:
        raise RowError("E501", f"the row has both {_quoted(keys)}", (keys[1],))
    return Declared(row[keys[0]], (keys[0],)) if keys else None


def _flag(row: Mapping[str, Any], key: str) -> bool:
    value = row.get(key, False)
    if not isinstance(value, bool | None):
        raise RowError("E305", f"{key} is neither true nor false", (key,))
    return bool(value)


def _listed(row: Mapping[str, Any], key: str, keys: TurnKeys) -> list[Turn]:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise RowError("E206", f"{key} must be a list of turns", (key,))
    return [read_turn(turn, (key, i), keys) for i, turn in enumerate(turns)]
