"""Replacing known rows by rows with the same input and another output."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.io import text_lines
from tunewright.core.text import count_of, excerpts, listed
from tunewright.data.examples import Example, in_conflict
from tunewright.data.readers import SourceRow
from tunewright.data.versions import DatasetVersion, import_files, short

_MOST = 10
_FEW = 3


@dataclass(frozen=True)
class MultiOutputCounts:
    """Counts of the outputs of inputs with several outputs, in the dataset or in the files."""

    inputs: int = 0
    replaced: int = 0
    unchanged: int = 0
    added: int = 0

    def __str__(self) -> str:
        """Return the counts as the notice of a replacement."""
        inputs = f"{count_of(self.inputs, 'input')} with several outputs"
        outputs = f"{count_of(self.replaced, 'output')} replaced"
        return f"{inputs}: {outputs}, {self.unchanged:,} unchanged, {self.added:,} added"


@dataclass(frozen=True)
class Replacement:
    """Rows that replace known ones: pair key to the replaced keys, and to the row read.

    ``edits_kept`` are rows that replace nothing because a reviewer edited their answer. ``joining`` are pair keys of
    rows that add another output to a known input.
    """

    olds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: dict[str, SourceRow] = field(default_factory=dict)
    edits_kept: tuple[SourceRow, ...] = ()
    joining: frozenset[str] = frozenset()
    sets: MultiOutputCounts = MultiOutputCounts()


def supersede(
    parent: DatasetVersion,
    rows: Sequence[SourceRow],
    known: Mapping[str, Example],
    edited: Mapping[str, str],
    made: Collection[str],
    *,
    accept: bool,
) -> tuple[Replacement, list[SourceRow]]:
    """Find the known rows that rows with another output replace.

    Inputs are compared as for conflicts: the prompt with its system turn, ignoring case and white space. A row that
    replaces another takes over its input as the dataset spells it, so that only the output changes.

    If an input has several outputs, in the version or in the files, the files' outputs replace all of them. They must
    be at least as many, so that a file with one corrected reference never removes the others.

    Args:
        known: domain rows by pair key.
        edited: pair key to the known one that replaced it, by review or by an earlier replacement.
        made: pair keys from :func:`made_by_replacement`.
        accept: allow several outputs of an input.

    Returns:
        The replacements, and all rows read, with the dataset's spelling of the input in rows that replace others.

    Raises:
        UserError: the files have fewer outputs of an input than the version, or several that are not accepted.
    """
    respelled = _with_known_spelling(rows, known)
    rows = [replace(row, example=respelled.get(row.example.pair_key, row.example)) for row in rows]
    edits_kept = [row for row in rows if (now := edited.get(row.example.pair_key)) is not None and now not in made]
    kept_keys = {row.example.pair_key for row in edits_kept}
    read: dict[str, list[SourceRow]] = defaultdict(list)
    for row in rows:
        if row.example.pair_key not in kept_keys:
            read[row.example.prompt_key].append(row)
    there: dict[str, list[str]] = defaultdict(list)
    for key, example in known.items():
        there[example.prompt_key].append(key)
    reviewed: dict[str, set[str]] = defaultdict(set)
    for row in edits_kept:
        reviewed[row.example.prompt_key].add(known[edited[row.example.pair_key]].output.strip())
    olds: dict[str, tuple[str, ...]] = {}
    by: dict[str, SourceRow] = {}
    sets: list[_OutputSet] = []
    for asked, group in read.items():
        free = list(there.get(asked, ()))
        if free and (_several([known[key] for key in free]) or _several([row.example for row in group])):
            sets.append(_OutputSet.of(group, {key: known[key] for key in free}, reviewed[asked]))
            continue
        # A known row that was read again goes before a new one with the same words in other spacing.
        for row in sorted(group, key=lambda row: row.example.pair_key not in known):
            gone = [key for key in free if _another_answer(known[key], row.example)]
            if gone:
                olds[row.example.pair_key] = tuple(gone)
                by[row.example.pair_key] = row
                free = [key for key in free if key not in gone]
    _refuse_incomplete([each for each in sets if each.gone and each.outputs < each.before], parent)
    _refuse_several([each for each in sets if each.gone and not accept])
    joining: set[str] = set()
    for each in sets:
        for place, row in enumerate(each.coming):
            key = row.example.pair_key
            if place < len(each.gone):
                olds[key], by[key] = each.gone[place], row
            else:
                joining.add(key)
    return Replacement(olds, by, tuple(edits_kept), frozenset(joining), _counts(sets)), rows


def _counts(sets: Sequence[_OutputSet]) -> MultiOutputCounts:
    return MultiOutputCounts(
        inputs=len(sets),
        replaced=sum(len(keys) for each in sets for keys in each.gone),
        unchanged=sum(each.before - len(each.gone) for each in sets),
        added=sum(max(len(each.coming) - len(each.gone), 0) for each in sets),
    )


def _with_known_spelling(rows: Sequence[SourceRow], known: Mapping[str, Example]) -> dict[str, Example]:
    """Return rows with the input spelled as in the known row that they replace, by pair key, where it differs."""
    there: dict[str, list[Example]] = defaultdict(list)
    for _, example in sorted(known.items()):
        there[example.prompt_key].append(example)
    found: dict[str, Example] = {}
    for row in rows:
        alike = there.get(row.example.prompt_key, [])
        if any(old.input_key == row.example.input_key for old in alike):
            continue
        olds = [old for old in alike if _another_answer(old, row.example)]
        if olds:
            # Only the text changes: the file decides which turns are trained.
            turns = zip(row.example.prompt, olds[0].prompt, strict=True)
            prompt = (replace(turn, content=old.content, calls=old.calls) for turn, old in turns)
            found[row.example.pair_key] = Example((*prompt, row.example.messages[-1]))
    return found


@dataclass(frozen=True)
class _OutputSet:
    """The outputs of one input in the files (``rows``), compared with the ``before`` outputs in the version.

    ``gone`` has the pair keys of each output that the files lack, ``coming`` a row of each new output. Both are sorted
    by output: the pairing of old and new is a guess, and the order makes it stable.
    """

    rows: Sequence[SourceRow]
    outputs: int
    before: int
    gone: Sequence[tuple[str, ...]]
    coming: Sequence[SourceRow]

    @classmethod
    def of(cls, rows: Sequence[SourceRow], known: Mapping[str, Example], reviewed: Collection[str]) -> _OutputSet:
        read: dict[str, SourceRow] = {}
        for row in rows:
            read.setdefault(row.example.output.strip(), row)
        there: dict[str, list[str]] = defaultdict(list)
        for key, example in known.items():
            there[example.output.strip()].append(key)
        stay = read.keys() | set(reviewed)
        gone = [tuple(keys) for output, keys in sorted(there.items()) if output not in stay]
        coming = [row for output, row in sorted(read.items()) if output not in there]
        return cls(list(read.values()), len(stay), len(there), gone, coming)

    def __str__(self) -> str:
        example = self.rows[0].example
        return f'"{example.input_text[:60]}": {self.before:,} in the dataset, {self.outputs:,} in the files'


def _excerpts(rows: Sequence[SourceRow]) -> list[tuple[str, SourceRow]]:
    return list(zip(excerpts([row.example.output for row in rows]), rows, strict=True))


def _several(examples: Sequence[Example]) -> bool:
    different = {example.pair_key: example for example in examples}
    return len({example.output.strip() for example in examples}) > 1 and in_conflict(list(different.values()))


def _another_answer(old: Example, new: Example) -> bool:
    if old.output.strip() == new.output.strip():
        return False
    return old.input_key == new.input_key or in_conflict([old, new])


def _refuse_incomplete(sets: Sequence[_OutputSet], parent: DatasetVersion) -> None:
    if sets:
        places = (f"{each.rows[0].source}:{each.rows[0].line}: {each}" for each in sets)
        raise UserError(
            f"Nothing was replaced: {count_of(len(sets), 'input')} with more outputs in version "
            f"{short(parent.digest)} than in the files\n{listed(places, len(sets), _FEW, 'complete them too')}",
            where="--replace",
            fix="Put all outputs of each input into the file. To change single ones, remove them with `tunewright data "
            "remove --keys`, then add the file with --accept-conflicts instead of --replace.",
        )


def _refuse_several(sets: Sequence[_OutputSet]) -> None:
    if sets:
        outputs = (
            "; ".join(f"{output} ({row.source}:{row.line})" for output, row in _excerpts(each.rows[:_FEW]))
            + (f" and {len(each.rows) - _FEW:,} more" if len(each.rows) > _FEW else "")
            for each in sets
        )
        raise UserError(
            f"Nothing was replaced: the files have several outputs for {count_of(len(sets), 'known input')}\n"
            f"{listed(outputs, len(sets), _MOST, '`tunewright data check FILE --json` lists all')}",
            where="--replace",
            fix="Keep the right output of each input in the file. If several are right, use --accept-conflicts: they "
            "then replace all outputs of the input.",
        )


def made_by_replacement(dataset: Path, parent: DatasetVersion) -> set[str]:
    """Return the pair keys of rows that came from a replacement, not from a reviewer's edit."""
    found: set[str] = set()
    for path in import_files(dataset, parent.manifest):
        for line in text_lines(path.read_text(encoding="utf-8")):
            if '"fate":"replaced"' in line:
                found.add(json.loads(line)["key"])
    return found
