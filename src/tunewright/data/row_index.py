"""The rows of a version: search and filters, and the history of one row."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.config.project import ProjectFolder
from tunewright.data.remove import count_measured
from tunewright.data.review.edits import superseded_keys
from tunewright.data.review.reviews import VerdictEvent, read_reviews
from tunewright.data.review.suspects import conflicts
from tunewright.data.trace import KnownPlaces, RowOrigin, RowUse, blame, metadata_by_key, places_by_key, row_uses
from tunewright.data.versions import DatasetVersion, Manifest, Member, list_versions

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
        origin=blame(dataset, version, key),
        versions=tuple(each for each in list_versions(dataset) if key in (places.of(each.digest) or ())),
        reviews=tuple(sorted(verdicts, key=lambda each: (each.when, each.nth or 0))),
        adapters=tuple(use for use in uses if use.use != "absent"),
        evaluations=tuple(count_measured(project.evaluations, [key])),
    )
