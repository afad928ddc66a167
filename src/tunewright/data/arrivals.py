"""What was decided of rows before they are read again: removed ones stay out, replacing ones take another's place."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import text_lines
from tunewright.core.wording import count_of
from tunewright.data.examples import Example, in_conflict
from tunewright.data.notices import excerpts, listed
from tunewright.data.readers import SourceRow
from tunewright.data.versions import DatasetVersion, import_files, short
from tunewright.data.versions.author import current_author
from tunewright.data.versions.removals import Removal, read_removals

_MOST = 10
_FEW = 3


def withhold(
    dataset: Path,
    rows: Sequence[SourceRow],
    known: Collection[str],
    replacing: Mapping[str, str],
    *,
    restore: bool,
) -> tuple[list[SourceRow], dict[str, Removal]]:
    """Divide the rows that were read into those that may come in and those that were removed earlier.

    A row is held out by its own removal, by that of the row that an edit made of it, or by that of one that says the
    same: case and white space of the input and the system turn make no difference.

    Args:
        known: pair keys that the version has; they are never held out.
        replacing: pair key to the one that an edit made of it.
        restore: let removed rows in; purged ones are refused.

    Returns:
        The rows that may come in, and the removal of each pair key that may not.

    Raises:
        UserError: a purged row is to be restored.
    """
    log = read_removals(dataset)
    if not log.out:
        return list(rows), {}
    coming: list[SourceRow] = []
    held: dict[str, Removal] = {}
    purged: list[SourceRow] = []
    for row in rows:
        key = row.example.pair_key
        removal = None if key in known else log.holding(replacing.get(key, key), row.example.said) or log.out.get(key)
        if removal is None or (restore and removal.event == "removed"):
            coming.append(row)
        else:
            held[key] = removal
            if restore:
                purged.append(row)
    if purged:
        places = listed((f"{r.source}:{r.line}" for r in purged), len(purged), _MOST, "leave out --restore to see all")
        raise UserError(
            f"nothing was added: purged rows cannot be restored, and the files have {len(purged):,} of them\n{places}",
            where="--restore",
            fix="A purge is final. Take the rows out of the file, or leave out --restore: they then stay out.",
        )
    return coming, held


def held_out(rows: Sequence[SourceRow], held: Mapping[str, Removal]) -> str:
    """Return the warning of rows that stay out because they were removed earlier."""
    found = [(row, held[row.example.pair_key]) for row in rows if row.example.pair_key in held]
    told = (f"{row.source}:{row.line} ({e.event} on {e.day}: {e.because})" for row, e in found)
    lines = listed(told, len(found), _MOST, "the version's imports.jsonl lists all")
    back = " --restore adds those again that were not purged." if any(e.event == "removed" for _, e in found) else ""
    were = "row was removed earlier and stays" if len(found) == 1 else "rows were removed earlier and stay"
    return f"{len(found):,} {were} out.{back}\n{lines}"


def restored(dataset: Path, rows: Sequence[SourceRow]) -> list[Removal]:
    """Return the removals that these rows, which have come in, end."""
    log = read_removals(dataset)
    found = (log.holding(row.example.pair_key, row.example.said) for row in rows)
    return list(dict.fromkeys(removal for removal in found if removal is not None and removal.event == "removed"))


def lifted(removal: Removal, folder: Path) -> Removal:
    """Return the event that ends a removal, made now."""
    return removal.model_copy(update={"event": "restored", "when": now(), "by": current_author(folder)})


@dataclass(frozen=True)
class OutputSets:
    """Inputs with several outputs, in the dataset or in the files, and what became of their outputs."""

    inputs: int = 0
    replaced: int = 0
    unchanged: int = 0
    added: int = 0

    def __str__(self) -> str:
        """Return the counts as the notice of a replacement gives them."""
        inputs = f"{count_of(self.inputs, 'input')} with several outputs"
        outputs = f"{count_of(self.replaced, 'output')} replaced"
        return f"{inputs}: {outputs}, {self.unchanged:,} unchanged, {self.added:,} added"


@dataclass(frozen=True)
class Replacement:
    """Rows that take the place of known ones: pair key to the keys that go, and the row as it was read.

    ``standing`` are rows that were read whose answer was edited in review: the edit stands. ``joining`` are pair keys
    of rows that replace none and join the outputs of a known input.
    """

    olds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: dict[str, SourceRow] = field(default_factory=dict)
    standing: tuple[SourceRow, ...] = ()
    joining: frozenset[str] = frozenset()
    sets: OutputSets = OutputSets()


def supersede(
    parent: DatasetVersion,
    rows: Sequence[SourceRow],
    known: Mapping[str, Example],
    edited: Mapping[str, str],
    made: Collection[str],
    *,
    accept: bool,
) -> tuple[Replacement, list[SourceRow]]:
    """Find the known rows whose input was read with another output.

    The input is the prompt with case and white space set aside, system turn included, as for conflicts. A row that
    replaces another takes its input as the dataset spells it: the output supersedes, and nothing else.

    Where an input has several outputs, in the version or in the files, the files' outputs replace all of that input.
    They must be at least as many, so that a file with one mended reference never removes the others.

    Args:
        known: the rows of the domain by pair key.
        edited: pair key that a known one has replaced, in review or by an earlier replacement.
        made: the pair keys of :func:`made_by_replacement`.
        accept: inputs may have several outputs.

    Returns:
        What replaces what, and all rows that were read, those that replace others with the dataset's input.

    Raises:
        UserError: the files have fewer outputs of an input than the version, or several that are not accepted.
    """
    respelled = _respelled(rows, known)
    rows = [replace(row, example=respelled.get(row.example.pair_key, row.example)) for row in rows]
    standing = [row for row in rows if (now := edited.get(row.example.pair_key)) is not None and now not in made]
    left = {row.example.pair_key for row in standing}
    read: dict[str, list[SourceRow]] = defaultdict(list)
    for row in rows:
        if row.example.pair_key not in left:
            read[row.example.asked].append(row)
    there: dict[str, list[str]] = defaultdict(list)
    for key, example in known.items():
        there[example.asked].append(key)
    reviewed: dict[str, set[str]] = defaultdict(set)
    for row in standing:
        reviewed[row.example.asked].add(known[edited[row.example.pair_key]].output.strip())
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
    counts = OutputSets(
        inputs=len(sets),
        replaced=sum(len(keys) for each in sets for keys in each.gone),
        unchanged=sum(each.before - len(each.gone) for each in sets),
        added=sum(max(len(each.coming) - len(each.gone), 0) for each in sets),
    )
    return Replacement(olds, by, tuple(standing), frozenset(joining), counts), rows


def _respelled(rows: Sequence[SourceRow], known: Mapping[str, Example]) -> dict[str, Example]:
    """Return, by pair key, rows whose input no known row spells so, with the input of one that they would replace."""
    there: dict[str, list[Example]] = defaultdict(list)
    for _, example in sorted(known.items()):
        there[example.asked].append(example)
    found: dict[str, Example] = {}
    for row in rows:
        alike = there.get(row.example.asked, [])
        if any(old.input_key == row.example.input_key for old in alike):
            continue
        olds = [old for old in alike if _another_answer(old, row.example)]
        if olds:
            # Only the text: which turns are trained is the file's to say.
            turns = zip(row.example.prompt, olds[0].prompt, strict=True)
            prompt = (replace(turn, content=old.content) for turn, old in turns)
            found[row.example.pair_key] = Example((*prompt, row.example.messages[-1]))
    return found


@dataclass(frozen=True)
class _OutputSet:
    """The outputs of one input in the files, ``rows``, compared with the ``before`` ones of the version.

    ``gone`` are the pair keys of each output that the files do not have; ``coming`` is a row of each new output. Both
    are in the order of outputs: which became which is a guess, and this makes it a stable one.
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
            f"nothing was replaced: {count_of(len(sets), 'input')} with more outputs in version "
            f"{short(parent.digest)} than in the files\n{listed(places, len(sets), _FEW, 'complete these too')}",
            where="--replace",
            fix="Give all outputs of each input in the file. To mend or drop single ones, take them out with "
            "`tunewright data remove --keys`, then add the file with --accept-conflicts in place of --replace.",
        )


def _refuse_several(sets: Sequence[_OutputSet]) -> None:
    if sets:
        outputs = (
            "; ".join(f"{output} ({row.source}:{row.line})" for output, row in _excerpts(each.rows[:_FEW]))
            + (f" and {len(each.rows) - _FEW:,} more" if len(each.rows) > _FEW else "")
            for each in sets
        )
        raise UserError(
            f"nothing was replaced: the files have several outputs for {count_of(len(sets), 'known input')}; "
            "which is right?\n"
            f"{listed(outputs, len(sets), _MOST, '`tunewright data check FILE --json` lists all')}",
            where="--replace",
            fix="Keep the right output of each in the file. If several are right, add --accept-conflicts: the file's "
            "outputs of an input then replace all that it has.",
        )


def made_by_replacement(dataset: Path, parent: DatasetVersion) -> set[str]:
    """Return the pair keys that a replacement, and not a reviewer, put in another's place."""
    found: set[str] = set()
    for path in import_files(dataset, parent.manifest):
        for line in text_lines(path.read_text(encoding="utf-8")):
            if '"fate":"replaced"' in line:
                found.add(json.loads(line)["key"])
    return found
