"""Repairs of faults of turns, where there is only one way to do so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from tunewright.core.io import canonical_json
from tunewright.data.examples import ROLES, call_id
from tunewright.data.readers.row_errors import RowError, place
from tunewright.data.readers.turns import Turn, TurnKeys, json_or_literal, read_turn

Repaired = tuple[list[Turn], str]
"""The repaired turns, and a description of the repair."""

_OTHER_NAMES = {"human": "user", "gpt": "assistant", "observation": "tool"}


def repair_turns(turns: Sequence[Turn], error: RowError) -> Repaired | None:
    """Repair one fault of these turns; None if there is no safe repair."""
    repair = _REPAIRS.get(error.code)
    at = next((i for i, turn in enumerate(turns) if turn.content_path == error.path), None)
    if at is None:
        at = next((i for i, turn in enumerate(turns) if turn.path and error.path[: len(turn.path)] == turn.path), None)
    if repair is None or at is None:
        return None
    return repair(list(turns), at, error)


def _key(turns: list[Turn], at: int, error: RowError) -> Repaired | None:
    """Drop a key without a value, or a name, which no chat template renders."""
    key = str(error.path[-1])
    if key not in turns[at].rest or (error.code != "E309" and turns[at].rest[key] not in (None, "", [], {})):
        return None
    return _without(turns, at, key, f"{place(error.path)} left out")


def _repair_weight(turns: list[Turn], at: int, error: RowError) -> Repaired | None:
    weight = turns[at].rest["weight"]
    nothing = weight is None or (turns[at].role != "assistant" and weight == 0 and not isinstance(weight, bool))
    return _without(turns, at, "weight", f"{place(error.path)} left out: it has no effect") if nothing else None


def _without(turns: list[Turn], at: int, key: str, what: str) -> Repaired:
    rest = {name: value for name, value in turns[at].rest.items() if name != key}
    turns[at] = replace(turns[at], rest=rest)
    return turns, what


def _role(turns: list[Turn], at: int, error: RowError) -> Repaired | None:
    role, turn = turns[at].role, turns[at]
    if not isinstance(role, str):
        return None
    plain = role.strip().lower()
    known = _OTHER_NAMES.get(plain, plain)
    if known not in ROLES:
        return None
    key = str(turn.content_path[-1])
    # Read again, since calls and results have keys of their own.
    turns[at] = read_turn({**turn.rest, "role": known, key: turn.content}, turn.path, TurnKeys(("role",), (key,), {}))
    return turns, f'the role of {place(error.path)} is "{known}" instead of "{role}"'


def _result_text(turns: list[Turn], at: int, error: RowError) -> Repaired | None:
    """Write a result that is an object, a list or a number as JSON."""
    content = turns[at].content
    if turns[at].role != "tool" or content is None or (isinstance(content, list) and any(map(_is_part, content))):
        return None
    turns[at] = replace(turns[at], content=canonical_json(content))
    return turns, f"{place(error.path)}: the result written as JSON"


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "type" in value


def _arguments(turns: list[Turn], at: int, error: RowError) -> Repaired | None:
    """Write absent or empty arguments as {}, and a Python literal as JSON."""
    calls = list(turns[at].calls)
    number = next(n for n, call in enumerate(calls) if call.arguments_path == error.path)
    given = calls[number].arguments
    value: Any = {}
    what = "no arguments written as {}"
    if given is not None and str(given).strip():
        what = "a Python literal written as JSON"
        try:
            value = json_or_literal(given) if isinstance(given, str) else None
        except ValueError:
            return None
    if not isinstance(value, dict):
        return None
    calls[number] = replace(calls[number], arguments=value)
    turns[at] = replace(turns[at], calls=tuple(calls))
    return turns, f"{place(error.path)}: {what}"


def _ids(turns: list[Turn], _at: int, _error: RowError) -> Repaired | None:
    """Number the calls, if the results after each turn with calls can be matched with them in one way only."""
    count = 0
    for at, turn in enumerate(turns):
        if not turn.calls:
            continue
        results = list(takewhile(lambda each: each.role == "tool", turns[at + 1 :]))
        ids, given = [call.id for call in turn.calls], [result.call_id for result in results]
        if len(ids) == len(given) and (len(ids) == 1 or given == [None] * len(given)):
            order = list(range(len(ids)))
        elif (
            all(isinstance(each, str) for each in (*ids, *given))
            and len(set(ids)) == len(ids)
            and set(given) <= set(ids)
        ):
            places = {each: number for number, each in enumerate(ids)}
            order = [places[each] for each in given]
        else:
            return None
        new = [call_id(count + n) for n in range(len(ids))]
        count += len(ids)
        calls = tuple(replace(call, id=each) for call, each in zip(turn.calls, new, strict=True))
        turns[at] = replace(turn, calls=calls)
        for place_, result in enumerate(results):
            turns[at + 1 + place_] = replace(result, call_id=new[order[place_]])
    return turns, "calls and results numbered by their order"


def _blank(turns: list[Turn], at: int, error: RowError) -> Repaired | None:
    """Drop a blank last turn after an answer, or a blank system turn."""
    last = at == len(turns) - 1 and any(turn.role == "assistant" for turn in turns[:at])
    if not last and not (at == 0 and turns[0].role == "system"):
        return None
    del turns[at]
    return turns, f"{place(error.path)} left out: it is empty"


def _repeat(turns: list[Turn], at: int, _error: RowError) -> Repaired | None:
    """Drop one of two consecutive turns of a role if it is blank or a repetition."""
    before, here = turns[at - 1], turns[at]
    if here.content == before.content and here.rest == before.rest and not here.calls:
        del turns[at]
        return turns, f"{place(here.path)} left out: it repeats the previous turn"
    for drop, turn in ((at - 1, before), (at, here)):
        if isinstance(turn.content, str) and not turn.content.strip() and not turn.calls:
            del turns[drop]
            return turns, f"{place(turn.path)} left out: it is empty"
    return None


def _unanswered(turns: list[Turn], _at: int, _error: RowError) -> Repaired | None:
    """Drop the turns after the last trained answer, which would not be trained on."""
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.rest.get("weight", 1) == 1]
    if not answers:
        return None
    left = [place(turn.path) for turn in turns[answers[-1] + 1 :]]
    return turns[: answers[-1] + 1], f"{', '.join(left)} left out: no trained answer follows"


_REPAIRS: dict[str, Callable[[list[Turn], int, RowError], Repaired | None]] = {
    "E303": _key,
    "E304": _role,
    "E305": _result_text,
    "E306": _result_text,
    "E307": _repair_weight,
    "E308": _unanswered,
    "E309": _key,
    "E401": _blank,
    "E406": _repeat,
    "E407": _unanswered,
    "E504": _arguments,
    "E507": _ids,
    "E512": _ids,
}
