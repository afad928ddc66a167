"""Removing rows from a dataset: a new version, a log that keeps them out, and optionally a purge of their text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of, listed
from tunewright.data.dedup import count_near_repeats
from tunewright.data.options import RemoveOptions
from tunewright.data.purge import RemainingCopy, purge_rows
from tunewright.data.readers import SourceRow
from tunewright.data.review.edits import superseded_keys, without_unaccepted
from tunewright.data.selection import (
    Origins,
    count_rows_of_earlier_files,
    read_origins,
    row_document,
    select,
)
from tunewright.data.splits import MINIMUM_CLUSTERS, SPLITS, Split
from tunewright.data.trace import AdapterExposure, adapter_exposure
from tunewright.data.versions import (
    DatasetVersion,
    Manifest,
    Member,
    current_manifest,
    list_versions,
    load_version,
    locked,
    no_version,
    save_version,
)
from tunewright.data.versions.files import Place, read_places, read_rows
from tunewright.data.versions.logs import Removal, append_removals, describe_purges, read_removals
from tunewright.data.versions.version import new_manifest, rename_clusters

_MOST = 10
_ITEM_KEY = re.compile(rb'^\{"key": ?"([0-9a-f]{64})"', re.MULTILINE)


@dataclass(frozen=True)
class Removed:
    """A removed row: its place, and its document as ``--where`` sees it (empty after a purge)."""

    key: str
    split: Split
    source: str | None
    line: int | None
    document: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RemoveResult:
    """The rows removed, or to be removed (``dry_run``), and the adapters and evaluations that used them.

    ``version`` is current afterwards. ``created`` is false if a version of the remaining rows exists already, or if a
    purge names only rows of earlier versions. ``rows`` are those of the current version; ``earlier`` counts rows that
    only earlier versions have and whose text is purged too.
    """

    version: Manifest
    created: bool
    dry_run: bool
    because: str
    rows: tuple[Removed, ...]
    earlier: int
    adapters: tuple[AdapterExposure, ...]
    evaluations: dict[str, int]
    """Evaluation to the number of these rows that it measured on."""
    same_input: tuple[str, ...]
    """Keys of remaining rows with the same input as a removed one."""
    purged: int
    """Number of rows whose text was erased from all versions; 0 without a purge."""
    holders: tuple[RemainingCopy, ...]
    """Files of the project that still contain text of purged rows."""

    @property
    def splits(self) -> dict[Split, int]:
        """Number of removed rows by split."""
        counts = Counter(row.split for row in self.rows)
        return {split: counts[split] for split in SPLITS}

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        return {**asdict(self), "version": self.version.model_dump(mode="json"), "splits": self.splits}


def remove(project: OpenFolder, options: RemoveOptions = RemoveOptions()) -> RemoveResult:
    """Remove the rows that match all given conditions, which creates a new version.

    Adding a file does not bring them back without ``restore``. Other files of the project with the text of purged rows
    are listed.

    Args:
        options: the rows, and the reason.

    Raises:
        UserError: no reason, no matching row, or too few rows left in the dataset or in a split. Nothing has changed.
    """
    dataset, reporter = project.folder.dataset, project.reporter
    because, purge = " ".join(options.because.split()), options.purge
    if not because and not options.dry_run:
        raise UserError("--because is missing: a removal needs a reason", fix='For example --because "mislabelled".')
    if current_manifest(dataset) is None:
        raise no_version(dataset)
    with locked(dataset):
        parent = load_version(dataset)
        origins = read_origins(dataset)
        current = {m.key: m for m in parent.members}
        members = _all_members(dataset, parent) if purge else current
        purged_before = read_removals(dataset).purged if purge else {}
        chosen = select(options, members, purged_before, origins, dataset)
        if not chosen:
            before = [e for e in purged_before.values() if e.because == because]
            if not before:
                place = "any version" if purge else f"version {parent.digest[:12]}"
                raise UserError(
                    f"No row of {place} matches {options.selection}",
                    where="data remove",
                    fix="`tunewright data show ROW --json` shows a row's fields.",
                )
            reporter.say(f"Nothing more to purge: {describe_purges(before)}")
        if stay := count_rows_of_earlier_files(options, current.values(), origins, dataset):
            reporter.warn(
                f"{stay:,} rows of {options.source} stay, because another file had them first. Name that file too, "
                "or name the rows with --keys."
            )
        going = {m.key: m for m in chosen if m.key in current}
        left = [m for m in parent.members if m.key not in going]
        family = _with_former_rows(dataset, parent, chosen, members, {m.key for m in left}) if purge else {}
        if going:
            _require_enough(left)
        result = _result(project.folder, parent, list(going.values()), family, left, origins, because)
        if options.dry_run:
            return replace(result, dry_run=True)
        there = {manifest.digest for manifest in list_versions(dataset)}
        version, holders = parent.manifest, tuple[RemainingCopy, ...]()
        if going:
            version = _save(dataset, parent, going, left, origins, because, reporter)
        if family:
            holders = purge_rows(dataset, family, because, reporter)
            # The purge may have rewritten the manifest, without metadata.
            version = current_manifest(dataset) or version
    rows = tuple(replace(row, document={}) if purge else row for row in result.rows)
    created = bool(going) and version.digest not in there
    return replace(result, version=version, created=created, rows=rows, purged=len(family), holders=holders)


def _all_members(dataset: Path, parent: DatasetVersion) -> dict[str, Member]:
    """Return the rows of all versions that still have text, each with its place in the latest version."""
    places: dict[str, Place] = {}
    for manifest in list_versions(dataset):
        places |= read_places(dataset, manifest.digest)
    keys = places.keys() - read_removals(dataset).purged.keys()
    members = {key: Member(row, key, *places[key]) for key, row in read_rows(dataset / "rows", keys).items()}
    return members | {m.key: m for m in parent.members}


def _with_former_rows(
    dataset: Path,
    parent: DatasetVersion,
    chosen: Sequence[Member],
    members: Mapping[str, Member],
    left: Collection[str],
) -> dict[str, Member]:
    """Return the chosen rows, with former rows that they were edited from or that have their input."""
    family = {m.key for m in chosen}
    became = superseded_keys(dataset, parent.manifest)
    family |= {old for old, now in became.items() if now in family and old in members}
    questions = {members[key].example.question_key for key in family}
    family |= {key for key, m in members.items() if m.example.question_key in questions}
    return {key: members[key] for key in sorted(family) if key not in left}


def _result(
    project: ProjectFolder,
    parent: DatasetVersion,
    going: Sequence[Member],
    family: Mapping[str, Member],
    left: Sequence[Member],
    origins: Origins,
    because: str,
) -> RemoveResult:
    keys = {m.key for m in going} | family.keys()
    former = {old for old, now in superseded_keys(project.dataset, parent.manifest).items() if now in keys}
    questions = {m.example.question_key for m in (*going, *family.values())}
    documents = [row_document(m, origins) for m in going]
    return RemoveResult(
        version=parent.manifest,
        created=False,
        dry_run=False,
        because=because,
        rows=tuple(Removed(m.key, m.split, d["source"], d["line"], d) for m, d in zip(going, documents, strict=True)),
        earlier=len(family.keys() - {m.key for m in going}),
        adapters=adapter_exposure(project.dataset, project.adapters, sorted(keys | former)),
        evaluations=count_measured(project.evaluations, keys | former),
        same_input=tuple(m.key for m in left if m.example.question_key in questions),
        purged=0,
        holders=(),
    )


def _require_enough(left: Iterable[Member]) -> None:
    domain = [m for m in left if not m.mixed]
    clusters = len({m.cluster for m in domain})
    empty = next((split for split in SPLITS if all(m.split != split for m in domain)), None)
    what = f"No {empty} row would be left, nothing was removed"
    if empty is None:
        what = (
            f"Only {len(domain):,} rows in {clusters} independent clusters would be left (minimum {MINIMUM_CLUSTERS} "
            "clusters), nothing was removed"
        )
    if empty is not None or clusters < MINIMUM_CLUSTERS:
        raise UserError(what, where="data remove", fix="Add rows first, or remove fewer.")


def _save(
    dataset: Path,
    parent: DatasetVersion,
    going: Mapping[str, Member],
    left: Sequence[Member],
    origins: Origins,
    because: str,
    reporter: Reporter,
) -> Manifest:
    # The log comes first. After a crash, a row that is logged but still there is removed by the same command again; a
    # row that is gone but not logged would come back with its file.
    examples = {key: m.example for key, m in going.items()}
    append_removals(dataset, Removal.of_rows("removed", examples, because, dataset.parent))
    members = rename_clusters(without_unaccepted(dataset, parent.manifest, left, reporter))
    settings = parent.manifest.settings
    near = parent.manifest.counts.near_duplicates
    mix = parent.manifest.mix
    version = new_manifest(
        members,
        parent,
        settings,
        message=f"{count_of(len(going), 'row')} removed: {because}",
        mix=mix and mix.model_copy(update={"drawn": sum(m.mixed for m in members)}),
        near_duplicates=count_near_repeats(members, settings.dedup_threshold, reporter) if near else 0,
    )
    places = [(origins.first.get(key, ("unknown", 0)), key) for key in going]
    imports = [
        {"source": source, "line": line, "fate": "removed", "key": key, "reason": because}
        for (source, line), key in sorted(places)
    ]
    return save_version(dataset, version, members, imports, reporter)


def count_measured(evaluations: Path, keys: Collection[str]) -> dict[str, int]:
    """Count the rows that each evaluation measured on, by its folder's name."""
    found: dict[str, int] = {}
    for path in sorted(evaluations.glob("[!.]*/items.jsonl")):
        if count := sum(key.decode() in keys for key in _ITEM_KEY.findall(path.read_bytes())):
            found[path.parent.name] = count
    return found


def exclude_removed(
    dataset: Path,
    rows: Sequence[SourceRow],
    known: Collection[str],
    replacing: Mapping[str, str],
    *,
    restore: bool,
) -> tuple[list[SourceRow], dict[str, Removal]]:
    """Separate the rows that may be added from those that were removed earlier.

    A row stays out if it was removed itself, if its edited version was, or if a row with the same content was. Content
    is compared without system turns, and without case and white space of the input.

    Args:
        known: pair keys of the version, which never stay out.
        replacing: pair key to the key that an edit made of it.
        restore: add removed rows; purged ones are refused.
    """
    log = read_removals(dataset)
    if not log.out:
        return list(rows), {}
    coming: list[SourceRow] = []
    held: dict[str, Removal] = {}
    purged: list[SourceRow] = []
    for row in rows:
        key = row.example.pair_key
        removal = (
            None if key in known else log.holding(replacing.get(key, key), row.example.content_key) or log.out.get(key)
        )
        if removal is None or (restore and removal.event == "removed"):
            coming.append(row)
        else:
            held[key] = removal
            if restore:
                purged.append(row)
    if purged:
        places = listed((f"{r.source}:{r.line}" for r in purged), len(purged), _MOST, "leave out --restore to see all")
        raise UserError(
            f"Nothing was added: {len(purged):,} rows of the files were purged and cannot be restored\n{places}",
            where="--restore",
            fix="Delete the rows from the file, or add it without --restore, which skips them.",
        )
    return coming, held


def removed_rows_notice(rows: Sequence[SourceRow], held: Mapping[str, Removal]) -> str:
    """Return the warning for rows that stay out because they were removed earlier."""
    found = [(row, held[row.example.pair_key]) for row in rows if row.example.pair_key in held]
    entries = (f"{row.source}:{row.line} ({e.event} on {e.day}: {e.because})" for row, e in found)
    lines = listed(entries, len(found), _MOST, "the version's imports.jsonl lists all")
    back = " --restore adds those that were not purged." if any(e.event == "removed" for _, e in found) else ""
    return f"{count_of(len(found), 'row')} left out, removed earlier.{back}\n{lines}"


def removals_ended_by(dataset: Path, rows: Sequence[SourceRow]) -> list[Removal]:
    """Return the removals that end because these rows were added."""
    log = read_removals(dataset)
    if not log.out:
        return []
    found = (log.holding(row.example.pair_key, row.example.content_key) for row in rows)
    return list(dict.fromkeys(removal for removal in found if removal is not None and removal.event == "removed"))
