"""Splits that are given: by the authors of the rows, with near rows on two sides of it, or by another dataset."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.config import DataConfig, Overlap, read_split
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of, first_of, listed
from tunewright.data.examples import template_groups
from tunewright.data.merge import Merge
from tunewright.data.readers import SourceRow
from tunewright.data.readers.source_files import is_hub_name, source_files
from tunewright.data.splits import SPLITS, Split, strictest
from tunewright.data.trace import places_by_key
from tunewright.data.versions import DatasetVersion, Member, import_files, import_records, load_version, short
from tunewright.data.versions.version import GivenSplit, SplitFrom

_MOST = 10


@dataclass(frozen=True)
class OverlappingRow:
    """A row of one split, or of none, in the cluster of a row that is held out; each with pair key and place."""

    key: str
    place: str
    split: Split | None
    """Its split by its authors or by the previous version; None: it was to be drawn."""
    near: str
    near_place: str
    held_out: Split


def splits_of_files(
    files: Iterable[str | Path], project: ProjectFolder, options: Sequence[str], reporter: Reporter
) -> dict[Path, Split | None]:
    """Return the files to read, each with the split that ``--split`` or data.sources gives it.

    Raises:
        UserError: an unknown split, an option for a file that is not added, or two splits for one file.
    """
    asked: dict[str, Split] = {}
    for option in options:
        name, _, named_split = option.rpartition("=")
        try:
            split = read_split(named_split)
        except ValueError as error:
            raise UserError(f"{error} (got {named_split!r})", where="--split") from None
        if asked.setdefault(name, split) != split:
            what = f"Two splits for {name or 'all files'}: {asked[name]} and {split}"
            raise UserError(what, where="--split", fix="Name the file of each: --split FILE=test.")
    configured = _configured(project, "split")
    names = [*asked, *(name for name, _ in configured)]
    matches = {name: _matches(name) for name in names}
    found: dict[Path, Split | None] = {}
    used = {""}
    for named in files:
        for path in source_files([named], reporter):
            mine = {name for name in asked if not name or _covers(name, matches[name], named, path)}
            splits = {asked[name] for name in mine}
            splits |= {split for name, split in configured if _covers(name, matches[name], named, path)}
            if len(splits) > 1:
                raise UserError(
                    f"Two splits for one file: {' and '.join(sorted(splits))}",
                    where=str(path),
                    fix="Give it one, in data.sources or in --split.",
                )
            used |= mine
            found[path] = next(iter(splits), None)
    if unused := asked.keys() - used:
        raise UserError(
            f"{min(unused)} is not among the files: {first_of(found)}",
            where="--split",
            fix="Name the file as it is added: --split FILE=test.",
        )
    return found


def split_by_name(path: Path) -> Split | None:
    """Return the split that one of the words of a file's name says, as in train-0001.csv; None for two splits."""
    found: set[Split] = set()
    for word in re.split(r"[\W\d_]+", path.name):
        with suppress(ValueError):
            found.add(read_split(word))
    return found.pop() if len(found) == 1 else None


def unused_split_notice(files: Iterable[Path]) -> str | None:
    """Return a notice if the names of files without a split say that there is one, such as train.csv and test.csv."""
    named: dict[Split, Path] = {}
    for path in files:
        for word in (*re.split(r"[\W\d_]+", path.name), path.parent.name):
            with suppress(ValueError):
                named.setdefault(read_split(word), path)
                break
    if len(named) < 2:
        return None
    names = " and ".join(path.name for path in named.values())
    return (
        f"{names} seem to be a split by their authors, but tunewright draws another one. To keep theirs, write "
        "{path: FILE, split: test} and the like under data.sources, or use `data add --split FILE=test`."
    )


def _matches(pattern: str) -> set[Path]:
    return {Path(each).resolve() for each in glob.iglob(pattern, recursive=True)}  # noqa: PTH207


def _covers(name: str, matches: Collection[Path], named: str | Path, path: Path) -> bool:
    """Return whether a name is that of the file, of a folder around it or of its dataset, or a pattern for it."""
    if is_hub_name(name):
        return Path(name) == Path(named)  # a Path has one slash after hf:
    full = path.resolve()
    return full in matches or full.is_relative_to(Path(name).resolve())


def settings_of(path: Path, project: ProjectFolder) -> DataConfig:
    """Return the data section for a file, with the header row of its source."""
    data, rows = project.config.data, _configured(project, "header_row")
    row = next((row for name, row in rows if _covers(name, _matches(name), path, path)), None)
    return data if row is None else data.model_copy(update={"header_row": row})


def configured_files(project: ProjectFolder) -> list[str]:
    """Return the names of data.sources; relative paths become relative to the working directory."""
    paths = [each.path for each in project.config.data.sources]
    return [path if is_hub_name(path) else str(project.root / path) for path in paths]


def _configured(project: ProjectFolder, key: str) -> list[tuple[str, Any]]:
    """Return the names of data.sources that set a key, each with its value."""
    values = [getattr(each, key) for each in project.config.data.sources]
    return [pair for pair in zip(configured_files(project), values, strict=True) if pair[1] is not None]


def require_given_rows(files: Mapping[Path, Split | None], rows: Iterable[SourceRow]) -> None:
    """Refuse a file that is given to dev or test and has no usable row."""
    read = {row.source for row in rows}
    for path, split in files.items():
        # The source of a workbook's rows is FILE:SHEET.
        if split in ("dev", "test") and not any(f"{source}:".startswith(f"{path}:") for source in read):
            raise UserError(
                f"No row for {split}: the file is given to {split}, and none of its rows can be added",
                where=str(path),
                fix="Correct its rows, or leave the file out.",
            )


def refuse_changes(project: ProjectFolder, merged: Merge, inherited: Mapping[str, Split]) -> None:
    """Refuse rows whose authors now give them another split than they have in the dataset or inherit."""
    known = {**inherited, **merged.former, **merged.former_given}
    # A pair may be in the authors' training and test files: then the test row is meant, as in the first version.
    given = sorted((row for row in merged.rows if row.split), key=lambda row: SPLITS.index(row.split or "train"))
    meant = {merged.kept_pair_key(row.example.pair_key): row for row in given}
    changed = {
        key: row
        for key, row in meant.items()
        if row.split != known.get(key, row.split)
        # A near-duplicate of a held-out row is another row: it stays out and changes nothing.
        and (row.example.pair_key not in merged.dropped or strictest([row.split, known[key]]) == row.split)
    }
    places: dict[str, str] = {}
    if changed and merged.parent:
        # A training file that was added together with the test is known, and so is the copy of a test row in it.
        records = import_records(import_files(project.dataset, merged.parent.manifest), "duplicate")
        copies = {(Path(each["source"]).name, each["line"], each["key"]) for each in records}
        changed = {k: r for k, r in changed.items() if (Path(r.source).name, r.line, r.example.pair_key) not in copies}
        places = places_by_key(project.dataset, merged.parent.manifest)
    if not changed:
        return
    first = next(iter(changed.values()))
    lines = (
        f"{row.source}:{row.line} is given to {row.split}, but is in {known[key]}"
        + (f" ({places[key]})" if key in places else "")
        for key, row in changed.items()
    )
    raise UserError(
        f"{count_of(len(changed), 'row')} would change the split, nothing was added\n"
        f"{listed(lines, len(changed), _MOST, 'they differ in the same way')}",
        where=f"{first.source}:{first.line}",
        fix="Rows keep their split in all versions. Give them the split that they have, or start a new dataset: move "
        "the dataset folder away and add all files together.",
    )


def find_overlaps(
    clusters: Mapping[str, Sequence[str]], side: Mapping[str, Split], given: Mapping[str, Split], merged: Merge
) -> dict[str, OverlappingRow]:
    """Return the rows, by pair key, that share a cluster with a row of a stricter split (test before dev before train).

    ``side`` maps pair keys to the split that authors or the previous version gave them. Only clusters that contain a
    row of ``given`` count: without one, the whole cluster follows its held-out row. A new row without a split follows a
    drawn row, but not one that is given: it would be added to the authors' test.
    """
    found: dict[str, OverlappingRow] = {}
    # A dev split that the authors did not give is drawn from their training rows: no other side.
    held_out_splits = {"test", "dev"} if "dev" in given.values() else {"test"}
    for keys in clusters.values():
        held_out = strictest(side.get(key) for key in keys)
        if held_out is None or held_out not in held_out_splits or given.keys().isdisjoint(keys):
            continue
        there = sorted(key for key in keys if side.get(key) == held_out)
        near = next((key for key in there if given.get(key) == held_out), there[0])
        for key in keys:
            if side.get(key) != held_out and (key in side or given.get(near) == held_out):
                found[key] = OverlappingRow(key, merged.place(key), side.get(key), near, merged.place(near), held_out)
    return found


def overlap_notice(rows: Iterable[OverlappingRow], mode: Overlap) -> str:
    """Return the warning for rows near a held-out row of another split, with the places of both."""
    rows = sorted(rows, key=lambda row: (len(row.place), row.place))
    done = {"drop-train": "left out as", "move": "moved with the cluster as", "keep": "kept although"}[mode]
    places = (f"{row.place} ({row.split or 'no split'}) is near {row.near_place} ({row.held_out})" for row in rows)
    return (
        f"{count_of(len(rows), 'row')} {done} near a held-out row of another split (data.on_overlap: {mode}):"
        f"\n{listed(places, len(rows), _MOST, '--json lists all')}"
    )


def given_notice(members: Sequence[Member], about: GivenSplit) -> str:
    """Return the notice of the authors' split: the rows that they gave to each split, and where dev is from."""
    given = Counter(m.given for m in members if m.given)
    counts = ", ".join(f"{given[split]:,} {split}" for split in SPLITS if split in given)
    text = f"The authors' split ({about.text}): {counts} of {count_of(sum(not m.mixed for m in members), 'row')}"
    drawn = "dev" not in given and sum(m.given == "train" and m.split == "dev" for m in members)
    return f"{text}; dev has {drawn:,} of their training rows, as they gave it none" if drawn else text


def given_split_of(
    members: Iterable[Member], merged: Merge, data: DataConfig, inherited: InheritedSplit | None
) -> GivenSplit | None:
    """Return the manifest's record of the authors' split; None if every row's split is drawn."""
    if not any(m.given for m in members):
        return None
    version = inherited.version if inherited else merged.parent
    before = version.manifest.given_split if version else None
    files = {Path(row.source).name for row in merged.rows if row.split is not None}
    return GivenSplit(
        column=data.split_column or (before.column if before else None),
        sources=tuple(sorted(files.union(before.sources if before else ()))),
        on_overlap=data.on_overlap,
    )


@dataclass(frozen=True)
class InheritedSplit:
    """Split of another dataset's version, for the rows that a new dataset shares with it."""

    version: DatasetVersion
    name: str
    splits: dict[str, Split]
    given: dict[str, Split]
    """The splits that authors gave to rows of that version."""

    @property
    def about(self) -> SplitFrom:
        """The record for the manifest."""
        return SplitFrom(name=self.name, digest=self.version.digest, rows=len(self.splits))

    def notice(self, members: Sequence[Member]) -> str:
        """Return the notice on the inherited split."""
        now = {m.key: m.split for m in members if not m.mixed}
        counts = ", ".join(f"{sum(now.get(key) == split for key in self.splits):,} {split}" for split in SPLITS)
        moved = sum(now.get(key, split) != split for key, split in self.splits.items())
        text = (
            f"Split from {self.name}, version {short(self.version.digest)}: {len(self.splits):,} of {len(now):,} rows "
            f"inherited ({counts})"
        )
        if moved:
            text += f"; {moved:,} of them moved, because they share a cluster with a held-out row"
        return text


def inherit_split(path: Path, merged: Merge, split_by: str) -> InheritedSplit:
    """Find the split of each row of a new dataset in another dataset's current version.

    A row inherits the split of its pair, else of the rows with its question: the prompt without system turns, ignoring
    case and white space. If the question is in several splits, test comes before dev and dev before train.

    A split by input is not inherited by output template if a template is in several splits: all its
    rows would follow one of them into the test split, and most training rows with them.
    """
    where = f"--split-from {path}"
    if merged.parent is not None:
        raise UserError(
            f"This dataset already has a split (version {short(merged.parent.digest)})",
            where=where,
            fix="Start a new project: only a dataset's first version can inherit a split.",
        )
    dataset = path / "dataset" if (path / "dataset").is_dir() else path
    if not (dataset / "versions").is_dir():
        raise UserError("No dataset there", where=where, fix="Name a project's folder, or its dataset folder.")
    version = load_version(dataset)
    by_key = {m.key: m for m in version.domain}
    by_question: dict[str, Member] = {}
    for split in SPLITS:  # test comes last and stays
        by_question |= {m.example.question_key: m for m in version.domain_of(split)}
    found = {key: by_key.get(key) or by_question.get(example.question_key) for key, example in merged.kept.items()}
    splits = {key: member.split for key, member in found.items() if member is not None}
    given = {key: member.given for key, member in found.items() if member is not None and member.given}
    if not splits:
        raise UserError(f"These files share no pair or input with version {short(version.digest)} there", where=where)
    name = dataset.resolve().parent.name
    if split_by == "output_template" and version.manifest.settings.split_by != "output_template":
        of_template: dict[str, list[Split]] = {}
        for key, template in template_groups({key: merged.kept[key].output for key in splits}).items():
            of_template.setdefault(template, []).append(splits[key])
        torn = sum(len(each) for each in of_template.values() if len(set(each)) > 1)
        if torn:
            raise UserError(
                f"{name} was split by input, and {torn:,} of its {len(splits):,} rows here have output templates in "
                "several splits",
                where="--split-from",
                fix="Leave out --split-from to split a new dataset by template, or set data.split_by: input.",
            )
    return InheritedSplit(version, name, splits, given)
