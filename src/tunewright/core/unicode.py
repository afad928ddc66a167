"""Unicode normalisation in linear time, and the limit on combining marks in text from outside."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Literal

Form = Literal["NFC", "NFKC"]

MAX_MARKS = 30
"""Maximum number of combining marks in a row: the Stream-Safe Text Format of UAX #15, far above any language's need."""

_FIRST_MARK, _PAST_MARKS = 0x300, 0x20000


def normalize(text: str, form: Form = "NFC") -> str:
    """Return ``unicodedata.normalize(form, text)``, in linear time.

    Python puts marks in canonical order by insertion, in quadratic time and without releasing the GIL. So long runs
    of marks are sorted here first.
    """
    if text.isascii():
        return text
    pieces, at = [], 0
    for start, end in _long_runs(text, form):
        pieces += [text[at:start], _in_order(text[start:end], form)]
        at = end
    return unicodedata.normalize(form, "".join([*pieces, text[at:]]) if pieces else text)


def mark_fault(text: str) -> str | None:
    """Return the fault of a text with more than ``MAX_MARKS`` combining marks in a row, else None.

    Text from outside is refused for it, since tokenizers, patterns and terminals meet the text too.
    """
    if text.isascii():
        return None
    run = next(_long_runs(text, "NFKC"), None)
    return None if run is None else f"more than {MAX_MARKS} combining marks in a row, from character {run[0] + 1}"


def _long_runs(text: str, form: Form) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of more than ``MAX_MARKS`` marks."""
    marks, end = _marks(form), 0
    step = MAX_MARKS + 1
    # Each long run covers a multiple of `step`, so the other characters need no look.
    for number, letter in enumerate(text[::step]):
        start = number * step
        if letter not in marks or start < end:
            continue
        end = start + 1
        while end < len(text) and text[end] in marks:
            end += 1
        while start > 0 and text[start - 1] in marks:
            start -= 1
        if end - start > MAX_MARKS:
            yield start, end


def _in_order(run: str, form: Form) -> str:
    decomposition = _decomposition(form)
    marks = "".join(unicodedata.normalize(decomposition, mark) for mark in run)
    return "".join(sorted(marks, key=unicodedata.combining))


@cache
def _marks(form: Form) -> frozenset[str]:
    """Return the characters whose decomposition begins with a combining mark; some have no combining class."""
    decomposition = _decomposition(form)
    letters = map(chr, range(_FIRST_MARK, _PAST_MARKS))
    return frozenset(each for each in letters if unicodedata.combining(unicodedata.normalize(decomposition, each)[0]))


def _decomposition(form: Form) -> Literal["NFD", "NFKD"]:
    return "NFD" if form == "NFC" else "NFKD"
