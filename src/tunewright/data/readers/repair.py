"""Mends of faulty conversations that leave no choice: what is mended cannot be meant otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tunewright.data.readers.row_errors import RowError, place
from tunewright.data.readers.schemas import Turn

Mended = tuple[list[Turn], str]
"""The turns afterwards, and what was done."""

_OTHER_NAMES = {"human": "user", "gpt": "assistant", "developer": "system"}


def mend(turns: Sequence[Turn], error: RowError) -> Mended | None:
    """Mend one fault of these turns; None where there is no safe way."""
    way = _WAYS.get(error.code)
    at = next((i for i, turn in enumerate(turns) if turn.content_path == error.path), None)
    if at is None:
        at = next((i for i, turn in enumerate(turns) if turn.path and error.path[: len(turn.path)] == turn.path), None)
    if way is None or at is None:
        return None
    return way(list(turns), at, error)


def _key(turns: list[Turn], at: int, error: RowError) -> Mended | None:
    """Return a key that says nothing; a name, which no chat template writes."""
    key = str(error.path[-1])
    if key not in turns[at].rest or (error.code != "E309" and turns[at].rest[key] not in (None, "", [], {})):
        return None
    return _without(turns, at, key, f"{place(error.path)} left out")


def _weight(turns: list[Turn], at: int, error: RowError) -> Mended | None:
    weight = turns[at].rest["weight"]
    nothing = weight is None or (turns[at].role != "assistant" and weight == 0 and not isinstance(weight, bool))
    return _without(turns, at, "weight", f"{place(error.path)} left out: it says nothing") if nothing else None


def _without(turns: list[Turn], at: int, key: str, what: str) -> Mended:
    rest = {name: value for name, value in turns[at].rest.items() if name != key}
    turns[at] = replace(turns[at], rest=rest)
    return turns, what


def _role(turns: list[Turn], at: int, error: RowError) -> Mended | None:
    role = turns[at].role
    if not isinstance(role, str):
        return None
    plain = role.strip().lower()
    known = _OTHER_NAMES.get(plain, plain)
    if known not in ("system", "user", "assistant"):
        return None
    turns[at] = replace(turns[at], role=known)
    return turns, f'the role of {place(error.path)} is "{known}" instead of "{role}"'


def _parts(turns: list[Turn], at: int, error: RowError) -> Mended | None:
    """Parts that are all text, joined as chat templates join them: with nothing between."""
    texts = [_part_text(part) for part in turns[at].content]
    if not texts or None in texts:
        return None
    turns[at] = replace(turns[at], content="".join(text for text in texts if text is not None))
    return turns, f"{place(error.path)}: {len(texts)} parts joined to one text"


def _part_text(part: Any) -> str | None:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        return part["text"] if isinstance(part["text"], str) else None
    return None


def _blank(turns: list[Turn], at: int, error: RowError) -> Mended | None:
    """Return a blank turn at the end, where an answer stands before it, or a blank system turn."""
    last = at == len(turns) - 1 and any(turn.role == "assistant" for turn in turns[:at])
    if not last and not (at == 0 and turns[0].role == "system"):
        return None
    del turns[at]
    return turns, f"{place(error.path)} left out: it is empty"


def _repeat(turns: list[Turn], at: int, _error: RowError) -> Mended | None:
    """Two turns of one role in a row, of which one says nothing more."""
    before, here = turns[at - 1], turns[at]
    if here.content == before.content and here.rest == before.rest:
        del turns[at]
        return turns, f"{place(here.path)} left out: it repeats the turn before"
    for drop, turn in ((at - 1, before), (at, here)):
        if isinstance(turn.content, str) and not turn.content.strip():
            del turns[drop]
            return turns, f"{place(turn.path)} left out: it is empty"
    return None


def _unanswered(turns: list[Turn], _at: int, _error: RowError) -> Mended | None:
    """Turns after the last answer that is trained: nothing of them would have been."""
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.rest.get("weight", 1) == 1]
    if not answers:
        return None
    left = [place(turn.path) for turn in turns[answers[-1] + 1 :]]
    return turns[: answers[-1] + 1], f"{', '.join(left)} left out: no trained answer follows"


_WAYS: dict[str, Callable[[list[Turn], int, RowError], Mended | None]] = {
    "E204": _key,
    "E303": _key,
    "E304": _role,
    "E306": _parts,
    "E307": _weight,
    "E308": _unanswered,
    "E309": _key,
    "E401": _blank,
    "E406": _repeat,
    "E407": _unanswered,
}
