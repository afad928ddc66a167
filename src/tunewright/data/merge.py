"""Merging new rows into the rows of the current version: duplicates are left out, and known outputs replaced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.spill import repeated
from tunewright.core.text import count_of, excerpts, listed
from tunewright.core.workers import THIS_PROCESS, Workers
from tunewright.data.dedup import exact_repeats, find_clusters_and_duplicates, find_duplicates
from tunewright.data.examples import Example, Message, in_conflict
from tunewright.data.notices import Conflict, Duplicate, ReplacedRow, conflicting
from tunewright.data.options import AddOptions
from tunewright.data.readers import SourceRow
from tunewright.data.review.edits import superseded_keys
from tunewright.data.splits import SPLITS, Split, strictest
from tunewright.data.versions import (
    DatasetVersion,
    has_version,
    import_files,
    import_records,
    load_version,
    short,
)
from tunewright.data.versions.logs import Removal, exclude_removed

_MOST = 3


@dataclass(frozen=True)
class Replacement:
    """Rows that replace known ones: pair key to the replaced keys, and to the row read.

    ``edits_kept`` are rows that replace nothing because a reviewer edited their answer.
    """

    olds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: dict[str, SourceRow] = field(default_factory=dict)
    edits_kept: tuple[SourceRow, ...] = ()


@dataclass
class Merge:
    """The domain rows of the parent version and the new rows, deduplicated; all by pair key."""

    parent: DatasetVersion | None
    rows: list[SourceRow]
    """All rows read; rows that replace others have the input as the parent spells it."""
    kept: dict[str, Example]
    first: dict[str, SourceRow]
    """First row read with each new pair key, dropped ones included."""
    dropped: dict[str, tuple[str, float]]
    """New pair key to the kept key that it repeats, and their similarity."""
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
    """Kept pair key to the kept key that it nearly repeats, and their similarity; set by :meth:`compare`."""
    similar: Sequence[str] | None = None
    """Cluster of similar inputs of each row in ``kept``; set by :meth:`compare`."""

    def compare(self, similarity: float, reporter: Reporter, workers: Workers) -> None:
        """Find the clusters of the kept rows, and the near-duplicates among them."""
        names, rows = list(self.kept), list(self.kept.values())
        self.similar, found = find_clusters_and_duplicates(rows, similarity, reporter, workers)
        self.near = {names[row]: (names[repeat.of], repeat.similarity) for row, repeat in found.items()}

    @cached_property
    def former(self) -> dict[str, Split]:
        """Split of each row in the parent, without the mix-in."""
        return self._carried({m.key: m.split for m in self.parent.domain} if self.parent else {})

    @cached_property
    def former_given(self) -> dict[str, Split]:
        """Split that authors gave to rows of the parent."""
        return self._carried({m.key: m.given for m in self.parent.domain if m.given} if self.parent else {})

    @cached_property
    def given(self) -> dict[str, Split]:
        """Split that authors gave to kept rows; of several copies of a row, the one that is held out counts."""
        found = {key: split for key, split in self.former_given.items() if key in self.kept}
        for row in self.rows:
            key = self.kept_pair_key(row.example.pair_key)
            if row.split is not None and key in self.kept:
                found[key] = strictest([row.split, found.get(key)]) or row.split
        return found

    def _carried(self, splits: dict[str, Split]) -> dict[str, Split]:
        """Return the splits with those of rows that replace others."""
        splits |= {new: splits[old] for new, old in self.reweighted.items() if old in splits}
        return splits | {new: splits[olds[0]] for new, olds in self.replacement.olds.items() if olds[0] in splits}

    def place(self, key: str) -> str:
        """Return a row's location: FILE:LINE, or the version that has it."""
        row = self.first.get(key)
        if row is not None:
            return f"{row.source}:{row.line}"
        return f"version {short(self.parent.digest if self.parent else '')}, row {short(key)}"

    def kept_pair_key(self, key: str) -> str:
        """Return the kept row for a read row: itself, the row that it repeats, or the row that an edit made of it."""
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

    @cached_property
    def replaced(self) -> tuple[ReplacedRow, ...]:
        """The rows that replaced others, sorted by file and line."""
        before = {m.key: m.example for m in self.parent.domain} if self.parent else {}
        found = [
            ReplacedRow(row.source, row.line, key, row.example.output, olds, tuple(before[old].output for old in olds))
            for key, olds in self.replacement.olds.items()
            for row in (self.replacement.rows[key],)
        ]
        return tuple(sorted(found, key=lambda r: (r.source, r.line)))

    @cached_property
    def duplicates(self) -> tuple[Duplicate, ...]:
        """The dropped rows, with the rows that they repeat."""
        fates = [(row, fate) for row in self.rows if "of" in (fate := self.fate(row))]
        return tuple(
            Duplicate(row.source, row.line, fate["key"], fate["of"], self.place(fate["of"]), fate["similarity"])
            for row, fate in fates
        )

    @cached_property
    def conflicts(self) -> tuple[Conflict, ...]:
        """The inputs with several outputs; inputs that differ in case or white space are the same."""
        names = list(self.kept)
        places = repeated(self.kept[key].prompt_digest for key in names)
        of_several = sorted(sorted(names[place] for place in same) for same in places)
        return tuple(
            Conflict(
                input=self.kept[keys[0]].input_text,
                outputs=tuple(self.kept[key].output for key in keys),
                keys=tuple(keys),
                places=tuple(map(self.place, keys)),
            )
            for keys in of_several
            if in_conflict([self.kept[key] for key in keys])
        )

    @property
    def fresh_conflicts(self) -> list[Conflict]:
        """The conflicts that involve a new row."""
        return [conflict for conflict in self.conflicts if any(key in self.first for key in conflict.keys)]

    @property
    def refusal(self) -> UserError:
        """The error for conflicts that new rows cause."""
        inputs = len({example.prompt_digest for example in self.kept.values()})
        accepted = self.parent is not None and self.parent.manifest.settings.conflicts == "accept"
        return conflicting(self.fresh_conflicts, inputs, accepted=accepted)

    @property
    def left_out_as_superseded(self) -> list[SourceRow]:
        """Rows that an earlier replacement superseded and that stay out."""
        gone = self.superseded & self.edited.keys()
        return [row for row in self.rows if row.example.pair_key in gone]

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The sorted group values of each kept row, with the values of the rows that it stands for."""
        values: dict[str, set[str]] = defaultdict(set)
        replacing = {old: new for new, old in self.reweighted.items()}
        replacing |= {old: new for new, olds in self.replacement.olds.items() for old in olds}
        for member in self.parent.domain if self.parent else ():
            values[replacing.get(member.key, member.key)].update(member.groups)
        for row in self.rows:
            values[self.kept_pair_key(row.example.pair_key)].update(f"{name}={v}" for name, v in row.groups.items())
        return {key: tuple(sorted(found)) for key, found in values.items() if found and key in self.kept}


def merge(
    dataset: Path,
    rows: Sequence[SourceRow],
    data: DataConfig,
    options: AddOptions,
    reporter: Reporter,
    workers: Workers = THIS_PROCESS,
) -> Merge:
    """Merge rows into the current version, if there is one.

    Rows with the same output and inputs at or above data.dedup_threshold are near-duplicates. With data.duplicates:
    drop, the known or first row stays; with ``keep`` only exact ones go (see :meth:`Merge.compare`).
    """
    parent = load_version(dataset) if has_version(dataset) else None
    known = {m.key: m.example for m in parent.domain} if parent else {}
    replacing = superseded_keys(dataset, parent.manifest) if parent else {}
    edited = {old: now for old, now in replacing.items() if old not in known and now in known}
    read = rows
    rows, withheld = exclude_removed(dataset, rows, known.keys() | edited.keys(), replacing, restore=options.restore)
    made: set[str] = set()  # pair keys of rows that came from a replacement, not from a reviewer's edit
    if parent and edited:
        made = {record["key"] for record in import_records(import_files(dataset, parent.manifest), "replaced")}
    superseded = frozenset(row.example.pair_key for row in rows if edited.get(row.example.pair_key) in made)
    if options.restore:
        edited = {old: now for old, now in edited.items() if old not in superseded}
    replacement = Replacement()
    if options.replace and parent:
        replacement, rows = _supersede(parent, rows, known, edited, made)
        became = {old: new for new, olds in replacement.olds.items() for old in olds}
        known = {key: example for key, example in known.items() if key not in became}
        edited = {old: became.get(now, now) for old, now in edited.items() if old not in replacement.olds}
    first: dict[str, SourceRow] = {}
    # Of equal rows of several splits, the held-out one is meant.
    for row in sorted(rows, key=lambda row: -SPLITS.index(row.split or "train")):
        if row.example.pair_key not in known and row.example.pair_key not in edited:
            first.setdefault(row.example.pair_key, row)
    people = {row.example.pair_key for row in rows if not row.generated}
    # Sorted by weights (a turn masked in one row is masked) and key, so that the files' order has no influence. Rows
    # of people come first: a generated row may be the duplicate of a person's row, but not the other way round. So do
    # rows that are given to dev or test: a training row with the same text is the one to leave out.
    held_out = {row.example.pair_key for row in rows if row.split in ("dev", "test")}
    new = sorted(first, key=lambda key: (key not in people, key not in held_out, first[key].example.trained_turns, key))
    reweighted = _reweighted(new, first, known, rows)
    for old in reweighted.values():
        del known[old]
    stay = [*known, *reweighted, *(key for key in replacement.olds if key not in known and key not in reweighted)]
    staying = set(stay)
    keys = [*stay, *(key for key in new if key not in staying)]
    examples = [known[key] if key in known else first[key].example for key in keys]
    if data.duplicates == "drop":
        repeats = find_duplicates(examples, len(stay), data.dedup_threshold, reporter, workers)
    else:
        repeats = exact_repeats(examples, len(stay))
    dropped = {keys[row]: (keys[repeat.of], repeat.similarity) for row, repeat in repeats.items()}
    kept = {key: example for key, example in zip(keys, examples, strict=True) if key not in dropped}
    read = [*rows, *(row for row in read if row.example.pair_key in withheld)]
    generated = _generated(parent, first, people, reweighted, replacement) & kept.keys()
    return Merge(parent, read, kept, first, dropped, reweighted, edited, superseded, replacement, withheld, generated)


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


def _generated(
    parent: DatasetVersion | None,
    first: Collection[str],
    people: Collection[str],
    reweighted: Mapping[str, str],
    replacement: Replacement,
) -> frozenset[str]:
    """Return the pair keys of generated rows: the parent's, and new ones that no person's file contains."""
    before = {m.key for m in parent.domain if m.generated} if parent else set()
    same_text = {new for new, old in reweighted.items() if old not in before or new in people}
    replacing = {key for key, row in replacement.rows.items() if row.generated}
    return frozenset((before - replacement.rows.keys()) | (set(first) - set(people) - same_text) | replacing)


def _turns(example: Example) -> tuple[Message, ...]:
    return tuple(replace(m, weight=1) for m in example.messages)


def _supersede(
    parent: DatasetVersion,
    rows: Sequence[SourceRow],
    known: Mapping[str, Example],
    edited: Mapping[str, str],
    made: Collection[str],
) -> tuple[Replacement, list[SourceRow]]:
    """Return the known rows that rows with another output replace, and all rows read.

    Inputs are compared as for conflicts: the prompt with its system turn, ignoring case and white space. A row that
    replaces another takes over its input as the dataset spells it, so that only the output changes.

    If an input has several outputs, in the version or in the files, which one replaces which is
    unknown: another set of outputs is refused. ``edited`` maps a pair key to the known key that
    replaced it, by review or by an earlier replacement (``made``).
    """
    there: dict[str, list[str]] = defaultdict(list)
    for key in sorted(known):
        there[known[key].prompt_key].append(key)
    rows = [_with_known_spelling(row, [known[key] for key in there.get(row.example.prompt_key, ())]) for row in rows]
    edits_kept = [row for row in rows if (now := edited.get(row.example.pair_key)) is not None and now not in made]
    kept_keys = {row.example.pair_key for row in edits_kept}
    read: dict[str, list[SourceRow]] = defaultdict(list)
    for row in rows:
        if row.example.pair_key not in kept_keys:
            read[row.example.prompt_key].append(row)
    reviewed: dict[str, set[str]] = defaultdict(set)
    for row in edits_kept:
        reviewed[row.example.prompt_key].add(known[edited[row.example.pair_key]].output.strip())
    olds: dict[str, tuple[str, ...]] = {}
    by: dict[str, SourceRow] = {}
    unclear: list[str] = []
    for asked, group in read.items():
        free = there.get(asked, [])
        outputs = {row.example.output.strip() for row in group}
        if free and (_several([known[key] for key in free]) or _several([row.example for row in group])):
            before = {known[key].output.strip() for key in free}
            if before != outputs | reviewed[asked]:
                place, text = f"{group[0].source}:{group[0].line}", group[0].example.input_text[:60]
                shown = "; ".join(excerpts(sorted(outputs)[:_MOST]))
                unclear.append(f'{place}: "{text}": {len(before):,} in the version, {len(outputs):,} here: {shown}')
            continue
        # A known row that was read again precedes a new row with the same words in other spacing.
        for row in sorted(group, key=lambda row: row.example.pair_key not in known):
            gone = [key for key in free if _another_answer(known[key], row.example)]
            if gone:
                olds[row.example.pair_key] = tuple(gone)
                by[row.example.pair_key] = row
                free = [key for key in free if key not in gone]
    if unclear:
        raise UserError(
            f"Nothing was replaced: {count_of(len(unclear), 'input')} with several outputs, in version "
            f"{short(parent.digest)} or in the files\n"
            f"{listed(unclear, len(unclear), _MOST, 'resolve them too')}",
            where="--replace",
            fix="Keep the right output of each input in the file. If the version has several, remove the wrong ones "
            "with `tunewright data remove --keys`. If several are right, add the file with --accept-conflicts instead "
            "of --replace.",
        )
    return Replacement(olds, by, tuple(edits_kept)), rows


def _with_known_spelling(row: SourceRow, alike: Sequence[Example]) -> SourceRow:
    """Return a row with the input spelled as in the known row that it replaces."""
    if any(old.input_key == row.example.input_key for old in alike):
        return row
    replaced = next((old for old in alike if _another_answer(old, row.example)), None)
    if replaced is None:
        return row
    # Only the text changes: the file decides which turns are trained.
    turns = zip(row.example.prompt, replaced.prompt, strict=True)
    prompt = (replace(turn, content=old.content, calls=old.calls, reasoning=old.reasoning) for turn, old in turns)
    return replace(row, example=Example((*prompt, row.example.messages[-1])))


def _several(examples: Sequence[Example]) -> bool:
    different = {example.pair_key: example for example in examples}
    return len({example.output.strip() for example in examples}) > 1 and in_conflict(list(different.values()))


def _another_answer(old: Example, new: Example) -> bool:
    if old.output.strip() == new.output.strip():
        return False
    return old.input_key == new.input_key or in_conflict([old, new])
