"""Difference between two versions, as data and as text with changed words marked."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tunewright.core.text import changes
from tunewright.data.splits import Split
from tunewright.data.versions import DatasetVersion, Manifest, Member, short


@dataclass(frozen=True)
class OutputEdit:
    """An input whose ideal output differs between two versions."""

    before: Member
    after: Member

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        return {
            "input": self.after.example.input_text,
            "before": {"key": self.before.key, "output": self.before.example.output, "split": self.before.split},
            "after": {"key": self.after.key, "output": self.after.example.output, "split": self.after.split},
        }


@dataclass(frozen=True)
class SplitMove:
    """A row of both versions whose split changed."""

    member: Member
    before: Split

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        return {**_row(self.member), "before": self.before}


@dataclass(frozen=True)
class Diff:
    """Difference between two versions; rows are sorted by key.

    An edit is a removed row and an added one with the same input key; they are not counted as removed or added.
    """

    a: Manifest
    b: Manifest
    added: tuple[Member, ...]
    removed: tuple[Member, ...]
    edited: tuple[OutputEdit, ...]
    moved: tuple[SplitMove, ...]
    regrouped: int
    """Rows of both versions whose cluster has other members among the rows of both: number."""
    purged: tuple[str, ...] = ()
    """Pair keys of rows of either version whose text was purged, and which are not compared."""

    @cached_property
    def test_changes(self) -> dict[str, tuple[str, ...]]:
        """Keys of rows added to the test split, removed from it, edited in it, or moved into or out of it."""
        return {
            "added": tuple(m.key for m in self.added if m.split == "test"),
            "removed": tuple(m.key for m in self.removed if m.split == "test"),
            "edited": tuple(e.after.key for e in self.edited if "test" in (e.before.split, e.after.split)),
            "moved": tuple(m.member.key for m in self.moved if "test" in (m.before, m.member.split)),
        }

    @property
    def test_rows_changed(self) -> int:
        """Number of test rows changed."""
        return sum(map(len, self.test_changes.values()))

    @property
    def comparable(self) -> bool:
        """True if scores on the two test splits are comparable."""
        return self.test_rows_changed == 0

    @property
    def same(self) -> bool:
        """True if both have the same rows in the same splits and clusters."""
        return self.a.digest == self.b.digest

    @cached_property
    def metadata(self) -> dict[str, tuple[Any, Any]]:
        """Other differences of the manifests (author, message, sources, settings), with both values."""
        facts = []
        for manifest in (self.a, self.b):
            settings = {f"settings.{k}": v for k, v in manifest.settings.model_dump(mode="json").items()}
            facts.append(manifest.model_dump(mode="json", include={"author", "message", "sources"}) | settings)
        names = [*facts[0], *(name for name in facts[1] if name not in facts[0])]
        pairs = {name: (facts[0].get(name), facts[1].get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        return {
            "a": self.a.digest,
            "b": self.b.digest,
            "added": [_row(m) for m in self.added],
            "removed": [_row(m) for m in self.removed],
            "edited": [e.as_dict() for e in self.edited],
            "moved": [m.as_dict() for m in self.moved],
            "regrouped": self.regrouped,
            "purged": list(self.purged),
            "test_changes": {kind: list(keys) for kind, keys in self.test_changes.items()},
            "comparable": self.comparable,
            "metadata": {name: list(pair) for name, pair in self.metadata.items()},
        }


def diff(a: DatasetVersion, b: DatasetVersion) -> Diff:
    """Return the changes that turn version ``a`` into version ``b``."""
    before, after = ({m.key: m for m in version.members} for version in (a, b))
    gone, new = _by_input(before, after), _by_input(after, before)
    edited: list[OutputEdit] = []
    for key in gone.keys() & new.keys():
        # If an input has several outputs, the pairing is a guess; sorting by output makes it stable.
        for old, now in zip(list(gone[key]), list(new[key]), strict=False):
            edited.append(OutputEdit(old, now))
            gone[key].remove(old)
            new[key].remove(now)
    both = before.keys() & after.keys()
    added, removed = (
        tuple(sorted((m for members in groups.values() for m in members), key=lambda m: m.key))
        for groups in (new, gone)
    )
    return Diff(
        a=a.manifest,
        b=b.manifest,
        added=added,
        removed=removed,
        edited=tuple(sorted(edited, key=lambda e: e.after.key)),
        moved=tuple(SplitMove(after[k], before[k].split) for k in sorted(both) if before[k].split != after[k].split),
        regrouped=_regrouped([before[key] for key in both], [after[key] for key in both]),
        purged=tuple(sorted({*a.purged, *b.purged})),
    )


def _regrouped(before: Sequence[Member], after: Sequence[Member]) -> int:
    """Count the rows whose cluster has other members among these rows, regardless of the clusters' names."""
    partitions: list[dict[str, frozenset[str]]] = []
    for members in (before, after):
        clusters: dict[str, set[str]] = defaultdict(set)
        for member in members:
            clusters[member.cluster].add(member.key)
        partitions.append({key: keys for keys in map(frozenset, clusters.values()) for key in keys})
    return sum(partitions[0][member.key] != partitions[1][member.key] for member in before)


def _by_input(mine: dict[str, Member], other: dict[str, Member]) -> dict[str, list[Member]]:
    """Return the members that only the first version has, by input key, sorted by output."""
    found: dict[str, list[Member]] = defaultdict(list)
    for key in mine.keys() - other.keys():
        found[mine[key].example.input_key].append(mine[key])
    return {key: sorted(members, key=lambda m: (m.example.output, m.key)) for key, members in found.items()}


def _row(member: Member) -> dict[str, Any]:
    return {
        "key": member.key,
        "split": member.split,
        "cluster": member.cluster,
        "messages": [m.as_dict() for m in member.example.messages],
    }


Mark = Literal["same", "gone", "new"]

_CONTEXT = 40  # characters of unchanged text shown on each side of a change
_LONGEST = 200  # characters of changed text shown in one piece


def word_changes(before: str, after: str) -> list[tuple[Mark, str]]:
    """Return the marked pieces of both texts in order.

    Joined without "new" pieces they are ``before``, without "gone" pieces ``after``. Words and the white space between
    them are compared by :func:`tunewright.core.text.changes`.
    """
    old, new = (re.findall(r"\s+|\S+", text) for text in (before, after))
    pieces: list[tuple[Mark, str]] = []
    for kind, i, j, m, n in changes(old, new):
        if kind == "equal":
            pieces.append(("same", "".join(old[i:j])))
        else:
            pieces += [("gone", "".join(old[i:j])), ("new", "".join(new[m:n]))]
    return [(mark, text) for mark, text in pieces if text]


def short_changes(before: str, after: str) -> list[tuple[Mark, str]]:
    """Return the marked pieces of both texts in order, cut to the changes.

    Unchanged text far from a change is cut ("…"), and so is changed text of over 200 characters, with its length.
    """
    pieces = word_changes(before, after)
    shown: list[tuple[Mark, str]] = []
    for number, (mark, text) in enumerate(pieces):
        if mark == "same":
            cut = _middle_cut(text, first=number == 0, last=number == len(pieces) - 1)
        else:
            cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"
        shown.append((mark, cut))
    return shown


def marked(before: str, after: str) -> str:
    """Return both texts in one, cut, like `git diff --word-diff`: ``[-gone-]`` and ``{+new+}``."""
    shown = {"same": "{}", "gone": "[-{}-]", "new": "{{+{}+}}"}
    return "".join(shown[mark].format(text) for mark, text in short_changes(before, after))


def _middle_cut(text: str, *, first: bool, last: bool) -> str:
    """Cut unchanged text away from changes: at the outer end of the first and last piece, else in the middle."""
    if len(text) <= 2 * _CONTEXT + 1:
        return text
    head = "" if first else text[:_CONTEXT]
    tail = "" if last else text[-_CONTEXT:]
    return f"{head}…{tail}"


def diff_text(diff: Diff, *, most: int = 20) -> str:
    """Return the difference as text, with at most ``most`` rows of each kind of change."""
    lines = [f"{short(diff.a.digest)} → {short(diff.b.digest)}: {summary(diff)}", comparability(diff)]
    # Test rows first: they decide whether scores can be compared.
    test = {key for keys in diff.test_changes.values() for key in keys}
    edited = sorted(diff.edited, key=lambda e: e.after.key not in test)
    moved = sorted(diff.moved, key=lambda m: m.member.key not in test)
    added, removed = (sorted(rows, key=lambda m: m.key not in test) for rows in (diff.added, diff.removed))
    if diff.purged:
        were = "row was" if len(diff.purged) == 1 else "rows were"
        lines.append(f"{len(diff.purged):,} {were} purged since and cannot be compared: `data verify` shows the reason")
    lines += _section("edited", edited, _edit_lines, most)
    lines += _section("added", added, lambda m: [f"+ {_heading(m)}"], most)
    lines += _section("removed", removed, lambda m: [f"- {_heading(m)}"], most)
    lines += _section("moved", moved, lambda m: [f"{m.before} → {m.member.split}  {_heading(m.member)}"], most)
    if diff.metadata:
        lines += ["", "other differences of the manifests:"]
        lines += [f"  {name}: {_value(a)} → {_value(b)}" for name, (a, b) in diff.metadata.items()]
    return "\n".join(lines)


def summary(diff: Diff) -> str:
    """Return the number of rows of each kind of change."""
    if diff.same:
        return "the same rows in the same splits"
    counts = {"added": diff.added, "removed": diff.removed, "edited": diff.edited, "moved": diff.moved}
    parts = [f"{len(rows):,} {name}" for name, rows in counts.items() if rows]
    if diff.regrouped:
        parts.append(f"{diff.regrouped:,} in another cluster")
    return ", ".join(parts)


def comparability(diff: Diff) -> str:
    """Return whether scores of the two versions can be compared, and the reason if not."""
    if diff.comparable:
        return "0 test rows changed: scores stay comparable"
    kinds = ", ".join(f"{len(keys):,} {kind}" for kind, keys in diff.test_changes.items() if keys)
    count = diff.test_rows_changed
    what = f"{count:,} test row{'s' if count > 1 else ''} changed ({kinds})"
    return f"{what}: scores of the two versions are not comparable"


def _section(name: str, rows: Sequence[Any], show: Callable[[Any], Iterable[str]], most: int) -> Iterator[str]:
    if rows:
        yield ""
        yield f"{name}:"
        for row in rows[:most]:
            yield from (f"  {line}" for line in show(row))
        if len(rows) > most:
            yield f"  and {len(rows) - most:,} more"


def _edit_lines(edit: OutputEdit) -> Iterable[str]:
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
