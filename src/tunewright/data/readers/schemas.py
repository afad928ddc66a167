"""Row formats, distinguished by their keys, and the turns in each."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tunewright.config import DataConfig
from tunewright.core.text import first_of
from tunewright.data.readers.mapping import Parent, pair_mapping
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
_OPENAI_PAIR = ("preferred_output", "non_preferred_output")
_PAIR = ("chosen", "rejected")
PREFERENCE_KEYS = frozenset((*_OPENAI_PAIR, *_PAIR))
_BESIDES = ("tools", "parallel_tool_calls")  # keys of a chat row that both preference formats have alongside the turns
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
"""An object with one of these keys is a row, although it may be faulty."""


@dataclass(frozen=True)
class Conversation:
    """The turns of a row, the name of its format, the reason for choosing it, and the keys that it uses."""

    kind: str
    reason: str
    turns: tuple[Turn, ...]
    keys: frozenset[str] = frozenset()
    tools: Declared | None = None
    rejected: Conversation | None = None
    """For a preference row: the same prompt with the rejected answer."""


def parse_conversation(
    row: Mapping[str, Any], data: DataConfig, above: JsonPath = (), parent: Parent | None = None
) -> Conversation:
    """Return the unchecked turns of a row in any supported format, ignoring keys in data.drop_columns.

    The path of the row in its document (``above``) and the objects above it are for templates of
    the config. Keys outside all formats are allowed: ``metadata_of`` keeps them.
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
        keys = _used_keys(row, {data.input, data.output}, (), data)
        reason = f"the config names {data.input} as input and {data.output} as output"
        return Conversation("mapped pairs", reason, _pair(row, data.input, data.output), keys)
    for key in ("image", "images"):
        if row.get(key) and key not in data.group_by:
            raise RowError("E208", f'images are not supported: the row has "{key}"', (key,))
    if _is_preference(row, data):
        return _preference(row, data)
    for key in ("messages", "interactions", "conversation"):
        if key in row:
            return _chat(row, key, data)
    if "conversations" in row:
        return _share_gpt(row, data)
    for key, reason in _UNTRAINABLE.items():
        if key in row and key not in data.group_by and "completion" not in row and "output" not in row:
            raise RowError("E203", f"{reason}, which is not supported", (key,))
    if "instruction" in row:
        return _alpaca(row, data)
    if row and all(key == str(place) for place, key in enumerate(row)):
        raise RowError("E103", f"a row is an array of {len(row):,}, and neither input nor output names its places")
    if meant := misspelled_keys(row):
        key, known = next(iter(meant.items()))
        raise RowError("E201", f'unknown key "{key}", did you mean "{known}"?', (key,))
    keys = _used_keys(row, {"prompt", "completion"}, (), data)
    return Conversation(
        "prompt/completion pairs", "rows have prompt and completion", _pair(row, "prompt", "completion"), keys
    )


def _used_keys(row: Mapping[str, Any], needed: set[str], also: Collection[str], data: DataConfig) -> frozenset[str]:
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
        faults = [f"unknown key {_quote(others)}"] * bool(others) + faults + [f"missing key {_quote(missing)}"]
        of = ROW_SHAPES if needed <= {"messages", "prompt", "completion"} else _quote([*sorted(needed), *also])
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
    """Return the known key that this key seems to misspell; ``prompt_id`` does not misspell ``prompt``."""
    plain = key.strip().lower()
    near = difflib.get_close_matches(plain, sorted(known), n=1, cutoff=_NEAR)
    return near[0] if near and plain.count("_") == near[0].count("_") else None


def _quote(keys: Sequence[str]) -> str:
    return first_of((f'"{key}"' for key in keys), _MOST_KEYS)


def _is_preference(row: Mapping[str, Any], data: DataConfig) -> bool:
    """Return whether the row has two answers; a rejected answer next to messages is metadata, as exports write it."""
    there = (PREFERENCE_KEYS & row.keys()) - set(data.group_by)
    chats = {"messages", "interactions", "conversation", "conversations"}
    return bool(there) and not row.keys() & {"completion", "output"} and (there == set(_PAIR) or chats.isdisjoint(row))


class _Placed(NamedTuple):
    """A turn of a preference row, in chat form, and its place; a ``text`` in the row has no keys of its own."""

    turn: Any
    path: JsonPath
    text: bool = False


def _preference(row: Mapping[str, Any], data: DataConfig) -> Conversation:
    """Parse a row with one of ``PREFERENCE_KEYS``: one prompt with a preferred and a rejected answer.

    Formats: OpenAI's preference fine-tuning and Together's (input, preferred_output, non_preferred_output); TRL's
    preference datasets (prompt, chosen, rejected), as texts or as lists of turns, also without a prompt.
    """
    openai = not row.keys().isdisjoint(_OPENAI_PAIR)
    keys = _OPENAI_PAIR if openai else _PAIR
    for key in keys:
        if row.get(key) in (None, "", []):
            raise RowError("E209", f'the row has no "{key}"', (key,) if key in row else ())
    answers = [_place_turns(row[key], (key,)) for key in keys]
    if openai:
        prompt, besides = _openai_input(row)
        kind, reason = "preference pairs (OpenAI, Together)", "rows have preferred_output and non_preferred_output"
        used: frozenset[str] = frozenset({"input", *keys})
        above: JsonPath = ("input",)
    else:
        besides = {key: row[key] for key in ("system", *_BESIDES) if row.get(key) not in (None, "")}
        prompt, answers = _shared_prompt(row, answers)
        kind, reason, above = "preference pairs", "rows have chosen and rejected", ()
        used = frozenset({"prompt", "system", *_BESIDES, *keys})
    for turn, path, _ in (*answers[0], *answers[1]):
        if isinstance(turn, dict) and turn.get("role") == "user":
            raise RowError("E209", f"{place(path)} is a user turn, in which the answers differ", path)
    if [each.turn for each in answers[0]] == [each.turn for each in answers[1]]:
        raise RowError("E209", "both answers are equal", (keys[1],))
    sides = []
    for answer in answers:
        turns = _system(besides, "system")
        for each in (*prompt, *answer):
            turn = read_turn(each.turn, each.path, _CHAT_TURNS)
            turns.append(replace(turn, content_path=each.path) if each.text else turn)
        side = _with_functions(Conversation(kind, reason, tuple(turns), used), besides, data, above)
        sides.append(replace(side, kind=kind, reason=reason))  # regardless of the form of its functions
    return replace(sides[0], rejected=sides[1])


def _openai_input(row: Mapping[str, Any]) -> tuple[list[_Placed], dict[str, Any]]:
    given = row.get("input")
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise RowError("E209", "input must be an object with messages", ("input",) if "input" in row else ())
    other = [key for key in given if key not in ("messages", *_BESIDES)]
    if other:
        raise RowError("E201", f'unknown key "{other[0]}" of input', ("input", other[0]))
    besides = {key: given[key] for key in _BESIDES if key in given}
    return _place_turns(given["messages"], ("input", "messages")), besides


def _place_turns(value: Any, path: JsonPath) -> list[_Placed]:
    if isinstance(value, str):
        return [_Placed({"role": "assistant", "content": value}, path, text=True)]
    if isinstance(value, list):
        return [_Placed(turn, (*path, i)) for i, turn in enumerate(value)]
    return [_Placed(value, path)]


def _shared_prompt(row: Mapping[str, Any], answers: list[list[_Placed]]) -> tuple[list[_Placed], list[list[_Placed]]]:
    """Return the prompt, and the answers without the turns of the prompt that they repeat."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return _place_turns(prompt, ("prompt",)), answers
    firsts = [row[key][0] if isinstance(row[key], list) and row[key] else None for key in _PAIR]
    if not all(isinstance(first, dict) and first.get("role") != "assistant" for first in firsts):
        if prompt in (None, ""):
            raise RowError("E209", 'the row has no "prompt", and its answers are not conversations')
        return [_Placed({"role": "user", "content": prompt}, ("prompt",), text=True)], answers
    turns = [[each.turn for each in answer] for answer in answers]
    most = min(map(len, turns)) - 1
    shared = next((i for i in range(most) if turns[0][i] != turns[1][i]), most)
    asked = [turn.get("content") for turn in turns[0][:shared] if isinstance(turn, dict)]
    if not shared or (prompt not in (None, "") and prompt not in asked):
        other = "the prompt" if shared else "each other"
        raise RowError("E209", f"chosen and rejected do not begin with the same turns as {other}", ("rejected",))
    return answers[0][:shared], [answer[shared:] for answer in answers]


def _pair(row: Mapping[str, Any], prompt: str, completion: str) -> tuple[Turn, ...]:
    return (
        Turn("user", row[prompt], (prompt,), (prompt,)),
        Turn("assistant", row[completion], (completion,), (completion,)),
    )


def _alpaca(row: Mapping[str, Any], data: DataConfig) -> Conversation:
    """Parse Stanford Alpaca's format, with LLaMA-Factory's system and history (its data/README.md)."""
    keys = _used_keys(row, {"instruction", "output"}, ("input", "system", "history"), data)
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
    keys = _used_keys(row, {"conversations"}, ("system", *_DECLARING), data)
    turns = [*_system(row, "system"), *_read_turns(row, "conversations", _SHARE_TURNS)]
    first = turns[-1].content_path[-1]
    reason = f"rows have conversations[].{'from' if first == 'value' else 'role'}/{first}"
    return _with_functions(Conversation("ShareGPT conversations", reason, tuple(turns), keys), row, data)


def _chat(row: Mapping[str, Any], key: str, data: DataConfig) -> Conversation:
    """Parse OpenAI's, Together's and Mistral's formats (Mistral: interactions, text and system_prompt)."""
    mistral = key == "interactions" or not {"system", "system_prompt", "only_last"}.isdisjoint(row)
    used = _used_keys(row, {key}, ("system", "system_prompt", "only_last", *_DECLARING), data)
    turns = _read_turns(row, key, _CHAT_TURNS)
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


def _with_functions(
    conversation: Conversation, row: Mapping[str, Any], data: DataConfig, above: JsonPath = ()
) -> Conversation:
    """Return the conversation with the row's declarations, and with calls and results in one form.

    ``above`` is the place of the object with the row's keys.
    """
    keys = [key for key in _DECLARING if row.get(key) not in (None, [], "", "[]") and key not in data.group_by]
    if len(keys) > 1:
        raise RowError("E501", f"the row has both {_quote(keys)}", (keys[1],))
    declared = Declared(row[keys[0]], (*above, keys[0])) if keys else None
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
    if row.get("parallel_tool_calls") is not None and not _flag(row, "parallel_tool_calls", above):
        several = next((turn for turn in turns if len(turn.calls) > 1), None)
        if several is not None:
            count = len(several.calls)
            reason = f"{place(several.path)} has {count} calls, but parallel_tool_calls is false"
            raise RowError("E510", reason, several.path)
    return replace(conversation, kind=kind, reason=reason, turns=tuple(turns), tools=declared)


def _flag(row: Mapping[str, Any], key: str, above: JsonPath = ()) -> bool:
    value, path = row.get(key, False), (*above, key)
    if not isinstance(value, bool | None):
        raise RowError("E305", f"{place(path)} is neither true nor false", path)
    return bool(value)


def _read_turns(row: Mapping[str, Any], key: str, keys: TurnKeys) -> list[Turn]:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise RowError("E206", f"{key} must be a list of turns", (key,))
    return [read_turn(turn, (key, i), keys) for i, turn in enumerate(turns)]
