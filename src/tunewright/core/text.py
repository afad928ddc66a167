"""Counts, lists, excerpts and visible control characters for messages, and the checksum of tokens."""

from __future__ import annotations

import re
import string
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

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
    """Return difflib's opcodes between two lists of words and white space; kinds are those of SequenceMatcher.

    Its search takes cubic time where words repeat. Then everything between the common beginning and end is one change.
    """
    head = _equal_until(old, new)
    tail = min(_equal_until(old[::-1], new[::-1]), min(len(old), len(new)) - head)
    a, b = old[head : len(old) - tail], new[head : len(new) - tail]
    counts = Counter(word for word in b if not word.isspace())
    steps = sum(counts[word] for word in a) * min(len(a), len(b))
    found = [("equal", 0, head, 0, head)]
    if steps > _MOST_STEPS:
        found.append(("replace", head, len(old) - tail, head, len(new) - tail))
    else:
        # White space is no anchor of a match: it would occur in both texts as often as words do.
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


def excerpts(texts: Sequence[str]) -> list[str]:
    """Return a quoted excerpt of at most 60 characters of each text, chosen so that different texts look different.

    The excerpt of a text that shares a longer beginning with another starts shortly before their first difference.
    """
    lines = [" ".join(text.split()) for text in texts]
    return [_distinct(line, [other for other in lines if other != line]) for line in lines]


def _distinct(line: str, others: Sequence[str]) -> str:
    same = max((_equal_until(line, other) for other in others), default=0)
    if same < _LONGEST - 1:
        return f'"{_cut(line)}"'
    # At a word, unless that is longer than what is shown before the difference.
    start = line.rfind(" ", same - 2 * _BEFORE, same - _BEFORE) + 1 or same - _BEFORE
    return f'"…{_cut(line[start:])}"'


def _equal_until(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


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
