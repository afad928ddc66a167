"""The difference of two versions, for people: each edited answer with its words marked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal

from tunewright.data.versions import Member, short
from tunewright.data.versions.changes import Diff, Edited

Mark = Literal["same", "gone", "new"]

_CONTEXT = 40  # characters of unchanged text shown on each side of a change
_SEARCHED = 2000  # words: difflib's exact search takes their square
_LONGEST = 200  # characters of changed text shown in one piece


def word_changes(before: str, after: str) -> list[tuple[Mark, str]]:
    """The pieces of both texts in order: joined without the new ones they are ``before``, without the gone ``after``.

    Words and the white space between them are compared (difflib's SequenceMatcher).
    """
    old, new = (re.findall(r"\s+|\S+", text) for text in (before, after))
    # What both begin and end with needs no search; of what is left, common words are ignored only if it is long.
    head = _common(old, new)
    tail = _common(old[head:][::-1], new[head:][::-1])
    middle = old[head : len(old) - tail], new[head : len(new) - tail]
    pieces: list[tuple[Mark, str]] = [("same", "".join(old[:head]))]
    matcher = SequenceMatcher(None, *middle, autojunk=max(map(len, middle)) > _SEARCHED)
    for kind, i, j, m, n in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(middle[0][i:j])))
        else:
            pieces += [("gone", "".join(middle[0][i:j])), ("new", "".join(middle[1][m:n]))]
    pieces.append(("same", "".join(old[len(old) - tail :])))
    return [(mark, text) for mark, text in pieces if text]


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return how many words both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def marked(before: str, after: str) -> str:
    """Both texts in one, as `git diff --word-diff` writes it: ``[-gone-]`` and ``{+new+}``.

    Unchanged text far from any change is cut ("…"), and so is changed text of over 200 characters, with its length.
    """
    pieces = word_changes(before, after)
    shown = []
    for number, (mark, text) in enumerate(pieces):
        if mark == "same":
            shown.append(_middle_cut(text, first=number == 0, last=number == len(pieces) - 1))
        else:
            cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"
            shown.append(f"[-{cut}-]" if mark == "gone" else f"{{+{cut}+}}")
    return "".join(shown)


def _middle_cut(text: str, *, first: bool, last: bool) -> str:
    """Unchanged text, cut where no change is near: at the outer end of the first and last piece, else in the middle."""
    if len(text) <= 2 * _CONTEXT + 1:
        return text
    head = "" if first else text[:_CONTEXT]
    tail = "" if last else text[-_CONTEXT:]
    return f"{head}…{tail}"


def diff_text(diff: Diff, *, most: int = 20) -> str:
    """Return the whole difference as text; of each kind of change ``most`` rows are shown, and the rest is counted."""
    lines = [f"{short(diff.a.digest)} → {short(diff.b.digest)}: {_summary(diff)}", _comparability(diff)]
    # Test rows first: they decide whether scores can be compared.
    test = {key for keys in diff.test_changes.values() for key in keys}
    edited = sorted(diff.edited, key=lambda e: e.after.key not in test)
    moved = sorted(diff.moved, key=lambda m: m.member.key not in test)
    added, removed = (sorted(rows, key=lambda m: m.key not in test) for rows in (diff.added, diff.removed))
    if diff.purged:
        were = "row was" if len(diff.purged) == 1 else "rows were"
        lines.append(f"{len(diff.purged):,} {were} purged since and cannot be compared: `data verify` says why")
    lines += _section("edited", edited, _edit_lines, most)
    lines += _section("added", added, lambda m: [f"+ {_heading(m)}"], most)
    lines += _section("removed", removed, lambda m: [f"- {_heading(m)}"], most)
    lines += _section("moved", moved, lambda m: [f"{m.before} → {m.member.split}  {_heading(m.member)}"], most)
    if diff.metadata:
        lines += ["", "what else the versions say of themselves:"]
        lines += [f"  {name}: {_value(a)} → {_value(b)}" for name, (a, b) in diff.metadata.items()]
    return "\n".join(lines)


def _summary(diff: Diff) -> str:
    if diff.same:
        return "the same rows in the same splits"
    counts = {"added": diff.added, "removed": diff.removed, "edited": diff.edited, "moved": diff.moved}
    told = [f"{len(rows):,} {name}" for name, rows in counts.items() if rows]
    if diff.regrouped:
        told.append(f"{diff.regrouped:,} in another cluster")
    return ", ".join(told)


def _comparability(diff: Diff) -> str:
    if diff.comparable:
        return "0 test rows changed: scores stay comparable"
    kinds = ", ".join(f"{len(keys):,} {kind}" for kind, keys in diff.test_changes.items() if keys)
    count = diff.test_rows_changed
    what = f"{count:,} test row{'s' if count > 1 else ''} changed ({kinds})"
    return f"{what}: scores of the two versions cannot be compared"


def _section(name: str, rows: Sequence[Any], show: Callable[[Any], Iterable[str]], most: int) -> Iterator[str]:
    if rows:
        yield ""
        yield f"{name}:"
        for row in rows[:most]:
            yield from (f"  {line}" for line in show(row))
        if len(rows) > most:
            yield f"  and {len(rows) - most:,} more"


def _edit_lines(edit: Edited) -> Iterable[str]:
    yield f"{short(edit.before.key)} → {_heading(edit.after)}"
    output = marked(edit.before.example.output, edit.after.example.output)
    yield from (f"    {line}" for line in output.splitlines())


def _heading(member: Member) -> str:
    text = " ".join(member.example.input_text.split())
    return f"{short(member.key)} ({member.split}) {text if len(text) <= 80 else text[:79] + '…'}"


def _value(value: Any) -> str:
    if isinstance(value, list):  # sources
        return ", ".join(f"{source['name']} ({short(source['sha256'])})" for source in value) or "nothing"
    return str(value) if value not in (None, "") else "nothing"
