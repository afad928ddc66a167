"""Reading a dataset: its versions and rows, searched, traced, compared and exported.

The functions that take a project are verbs: ``tunewright data show`` is :func:`show`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.data import dedup, trace, versions
from tunewright.data.dedup.leakage import LeakageReport, measure_leakage
from tunewright.data.remove import count_measured
from tunewright.data.review.edits import superseded_keys
from tunewright.data.review.reviews import VerdictEvent, read_reviews
from tunewright.data.review.suspects import conflicts
from tunewright.data.splits import Split
from tunewright.data.trace import KnownPlaces, RowOrigin, RowUse, metadata_by_key, places_by_key, row_uses
from tunewright.data.versions import DatasetVersion, Manifest, Member, list_versions, load_version
from tunewright.data.versions import diff as differences
from tunewright.data.versions import export as exporting
from tunewright.data.versions.diff import Diff
from tunewright.data.versions.export import Exported, Format


def version(project: OpenFolder, digest: str | None = None) -> DatasetVersion:
    """Return a dataset version (None: the current one)."""
    return load_version(project.folder.dataset, digest)


def log(project: OpenFolder) -> list[Manifest]:
    """Return the dataset's versions, newest last."""
    return list_versions(project.folder.dataset)


def show(project: OpenFolder, row: str) -> Member:
    """Return one row of the current version, by the beginning of its key or by ``FILE:LINE``."""
    return trace.find_row(project.folder.dataset, load_version(project.folder.dataset), row)


def metadata(project: OpenFolder, key: str) -> dict[str, Any]:
    """Return a current row's metadata from its source file, by the row's full key."""
    manifest = load_version(project.folder.dataset).manifest
    return trace.metadata_by_key(project.folder.dataset, manifest).get(key, {})


def cluster_counts(project: OpenFolder, member: Member) -> tuple[int, int]:
    """Return the number of rows in a row's cluster, and how many of them share its output."""
    return dedup.cluster_counts(load_version(project.folder.dataset), member)


def leakage(project: OpenFolder) -> LeakageReport:
    """Return the similarity of held-out rows to training rows, compared with that under a random split."""
    return measure_leakage(load_version(project.folder.dataset), project.folder.config.seed, project.reporter)


def diff(project: OpenFolder, a: str, b: str | None = None) -> Diff:
    """Return the differences between two versions (the second: the current one by default)."""
    before, after = (load_version(project.folder.dataset, digest, without_purged=True) for digest in (a, b))
    return differences.diff(before, after)


def blame(project: OpenFolder, row: str) -> RowOrigin:
    """Return a current row's origin: its file and the version that added it; ``row`` as in :meth:`show`."""
    dataset, current = project.folder.dataset, load_version(project.folder.dataset)
    return trace.blame(dataset, current, trace.find_row(dataset, current, row).key)


def trained_by(project: OpenFolder, row: str) -> tuple[str, tuple[RowUse, ...]]:
    """Return a row's key and its use in each adapter's training.

    Args:
        row: as in :meth:`show`; also the key of an earlier version's row, since adapters may have seen it there.
    """
    key = trace.find_key(project.folder.dataset, load_version(project.folder.dataset), row)
    return key, trace.uses_of_row(project.folder.dataset, project.folder.adapters, key)


def checkout(project: OpenFolder, version: str) -> Manifest:
    """Make an existing version the current one, by its digest or the beginning of it."""
    return versions.checkout(project.folder.dataset, version)


def export(
    project: OpenFolder,
    out: str | Path,
    form: Format = "chat",
    *,
    split: Split | None = None,
    version: str | None = None,
    metadata: bool = False,
) -> Exported:
    """Export a version (the current one by default), or one of its splits, as a file for other tools.

    ``metadata`` adds the source files' other keys to chat rows.
    """
    chosen = load_version(project.folder.dataset, version)
    dataset = project.folder.dataset
    extra = trace.metadata_by_key(dataset, chosen.manifest) if metadata else None
    rejected = trace.rejected_answers(dataset, chosen.manifest) if form == "preference" else None
    return exporting.export(chosen, Path(out), form, project.reporter, split=split, metadata=extra, rejected=rejected)


FLAGS = ("suspect", "conflict", "generated", "edited", "mixed")


@dataclass(frozen=True)
class RowQuery:
    """Conditions that a row must meet; an empty one is always met."""

    words: str = ""
    """Separated by white space; each is in the key, the input or the output, in any case."""
    split: str = ""
    cluster: str = ""
    """First digits of the cluster."""
    source: str = ""
    """The file that the row was first read from."""
    flag: str = ""
    """One of ``FLAGS``."""


class RowIndex:
    """The rows of a version, ready to be searched.

    Sources, metadata, edits and conflicts are looked up when the first query asks for them, and kept.
    """

    def __init__(self, dataset: Path, version: DatasetVersion) -> None:
        self._dataset = dataset
        self._version = version
        self._texts = tuple(f"{m.key} {m.example.input_text} {m.example.output}".casefold() for m in version.members)

    def find(self, query: RowQuery, suspects: AbstractSet[str] = frozenset()) -> list[Member]:
        """Return the matching rows, sorted by key; ``suspects`` are the keys that the flag of that name means."""
        members = self._version.members
        places: Sequence[int] = range(len(members))
        if query.split:
            places = [i for i in places if members[i].split == query.split]
        if query.cluster:
            places = [i for i in places if members[i].cluster.startswith(query.cluster.lower())]
        if query.source:
            sources = self._source_of_each
            places = [i for i in places if sources[i] == query.source]
        if query.flag in ("generated", "mixed"):
            places = [i for i in places if getattr(members[i], query.flag)]
        elif query.flag:
            flagged = suspects if query.flag == "suspect" else self._flagged[query.flag]
            places = [i for i in places if members[i].key in flagged]
        for word in query.words.casefold().split():
            places = [i for i in places if word in self._texts[i]]
        return [members[i] for i in places]

    @cached_property
    def sources(self) -> list[str]:
        """All files that rows of the version were first read from."""
        return sorted(set(filter(None, self._source_of_each)))

    @cached_property
    def _source_of_each(self) -> list[str]:
        """The file of each member; empty where no import records one."""
        places = places_by_key(self._dataset, self._version.manifest)
        return [sys.intern(places.get(m.key, "").rpartition(":")[0]) for m in self._version.members]

    @cached_property
    def metadata(self) -> Mapping[str, Mapping[str, Any]]:
        """The metadata of each row that has any, by pair key."""
        return metadata_by_key(self._dataset, self._version.manifest)

    def flags_of(self, member: Member) -> list[str]:
        """Return a row's flags; ``suspect`` is not among them."""
        flags = [flag for flag in ("conflict", "edited") if member.key in self._flagged[flag]]
        return flags + [flag for flag in ("generated", "mixed") if getattr(member, flag)]

    @cached_property
    def _flagged(self) -> dict[str, frozenset[str]]:
        return {
            "conflict": frozenset(each.key for each in conflicts(self._version.domain)),
            "edited": frozenset(superseded_keys(self._dataset, self._version.manifest).values()),
        }


@dataclass(frozen=True)
class RowHistory:
    """The history of a row of the current version; versions and reviews are sorted by time."""

    origin: RowOrigin
    versions: tuple[Manifest, ...]
    """Versions that have the row."""
    reviews: tuple[VerdictEvent, ...]
    """The current verdict of each reviewer."""
    adapters: tuple[RowUse, ...]
    """Adapters whose dataset version has the row, or may have it."""
    evaluations: tuple[str, ...]
    """Evaluations that measured on the row, by their folders' names."""


def row_history(project: ProjectFolder, version: DatasetVersion, key: str, places: KnownPlaces) -> RowHistory:
    """Return the history of a row, by its full key."""
    dataset = project.dataset
    verdicts = read_reviews(dataset).current_verdicts(key).values()
    uses = row_uses(dataset, project.adapters, [key], places)[key]
    return RowHistory(
        origin=trace.blame(dataset, version, key),
        versions=tuple(each for each in list_versions(dataset) if key in (places.of(each.digest) or ())),
        reviews=tuple(sorted(verdicts, key=lambda each: (each.when, each.nth or 0))),
        adapters=tuple(use for use in uses if use.use != "absent"),
        evaluations=tuple(count_measured(project.evaluations, [key])),
    )
