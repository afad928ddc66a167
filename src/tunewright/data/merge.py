"""Merging new rows into the rows of the current version, without duplicates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

from tunewright.config import Duplicates
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.spill import repeated
from tunewright.core.workers import THIS_PROCESS, Workers
from tunewright.data.dedup import exact_repeats, find_clusters_and_duplicates, find_duplicates
from tunewright.data.examples import Example, Message, in_conflict
from tunewright.data.notices import Conflict, Duplicate, ReplacedRow, conflicting
from tunewright.data.readers import SourceRow
from tunewright.data.remove import exclude_removed
from tunewright.data.replace import Replacement, made_by_replacement, supersede
from tunewright.data.review.edits import superseded_keys
from tunewright.data.splits import Split
from tunewright.data.versions import DatasetVersion, has_version, load_version, short
from tunewright.data.versions.logs import Removal


@dataclass(frozen=True)
class Merge:
    """The domain rows of the parent version and the new rows, deduplicated; all by pair key."""

    parent: DatasetVersion | None
    rows: list[SourceRow]
    """All rows read; those that replace others have the input as the parent spells it."""
    kept: dict[str, Example]
    first: dict[str, SourceRow]
    """First row read with each new pair key, dropped ones included."""
    dropped: dict[str, tuple[str, float]]
    """New pair key to the kept one that it repeats, and their similarity."""
    reweighted: dict[str, str]
    """New pair key to the parent's key with the same turns and other weights, which it replaces."""
    edited: dict[str, str]
    """Pair key that an edit replaced, to the key that replaced it."""
    superseded: frozenset[str]
    """Pair keys read that an earlier replacement superseded; they stay out if they are in ``edited``."""
    replacement: Replacement
    """Kept rows that replace the parent's rows of the same input and another output (``replace``)."""
    withheld: dict[str, Removal]
    """Pair key that stays out because it was removed earlier, to its removal."""
    generated: frozenset[str]
    """Kept pair keys of rows whose answer a model wrote."""
    near: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Kept pair key to the kept one that it nearly repeats, and their similarity; see :func:`compared`."""
    similar: Sequence[str] | None = None
    """Cluster of similar inputs of each row in ``kept``; see :func:`compared`."""

    @property
    def former(self) -> dict[str, Split]:
        """Split of each row in the parent, without the mix-in."""
        splits = {m.key: m.split for m in self.parent.domain} if self.parent else {}
        splits |= {new: splits[old] for new, old in self.reweighted.items() if old in splits}
        return splits | {new: splits[olds[0]] for new, olds in self.replacement.olds.items() if olds[0] in splits}

    def place(self, key: str) -> str:
        """Return a row's location: FILE:LINE, or the version that has it."""
        row = self.first.get(key)
        if row is not None:
            return f"{row.source}:{row.line}"
        return f"version {short(self.parent.digest if self.parent else '')}, row {short(key)}"

    def kept_pair_key(self, key: str) -> str:
        """Return the kept row for a read one: itself, the row that it repeats, or the row that an edit made of it."""
        return self.dropped[key][0] if key in self.dropped else self.edited.get(key, key)

    def fate(self, row: SourceRow) -> dict[str, Any]:
        """Return the record of imports.jsonl for a row: added, known, duplicate, replaced or removed."""
        key = row.example.pair_key
        if key in self.withheld:
            return {"fate": "removed", "key": key, "reason": self.withheld[key].because}
        if self.replacement.rows.get(key) is row:
            before, *besides = self.replacement.olds[key]
            return {"fate": "replaced", "key": key, "before": before, **({"besides": besides} if besides else {})}
        if key not in self.first:
            return {"fate": "known", "key": self.edited.get(key, key)}
        if key in self.dropped:
            of, similarity = self.dropped[key]
            return {"fate": "duplicate", "key": key, "of": of, "similarity": round(similarity, 4)}
        if self.first[key] is row:
            like, similarity = self.near.get(key, (None, 0.0))
            near = {} if like is None else {"near": like, "similarity": round(similarity, 4)}
            return {"fate": "added", "key": key, **near}
        return {"fate": "duplicate", "key": key, "of": key, "similarity": 1.0}

    def near_duplicates(self, keys: Collection[str]) -> tuple[Duplicate, ...]:
        """Return the new rows among ``keys`` that nearly repeat a kept one, sorted by file and line."""
        found = [
            Duplicate(row.source, row.line, key, of, self.place(of), similarity)
            for key, (of, similarity) in self.near.items()
            if key in keys and (row := self.first.get(key)) is not None
        ]
        return tuple(sorted(found, key=lambda d: (d.source, d.line)))

    def replaced(self) -> tuple[ReplacedRow, ...]:
        """Return the rows that replaced others, sorted by file and line."""
        before = {m.key: m.example for m in self.parent.domain} if self.parent else {}
        found = [
            ReplacedRow(row.source, row.line, key, row.example.output, olds, tuple(before[old].output for old in olds))
            for key, olds in self.replacement.olds.items()
            for row in (self.replacement.rows[key],)
        ]
        return tuple(sorted(found, key=lambda r: (r.source, r.line)))

    def duplicates(self, rows: Sequence[SourceRow]) -> tuple[Duplicate, ...]:
        """Return the dropped rows, with the rows that they repeat."""
        fates = [(row, fate) for row in rows if "of" in (fate := self.fate(row))]
        return tuple(
            Duplicate(row.source, row.line, fate["key"], fate["of"], self.place(fate["of"]), fate["similarity"])
            for row, fate in fates
        )

    def conflicts(self) -> tuple[Conflict, ...]:
        """Return the inputs with several outputs; inputs that differ in case or white space are the same."""
        by_input = _of_several(self.kept)
        return tuple(
            Conflict(
                input=self.kept[keys[0]].input_text,
                outputs=tuple(self.kept[key].output for key in keys),
                keys=tuple(keys),
                places=tuple(map(self.place, keys)),
            )
            for keys in by_input
            if in_conflict([self.kept[key] for key in keys])
        )

    def fresh(self, conflicts: Sequence[Conflict]) -> list[Conflict]:
        """Return the conflicts that involve a new row."""
        return [conflict for conflict in conflicts if any(key in self.first for key in conflict.keys)]

    def refusal(self, fresh: Sequence[Conflict]) -> UserError:
        """Return the error for conflicts that new rows cause."""
        inputs = len({example.prompt_digest for example in self.kept.values()})
        accepted = self.parent is not None and self.parent.manifest.settings.conflicts == "accept"
        return conflicting(fresh, inputs, accepted=accepted)

    def groups(self, rows: Sequence[SourceRow]) -> dict[str, tuple[str, ...]]:
        """Return the sorted group values of each kept row, with those of the rows that it stands for."""
        values: dict[str, set[str]] = defaultdict(set)
        replacing = {old: new for new, old in self.reweighted.items()}
        replacing |= {old: new for new, olds in self.replacement.olds.items() for old in olds}
        for member in self.parent.domain if self.parent else ():
            values[replacing.get(member.key, member.key)].update(member.groups)
        for row in rows:
            values[self.kept_pair_key(row.example.pair_key)].update(f"{name}={v}" for name, v in row.groups.items())
        return {key: tuple(sorted(found)) for key, found in values.items() if found and key in self.kept}


def merge(
    dataset: Path,
    rows: Sequence[SourceRow],
    similarity: float,
    reporter: Reporter,
    *,
    duplicates: Duplicates = "keep",
    replace: bool = False,
    restore: bool = False,
    accept: bool = False,
    workers: Workers = THIS_PROCESS,
) -> Merge:
    """Merge rows into the current version, if there is one.

    Args:
        similarity: rows with the same output and inputs at or above it are near-duplicates.
        duplicates: ``drop`` keeps the known or first of near-duplicates; ``keep`` drops only exact ones
            (:func:`compared` finds the others).
        replace: let rows replace known ones with the same input and another output.
        restore: add rows that were removed or superseded earlier.
        accept: allow several outputs of an input, which ``replace`` then replaces together.
        workers: compare the rows.

    Raises:
        UserError: ``restore`` meets a purged row, or rows cannot replace others (``supersede``).
    """
    parent = load_version(dataset) if has_version(dataset) else None
    known = {m.key: m.example for m in parent.domain} if parent else {}
    replacing = superseded_keys(dataset, parent.manifest) if parent else {}
    edited = {old: now for old, now in replacing.items() if old not in known and now in known}
    read = rows
    rows, withheld = exclude_removed(dataset, rows, known.keys() | edited.keys(), replacing, restore=restore)
    made = made_by_replacement(dataset, parent) if parent and edited else set()
    superseded = frozenset(row.example.pair_key for row in rows if edited.get(row.example.pair_key) in made)
    if restore:
        edited = {old: now for old, now in edited.items() if old not in superseded}
    replacement = Replacement()
    if replace and parent:
        replacement, rows = supersede(parent, rows, known, edited, made, accept=accept)
        became = {old: new for new, olds in replacement.olds.items() for old in olds}
        known = {key: example for key, example in known.items() if key not in became}
        edited = {old: became.get(now, now) for old, now in edited.items() if old not in replacement.olds}
        edited = {old: now for old, now in edited.items() if old not in replacement.joining}
    first: dict[str, SourceRow] = {}
    for row in rows:
        if row.example.pair_key not in known and row.example.pair_key not in edited:
            first.setdefault(row.example.pair_key, row)
    people = {row.example.pair_key for row in rows if not row.generated}

    # Sorted by weights (a turn masked in one row is masked) and key, so that the files' order has no influence. Rows of
    # people come first: a generated row may be the duplicate of one, and not the other way round.
    def preference(key: str) -> tuple[bool, int, str]:
        return key not in people, first[key].example.trained_turns, key

    new = sorted(first, key=preference)
    reweighted = _reweighted(new, first, known, rows)
    for old in reweighted.values():
        del known[old]
    stay = [*known, *reweighted, *(key for key in replacement.olds if key not in known and key not in reweighted)]
    staying = set(stay)
    keys = [*stay, *(key for key in new if key not in staying)]
    examples = [known[key] if key in known else first[key].example for key in keys]
    if duplicates == "drop":
        repeats = find_duplicates(examples, len(stay), similarity, reporter, workers)
    else:
        repeats = exact_repeats(examples, len(stay))
    dropped = {keys[row]: (keys[repeat.of], repeat.similarity) for row, repeat in repeats.items()}
    kept = {key: example for key, example in zip(keys, examples, strict=True) if key not in dropped}
    read = [*rows, *(row for row in read if row.example.pair_key in withheld)]
    generated = _generated(parent, first, people, reweighted, replacement) & kept.keys()
    return Merge(parent, read, kept, first, dropped, reweighted, edited, superseded, replacement, withheld, generated)


def compared(merged: Merge, similarity: float, reporter: Reporter, workers: Workers = THIS_PROCESS) -> Merge:
    """Return the merge with the clusters of its kept rows, and the near-duplicates among them.

    Args:
        merged: the merge, with ``duplicates="keep"``.
        similarity: rows with the same output and inputs at or above it are near-duplicates.
        reporter: shows the progress.
        workers: compare the rows.
    """
    names, rows = list(merged.kept), list(merged.kept.values())
    similar, found = find_clusters_and_duplicates(rows, similarity, reporter, workers)
    near = {names[row]: (names[repeat.of], repeat.similarity) for row, repeat in found.items()}
    return replaced(merged, near=near, similar=similar)


def _reweighted(
    new: Sequence[str], first: Mapping[str, SourceRow], known: Mapping[str, Example], rows: Sequence[SourceRow]
) -> dict[str, str]:
    """Return the new keys with the turns of a known row and other weights, each with that row's key.

    A known row that was read again keeps its weights.
    """
    again = {_turns(row.example) for row in rows if row.example.pair_key in known} if known else set()
    there = {_turns(example): key for key, example in known.items() if _turns(example) not in again}
    found = ((key, there.pop(_turns(first[key].example), None)) for key in new) if there else ()
    return {key: old for key, old in found if old is not None}


def _of_several(kept: Mapping[str, Example]) -> list[list[str]]:
    """Return the sorted keys of each input with several rows, sorted by their first key."""
    keys = list(kept)
    return sorted(
        sorted(keys[place] for place in places) for places in repeated(kept[key].prompt_digest for key in keys)
    )


def _generated(
    parent: DatasetVersion | None,
    first: Collection[str],
    people: Collection[str],
    reweighted: Mapping[str, str],
    replacement: Replacement,
) -> frozenset[str]:
    """Return the pair keys of generated rows: those of the parent, and new ones that no file of people has."""
    before = {m.key for m in parent.domain if m.generated} if parent else set()
    same_text = {new for new, old in reweighted.items() if old not in before or new in people}
    replacing = {key for key, row in replacement.rows.items() if row.generated}
    return frozenset((before - replacement.rows.keys()) | (set(first) - set(people) - same_text) | replacing)


def _turns(example: Example) -> tuple[Message, ...]:
    return tuple(replaced(m, weight=1) for m in example.messages)
