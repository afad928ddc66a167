"""What became of rows over versions: what differs between two, who brought a row in, which adapters saw it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tunewright.core.errors import UserError
from tunewright.core.io import text_lines
from tunewright.data.review.reviews import read_reviews
from tunewright.data.splits import Split
from tunewright.data.versions import (
    IMPORTS,
    DatasetVersion,
    Manifest,
    Member,
    ancestry,
    list_versions,
    load_version,
    short,
    version_folder,
)
from tunewright.data.versions.members import Place, Places, read_places


@dataclass(frozen=True)
class Edited:
    """One input whose ideal output differs: the row of the first version and the one of the second."""

    before: Member
    after: Member

    def as_dict(self) -> dict[str, Any]:
        """Return the edit as ``--json`` prints it."""
        return {
            "input": self.after.example.input_text,
            "before": {"key": self.before.key, "output": self.before.example.output, "split": self.before.split},
            "after": {"key": self.after.key, "output": self.after.example.output, "split": self.after.split},
        }


@dataclass(frozen=True)
class Moved:
    """A row of both versions that is in another split now."""

    member: Member
    before: Split

    def as_dict(self) -> dict[str, Any]:
        """Return the move as ``--json`` prints it."""
        return {**_row(self.member), "before": self.before}


@dataclass(frozen=True)
class Diff:
    """How one version differs from another; rows are in the order of their keys.

    An edit is a row that is gone and a new one with the same input key; neither is counted as removed or added.
    """

    a: Manifest
    b: Manifest
    added: tuple[Member, ...]
    removed: tuple[Member, ...]
    edited: tuple[Edited, ...]
    moved: tuple[Moved, ...]
    regrouped: int
    """Rows of both versions that share their cluster with other rows of both than before."""
    purged: tuple[str, ...] = ()
    """Pair keys of rows of either version whose text was purged: they are compared by nothing here."""

    @cached_property
    def test_changes(self) -> dict[str, tuple[str, ...]]:
        """Keys of the rows added to the test split, removed from it, edited in it, moved in or out of it."""
        return {
            "added": tuple(m.key for m in self.added if m.split == "test"),
            "removed": tuple(m.key for m in self.removed if m.split == "test"),
            "edited": tuple(e.after.key for e in self.edited if "test" in (e.before.split, e.after.split)),
            "moved": tuple(m.member.key for m in self.moved if "test" in (m.before, m.member.split)),
        }

    @property
    def test_rows_changed(self) -> int:
        """How many rows these are."""
        return sum(map(len, self.test_changes.values()))

    @property
    def comparable(self) -> bool:
        """True if scores on the one version's test split can be compared with scores on the other's."""
        return self.test_rows_changed == 0

    @property
    def same(self) -> bool:
        """True if both have the same rows in the same splits and clusters."""
        return self.a.digest == self.b.digest

    @cached_property
    def metadata(self) -> dict[str, tuple[Any, Any]]:
        """What else the manifests say differently: author, message, sources, settings; both values of each."""
        facts = [_metadata(manifest) for manifest in (self.a, self.b)]
        names = [*facts[0], *(name for name in facts[1] if name not in facts[0])]
        pairs = {name: (facts[0].get(name), facts[1].get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def as_dict(self) -> dict[str, Any]:
        """Return the whole difference as ``--json`` prints it."""
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
    """Return what has to be done to version ``a`` to get version ``b``."""
    before, after = ({m.key: m for m in version.members} for version in (a, b))
    gone, new = _by_input(before, after), _by_input(after, before)
    edited: list[Edited] = []
    for key in gone.keys() & new.keys():
        # Where one input has several outputs, which became which is a guess; the outputs' order makes it a stable one.
        for old, now in zip(list(gone[key]), list(new[key]), strict=False):
            edited.append(Edited(old, now))
            gone[key].remove(old)
            new[key].remove(now)
    both = before.keys() & after.keys()
    return Diff(
        a=a.manifest,
        b=b.manifest,
        added=_sorted(new),
        removed=_sorted(gone),
        edited=tuple(sorted(edited, key=lambda e: e.after.key)),
        moved=tuple(Moved(after[k], before[k].split) for k in sorted(both) if before[k].split != after[k].split),
        regrouped=_regrouped([before[key] for key in both], [after[key] for key in both]),
        purged=tuple(sorted({*a.purged, *b.purged})),
    )


def _regrouped(before: Sequence[Member], after: Sequence[Member]) -> int:
    """Count the rows whose cluster holds other ones of these rows; a cluster's name may change without that."""
    partitions: list[dict[str, frozenset[str]]] = []
    for members in (before, after):
        clusters: dict[str, set[str]] = defaultdict(set)
        for member in members:
            clusters[member.cluster].add(member.key)
        partitions.append({key: keys for keys in map(frozenset, clusters.values()) for key in keys})
    return sum(partitions[0][member.key] != partitions[1][member.key] for member in before)


def _by_input(mine: dict[str, Member], other: dict[str, Member]) -> dict[str, list[Member]]:
    """Return the members that only one version has, by input key, each list in the order of outputs."""
    found: dict[str, list[Member]] = defaultdict(list)
    for key in mine.keys() - other.keys():
        found[mine[key].example.input_key].append(mine[key])
    return {key: sorted(members, key=lambda m: (m.example.output, m.key)) for key, members in found.items()}


def _sorted(groups: dict[str, list[Member]]) -> tuple[Member, ...]:
    return tuple(sorted((m for members in groups.values() for m in members), key=lambda m: m.key))


def _row(member: Member) -> dict[str, Any]:
    return {
        "key": member.key,
        "split": member.split,
        "cluster": member.cluster,
        "messages": [m.as_dict() for m in member.example.messages],
    }


def _metadata(manifest: Manifest) -> dict[str, Any]:
    facts = manifest.model_dump(mode="json", include={"author", "message", "sources"})
    return {**facts, **{f"settings.{k}": v for k, v in manifest.settings.model_dump(mode="json").items()}}


@dataclass(frozen=True)
class Blame:
    """How a row came into the dataset.

    ``source`` and ``line`` are where it was read, if an import says so. ``edit_of`` are pair keys with the same input
    that the version before had and this one no longer has; ``beside`` those that it still has (a conflict).
    ``older_missing`` is the parent that could not be asked, because the dataset does not have it.
    """

    key: str
    version: Manifest
    source: str | None
    line: int | None
    edit_of: tuple[str, ...]
    beside: tuple[str, ...]
    reviewers: tuple[str, ...]
    older_missing: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as ``--json`` prints it."""
        return {**asdict(self), "version": self.version.model_dump(mode="json")}


def blame(dataset: Path, version: DatasetVersion, key: str) -> Blame:
    """Return the version that brought a row in, and where that version had it from.

    Args:
        key: the row's whole pair key.

    Raises:
        UserError: the version has no such row, or an older version was changed by hand.
    """
    if all(m.key != key for m in version.members):
        raise UserError(f"version {short(version.digest)} has no row {key!r}", where="ROW")
    line = ancestry(dataset, version.manifest)
    first = 0
    while first + 1 < len(line) and key in read_places(dataset, line[first + 1].digest):
        first += 1
    brought = line[first]
    parent = line[first + 1] if first + 1 < len(line) else None
    edit_of, beside = _same_input(dataset, version, brought, parent, key)
    record = _import_of(dataset, brought, key) or {}
    place = record.get("line")
    if record.get("fate") == "edited":
        place = read_reviews(dataset).cited(record)
    return Blame(
        key=key,
        version=brought,
        source=record.get("source") if place is not None else None,
        line=place,
        edit_of=edit_of,
        beside=beside,
        reviewers=tuple(record.get("reviewers", ())),
        older_missing=brought.parent if parent is None else None,
    )


def _same_input(
    dataset: Path, version: DatasetVersion, brought: Manifest, parent: Manifest | None, key: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parent's other rows with this row's input: those gone in the version that brought it, and those it kept."""
    if parent is None:
        return (), ()
    asked = next(m.example.input_key for m in version.members if m.key == key)
    former = load_version(dataset, parent.digest, without_purged=True)
    before = [m.key for m in former.members if m.example.input_key == asked]
    there = read_places(dataset, brought.digest)
    return tuple(k for k in before if k not in there), tuple(k for k in before if k in there)


def _import_of(dataset: Path, manifest: Manifest, key: str) -> dict[str, Any] | None:
    path = version_folder(dataset, manifest.digest) / IMPORTS
    for number, text in enumerate(text_lines(path.read_text(encoding="utf-8")), start=1):
        if key not in text:
            continue
        try:
            record: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError:
            raise UserError("not an import's record", where=f"{path}:{number}", fix="Restore the file.") from None
        if record.get("fate") in ("added", "edited", "replaced", "mixed") and record.get("key") == key:
            return record
    return None


Use = Literal["trained", "left out", "dev", "test", "absent", "unknown"]


@dataclass(frozen=True)
class Sighting:
    """What one adapter's training did with a row: ``dev`` chose its checkpoint, ``absent`` never had it.

    ``reason`` says why the use is unknown, or by how many tokens a row was too long; else it is empty.
    """

    adapter: str
    version: str | None
    use: Use
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the sighting as ``--json`` prints it."""
        return asdict(self)


def where(dataset: Path, adapters: Path, key: str) -> tuple[Sighting, ...]:
    """What every adapter of a project did with a row, in the order of their names; those that trained on it say so.

    Args:
        dataset: the project's dataset folder.
        adapters: the project's folder of adapters.
        key: the row's whole pair key, of whichever version.

    Raises:
        UserError: a lineage or a version that cannot be read.
    """
    return next(iter(sightings(dataset, adapters, [key]).values()))


def sightings(dataset: Path, adapters: Path, keys: Iterable[str]) -> dict[str, tuple[Sighting, ...]]:
    """Return what every adapter did with each of these rows, as :func:`where` does for one."""
    digests = {m.digest for m in list_versions(dataset)}
    lineages = list(_lineages(adapters))
    places: dict[str, Places] = {}
    found: dict[str, tuple[Sighting, ...]] = {}
    for key in keys:
        row: list[Sighting] = []
        for name, lineage in lineages:
            version = (lineage.get("dataset") or {}).get("digest")
            if version not in digests:
                reason = (
                    f"dataset version {short(version)} is not here"
                    if version
                    else "its lineage names no dataset version"
                )
                row.append(Sighting(name, version, "unknown", reason))
                continue
            if version not in places:
                places[version] = read_places(dataset, version)
            row.append(_sighting(name, version, places[version].get(key), lineage, key))
        found[key] = tuple(row)
    return found


def _sighting(name: str, version: str, place: Place | None, lineage: dict[str, Any], key: str) -> Sighting:
    if place is None:
        return Sighting(name, version, "absent")
    if place.split != "train":
        return Sighting(name, version, place.split)
    rendering = lineage.get("rendering")
    if rendering is None:
        return Sighting(name, version, "unknown", "its lineage does not say which training rows were left out")
    for row in rendering["train"]["left_out"]:
        if row["key"] == key:
            return Sighting(name, version, "left out", f"{row['tokens']:,} tokens")
    return Sighting(name, version, "trained")


def _lineages(adapters: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(adapters.glob("[!.]*/lineage.json")):
        try:
            lineage = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"not a lineage that can be read: {error}", where=str(path)) from None
        if not isinstance(lineage, dict):
            raise UserError("not a lineage: a JSON object is expected", where=str(path))
        yield path.parent.name, lineage


@dataclass(frozen=True)
class Seen:
    """How many of some rows one adapter was trained on, chosen on (dev), and had in its test.

    ``unknown`` rows are those of which its lineage or its dataset version says nothing.
    """

    adapter: str
    version: str | None
    trained: int
    dev: int
    test: int
    unknown: int


def seen_by(dataset: Path, adapters: Path, keys: Iterable[str]) -> tuple[Seen, ...]:
    """Return the adapters whose training had any of these rows, or may have had, in the order of their names."""
    counts: dict[tuple[str, str | None], Counter[Use]] = defaultdict(Counter)
    for row in sightings(dataset, adapters, keys).values():
        for found in row:
            counts[found.adapter, found.version][found.use] += 1
    return tuple(
        Seen(name, version, uses["trained"], uses["dev"], uses["test"], uses["unknown"])
        for (name, version), uses in counts.items()
        if uses.keys() & {"trained", "dev", "test", "unknown"}
    )


def trained_on(sightings: Sequence[Sighting]) -> list[str]:
    """Return the adapters that were trained on the row."""
    return [s.adapter for s in sightings if s.use == "trained"]
