"""Text: counts, lists, excerpts and visible control characters for messages, Unicode normalisation in linear time and
the limit on combining marks in text from outside, and the checksum of tokens.
"""

from __future__ import annotations

import re
import string
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Literal

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase


def count_of(number: int, thing: str) -> str:
    """Return a count with its noun: ``1 row``, ``1,200 rows``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def capitalised(text: str) -> str:
    """Return a text with its first letter capitalised and the rest unchanged."""
    return text[:1].upper() + text[1:]


# C0 without tabs and line ends, C1, the Bidi_Control property, and lone surrogates, which no stream encodes.
_CONTROLS = re.compile(
    "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)


def visible(text: str) -> str:
    """Return the text with control characters escaped as in JSON, since a terminal obeys them: ``\\u001b``.

    Tabs and line ends stay.
    """
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


_MOST_STEPS = 10_000_000
"""Steps of the search for common words: a fraction of a second."""


def changes(old: Sequence[str], new: Sequence[str]) -> list[tuple[str, int, int, int, int]]:
    """Return difflib's opcodes between two lists of words and white space; kinds are named as in SequenceMatcher.

    Its search takes cubic time where words repeat. Then everything between the common beginning and end is one change.
    """
    head = common_prefix(old, new)
    tail = min(common_prefix(old[::-1], new[::-1]), min(len(old), len(new)) - head)
    a, b = old[head : len(old) - tail], new[head : len(new) - tail]
    counts = Counter(word for word in b if not word.isspace())
    steps = sum(counts[word] for word in a) * min(len(a), len(b))
    found = [("equal", 0, head, 0, head)]
    if steps > _MOST_STEPS:
        found.append(("replace", head, len(old) - tail, head, len(new) - tail))
    else:
        # White space cannot anchor a match: it occurs in both texts as often as words do.
        codes = SequenceMatcher(str.isspace, a, b, autojunk=False).get_opcodes()
        found += [(kind, i + head, j + head, m + head, n + head) for kind, i, j, m, n in codes]
    found.append(("equal", len(old) - tail, len(old), len(new) - tail, len(new)))
    return [(kind, i, j, m, n) for kind, i, j, m, n in found if i < j or m < n]


_LONGEST = 60  # characters of an excerpt


_BEFORE = 20  # characters shown before the first difference of two long texts


def listed(lines: Iterable[str], count: int, most: int, where_all: str) -> str:
    """Return the first ``most`` lines, then the number left out and ``where_all``, which says where to find them."""
    shown = [f"  {line}" for _, line in zip(range(most), lines, strict=False)]
    if count > most:
        shown.append(f"  and {count - most:,} more: {where_all}")
    return "\n".join(shown)


def first_of(names: Iterable[object], most: int = 8) -> str:
    """Return the first names, and the number left out: ``a, b and 3 more``."""
    every = list(map(str, names))
    return ", ".join(every[:most]) + (f" and {len(every) - most:,} more" if len(every) > most else "")


def excerpts(texts: Sequence[str]) -> list[str]:
    """Return a quoted excerpt of at most 60 characters of each text, chosen so that different texts look different.

    The excerpt of a text that shares a longer beginning with another starts shortly before their first difference.
    """
    lines = [" ".join(text.split()) for text in texts]
    return [_distinct(line, [other for other in lines if other != line]) for line in lines]


def _distinct(line: str, others: Sequence[str]) -> str:
    same = max((common_prefix(line, other) for other in others), default=0)
    if same < _LONGEST - 1:
        return f'"{_cut(line)}"'
    # At a word's beginning, unless the word is longer than the text shown before the difference.
    start = line.rfind(" ", same - 2 * _BEFORE, same - _BEFORE) + 1 or same - _BEFORE
    return f'"…{_cut(line[start:])}"'


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the length of the common prefix of two rows, in tokens or characters."""
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def token_checksum(body: str) -> str:
    """Return the CRC-32 of a text as six digits of base 62: the end of tokens in GitHub's format.

    See "Behind GitHub's new authentication token formats", github.blog, 2021-04-05.
    """
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        digits = _BASE62[digit] + digits
    return digits


Form = Literal["NFC", "NFKC", "NFKD"]

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

    Text from outside is refused for this fault, since it also reaches tokenizers, patterns and terminals.
    """
    if text.isascii():
        return None
    run = next(_long_runs(text, "NFKC"), None)
    return None if run is None else f"more than {MAX_MARKS} combining marks in a row, from character {run[0] + 1}"


def _long_runs(text: str, form: Form) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of more than ``MAX_MARKS`` marks."""
    marks, end = _marks(form), 0
    step = MAX_MARKS + 1
    # Each long run covers a multiple of `step`, so the other characters need no check.
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
