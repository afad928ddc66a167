"""Taking rows out of a dataset with a reason: a new version, a log that keeps them out, on request a purge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.purge import Holder, purge
from tunewright.data.repeats import count_near_repeats
from tunewright.data.review.edits import replaced
from tunewright.data.selecting import Origins, Selection, read_elsewhere_first, read_origins, row_document, select
from tunewright.data.splits import MINIMUM_CLUSTERS, SPLITS, Split
from tunewright.data.versions import (
    DatasetVersion,
    Manifest,
    Member,
    current_manifest,
    list_versions,
    load_version,
    locked,
    save_version,
)
from tunewright.data.versions.author import current_author
from tunewright.data.versions.changes import Seen, seen_by
from tunewright.data.versions.making import LeftOut, new_manifest, renamed
from tunewright.data.versions.members import Place, read_places
from tunewright.data.versions.removals import Removal, append_removals, purge_told, read_removals
from tunewright.data.versions.rows import read_rows

_ITEM_KEY = re.compile(rb'^\{"key": ?"([0-9a-f]{64})"', re.MULTILINE)


@dataclass(frozen=True)
class Removed:
    """One row that goes: its place, and its document as ``--where`` sees it; without texts where they are purged."""

    key: str
    split: Split
    source: str | None
    line: int | None
    document: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RemoveResult:
    """What was removed, or would be (``dry_run``), and who saw it.

    ``version`` is current afterwards. ``created`` says whether it is new: it is not where a version of just the rows
    that stay was there already, or where a purge names only rows of earlier versions. ``rows`` are those of the
    current version, ``earlier`` counts rows that only earlier versions have and whose text is purged with theirs.
    """

    version: Manifest
    created: bool
    dry_run: bool
    because: str
    rows: tuple[Removed, ...]
    earlier: int
    adapters: tuple[Seen, ...]
    evaluations: dict[str, int]
    """Evaluations that measured on some of the rows: how many."""
    same_input: tuple[str, ...]
    """Keys of rows that stay and have the input of one that goes."""
    purged: int
    """How many rows' text was erased from all versions; 0 without a purge."""
    holders: tuple[Holder, ...]
    """Files of the project that still have text of purged rows."""

    @property
    def splits(self) -> dict[Split, int]:
        """How many rows of each split go."""
        counts = Counter(row.split for row in self.rows)
        return {split: counts[split] for split in SPLITS}

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        return {**asdict(self), "version": self.version.model_dump(mode="json"), "splits": self.splits}


def remove(
    project: ProjectFolder,
    selection: Selection,
    because: str,
    reporter: Reporter,
    *,
    dry_run: bool = False,
    purge_text: bool = False,
) -> RemoveResult:
    """Take rows out of the current version, which makes a new one; no file brings them back unless it is asked to.

    Args:
        selection: which rows; with ``purge_text`` also rows that only earlier versions have.
        because: the reason, kept with the version and in the log of removals; may be empty for a dry run.
        dry_run: change nothing.
        purge_text: erase the rows' text from all versions too, with that of the rows that edits made them of and of
            former rows with the same input. What else in the project has the text is listed.

    Raises:
        UserError: no reason, no row matches, or too few rows, or none of a split, would be left. Nothing has changed.
    """
    dataset = project.dataset
    because = " ".join(because.split())
    if not because and not dry_run:
        raise UserError("a removal needs a reason", where="--because", fix='For example --because "mislabelled".')
    if current_manifest(dataset) is None:
        raise UserError("there is no dataset version yet", where=str(dataset), fix="`tunewright data add` makes one.")
    with locked(dataset):
        parent = load_version(dataset)
        origins = read_origins(dataset)
        current = {m.key: m for m in parent.members}
        members = _all_members(dataset, parent) if purge_text else current
        purged_before = read_removals(dataset).purged
        chosen = select(selection, members, purged_before if purge_text else (), origins, dataset)
        if not chosen:
            before = [e for e in purged_before.values() if e.because == because] if purge_text else []
            if not before:
                raise _nothing(selection, parent, purge_text)
            reporter.say(f"Nothing more to purge: {purge_told(before)}")
        if stay := read_elsewhere_first(selection, current.values(), origins, dataset):
            reporter.warn(
                f"Rows of {selection.source} that stay: {stay:,} came from another file first. Name that file too, or "
                "the rows by --keys."
            )
        going = [m for m in chosen if m.key in current]
        left = [m for m in parent.members if m.key not in {m.key for m in going}]
        family = _family(dataset, parent, chosen, members, {m.key for m in left}) if purge_text else {}
        result = _result(project, parent, going, family, left, origins, because)
        if going:
            _require_enough(left)
        if dry_run:
            return replace(result, dry_run=True)
        version, there = parent.manifest, {manifest.digest for manifest in list_versions(dataset)}
        if going:
            version = _save(project, parent, going, left, origins, because, reporter)
        holders: tuple[Holder, ...] = ()
        if family:
            holders = purge(project.root, dataset, _events(family, because, "purged", project), family, reporter)
            # The purge may have sealed it again, without metadata.
            version = current_manifest(dataset) or version
    rows = tuple(replace(row, document={}) if purge_text else row for row in result.rows)
    purged = len(family)
    created = bool(going) and version.digest not in there
    return replace(result, version=version, created=created, rows=rows, purged=purged, holders=holders)


def _nothing(selection: Selection, parent: DatasetVersion, purging: bool) -> UserError:
    where = "any version" if purging else f"version {parent.digest[:12]}"
    fix = "`tunewright data show ROW --json` shows a row's fields."
    return UserError(f"no row of {where} matches {selection.told}", where="data remove", fix=fix)


def _all_members(dataset: Path, parent: DatasetVersion) -> dict[str, Member]:
    """Return the rows of all versions that have their text, in the place that the latest version gives each."""
    places: dict[str, Place] = {}
    for manifest in list_versions(dataset):
        places |= read_places(dataset, manifest.digest)
    keys = places.keys() - read_removals(dataset).purged.keys()
    members = {key: Member(row, key, *places[key]) for key, row in read_rows(dataset / "rows", keys).items()}
    return members | {m.key: m for m in parent.members}


def _family(
    dataset: Path,
    parent: DatasetVersion,
    chosen: Sequence[Member],
    members: Mapping[str, Member],
    left: Collection[str],
) -> dict[str, Member]:
    """Return the chosen rows and, of those that are not current, what they were made of and what has their input."""
    family = {m.key for m in chosen}
    became = replaced(dataset, parent.manifest)
    family |= {old for old, now in became.items() if now in family and old in members}
    questions = {members[key].example.question for key in family}
    family |= {key for key, m in members.items() if m.example.question in questions}
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
    former = {old for old, now in replaced(project.dataset, parent.manifest).items() if now in keys}
    questions = {m.example.question for m in (*going, *family.values())}
    documents = [row_document(m, origins) for m in going]
    return RemoveResult(
        version=parent.manifest,
        created=False,
        dry_run=False,
        because=because,
        rows=tuple(Removed(m.key, m.split, d["source"], d["line"], d) for m, d in zip(going, documents, strict=True)),
        earlier=len(family.keys() - {m.key for m in going}),
        adapters=seen_by(project.dataset, project.adapters, sorted(keys | former)),
        evaluations=_measured(project.evaluations, keys | former),
        same_input=tuple(m.key for m in left if m.example.question in questions),
        purged=0,
        holders=(),
    )


def _measured(evaluations: Path, keys: Collection[str]) -> dict[str, int]:
    """Return how many of these rows each evaluation measured on, by its folder's name."""
    found: dict[str, int] = {}
    for path in sorted(evaluations.glob("[!.]*/items.jsonl")):
        if count := sum(key.decode() in keys for key in _ITEM_KEY.findall(path.read_bytes())):
            found[path.parent.name] = count
    return found


def _require_enough(left: Iterable[Member]) -> None:
    domain = [m for m in left if not m.mixed]
    clusters = {m.cluster for m in domain}
    for split in SPLITS:
        if all(m.split != split for m in domain):
            raise UserError(
                f"no {split} row would be left, nothing was removed",
                where="data remove",
                fix="Add rows first, or remove fewer.",
            )
    if len(clusters) < MINIMUM_CLUSTERS:
        raise UserError(
            f"{len(domain):,} rows in {len(clusters)} independent clusters would be left, nothing was removed; train, "
            f"dev and test need at least {MINIMUM_CLUSTERS}",
            where="data remove",
            fix="Add rows first, or remove fewer.",
        )


def _events(rows: Mapping[str, Member], because: str, event: Any, project: ProjectFolder) -> list[Removal]:
    by, when = current_author(project.root), now()
    return [
        Removal(event=event, key=key, said=m.example.said, because=because, when=when, by=by)
        for key, m in sorted(rows.items())
    ]


def _save(
    project: ProjectFolder,
    parent: DatasetVersion,
    going: Sequence[Member],
    left: Sequence[Member],
    origins: Origins,
    because: str,
    reporter: Reporter,
) -> Manifest:
    # The log first: a row that is logged and still there is removed by the same command again, but one that is gone
    # and not logged would come back with its file.
    append_removals(project.dataset, _events({m.key: m for m in going}, because, "removed", project))
    members = renamed(left)
    settings = parent.manifest.settings
    near = parent.manifest.counts.near_duplicates
    mix = parent.manifest.mix
    version = new_manifest(
        members,
        parent,
        settings,
        message=f"{len(going):,} row{'' if len(going) == 1 else 's'} removed: {because}",
        sources=[],
        left_out=LeftOut(),
        mix=mix and mix.model_copy(update={"drawn": sum(m.mixed for m in members)}),
        near_duplicates=count_near_repeats(members, settings.dedup_threshold, reporter) if near else 0,
    )
    places = [(origins.first.get(m.key, ("unknown", 0)), m.key) for m in going]
    imports = [
        {"source": source, "line": line, "fate": "removed", "key": key, "reason": because}
        for (source, line), key in sorted(places)
    ]
    return save_version(project.dataset, version, members, imports, reporter)
