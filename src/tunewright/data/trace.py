"""Tracing rows: by key or FILE:LINE to a row, to the import that added it, and to the adapters that used it."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.data.readers.validate import REJECTED
from tunewright.data.review.edits import superseded_keys
from tunewright.data.review.reviews import read_reviews
from tunewright.data.versions import (
    IMPORTS,
    DatasetVersion,
    Manifest,
    Member,
    ancestry,
    import_files,
    import_records,
    list_versions,
    load_version,
    row_numbers,
    short,
    version_folder,
)
from tunewright.data.versions.files import Places, read_places
from tunewright.data.versions.logs import read_removals


def find_row(dataset: Path, version: DatasetVersion, row: str) -> Member:
    """Return the member that ``row`` names: by number, by the first digits of its key, or by an added ``FILE:LINE``."""
    place = re.fullmatch(r"(.+):(\d{1,12})", row)
    key = _key_at(dataset, version, place[1], int(place[2])) if place else row.lower()
    numbers = row_numbers(dataset, version.manifest) if row.isdecimal() else {}
    found = [m for m in version.members if str(numbers.get(m.key)) == row]
    found = found or [m for m in version.members if key and m.key.startswith(key)]
    if len(found) == 1:
        return found[0]
    if found:
        keys = ", ".join(short(m.key) for m in found[:4])
        raise UserError(f"{len(found)} rows are named {row!r}", where="ROW", fix=f"Give more digits of a key: {keys}.")
    if key in (out := read_removals(dataset).out):  # the row that an edit or a replacement made of this one
        raise UserError(f"The row was removed: {out[key].because}", where=row)
    raise UserError(
        f"Version {version.digest[:12]} has no row {row!r}",
        where="ROW",
        fix="Give a row's number, the first digits of its key, or FILE:LINE of an added file.",
    )


def find_key(dataset: Path, version: DatasetVersion, row: str) -> str:
    """Return the key of the row that ``row`` names, in this version, else in any version (a removed row)."""
    known = {m.key for m in version.members}
    numbers = row_numbers(dataset, version.manifest) if row.isdecimal() else {}
    if removed := [key for key, number in numbers.items() if str(number) == row and key not in known]:
        return removed[-1]
    if re.fullmatch("[0-9a-fA-F]{4,64}", row) and not any(key.startswith(row.lower()) for key in known):
        digests = (manifest.digest for manifest in list_versions(dataset))
        found = {key for digest in digests for key in read_places(dataset, digest) if key.startswith(row.lower())}
        if len(found) > 1:
            raise UserError(f"{len(found)} rows are named {row!r}", where="ROW", fix="Give more digits.")
        if found:
            return found.pop()
    return find_row(dataset, version, row).key


def _key_at(dataset: Path, version: DatasetVersion, file: str, line: int) -> str:
    reviews = read_reviews(dataset)
    imports = []
    for record in import_records(import_files(dataset, version.manifest)):
        if record["fate"] == "edited":
            record["line"] = reviews.cited_line(record)
        if record["line"] is not None:  # otherwise the verdict is in another copy's log
            imports.append(record)
    source = source_name(file, sorted({row["source"] for row in imports}), dataset.parent)
    found = next((row for row in imports if row["source"] == source and row["line"] == line), None)
    if found is None:
        last = max(row["line"] for row in imports if row["source"] == source)
        raise UserError(f"No row was read from line {line} of {source} (last row: line {last})", where="ROW")
    why = {
        "skipped": "The row was left out",
        "removed": "The row was removed",
        "not mixed": "The row was not mixed in",
        "contaminated": "The row was left out: it contains a test input or a benchmark item",
        "overlapping": "The row was left out: it is near a held-out row of another split",
        "unaccepted": "The row was left out: a model wrote it, nobody has accepted it, and it is too similar to a "
        "held-out row",
    }.get(found["fate"])
    if why is not None:
        raise UserError(f"{why}: {found['reason']}" if "reason" in found else why, where=f"{file}:{line}")
    key = str(found.get("of", found["key"]))
    return superseded_keys(dataset, version.manifest).get(key, key)


def source_name(file: str, sources: Sequence[str], root: Path, where: str = "ROW") -> str:
    """Return the added file that ``file`` names: by its name in the project, its path, or its file name."""
    path = Path(file).resolve()
    within = path.relative_to(root.resolve()).as_posix() if path.is_relative_to(root.resolve()) else None
    for name in filter(None, (file, within)):
        if name in sources:
            return name
    # A sheet of a workbook is named FILE:SHEET.
    same = [source for source in sources if path.name in (Path(source).name, Path(source.rpartition(":")[0]).name)]
    if len(same) == 1:
        return same[0]
    what = f"{len(same)} added files are named {path.name}" if same else f"No row was read from a file {file}"
    raise UserError(what, where=where, fix=f"Added files: {', '.join(sources)}.")


_PRESENT = ("added", "known", "mixed", "replaced")
"""Fates in imports.jsonl of rows that are in the version; a duplicate's file and metadata belong to another row."""


def places_by_key(dataset: Path, manifest: Manifest) -> dict[str, str]:
    """Return ``FILE:LINE`` of the first row with each pair key; an edited row has the place of the original."""
    places: dict[str, str] = {}
    for key, record in _records(dataset, manifest):
        places[key] = f"{record['source']}:{record['line']}"  # records come newest first, so the oldest wins
    return places


def metadata_by_key(dataset: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return the newest metadata of each pair key with metadata."""
    found: dict[str, dict[str, Any]] = {}
    for key, record in _records(dataset, manifest):
        if "metadata" in record:
            found.setdefault(key, record["metadata"])
    return found


def read_metadata(dataset: Path, manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    """Return the metadata of each pair key, from the newest record of each place, exact duplicates included."""
    found: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
    for key, record in _records(dataset, manifest, "duplicate"):
        if "metadata" in record:
            found.setdefault((record["source"], record["line"]), (key, record["metadata"]))
    by_key: dict[str, list[dict[str, Any]]] = {}
    for key, metadata in found.values():
        by_key.setdefault(key, []).append(metadata)
    return by_key


def rejected_answers(dataset: Path, manifest: Manifest) -> dict[str, list[Any]]:
    """Return the distinct rejected answers of each pair key with such answers, as the metadata of preference rows."""
    found: dict[str, list[Any]] = {}
    for key, rows in read_metadata(dataset, manifest).items():
        answers = {canonical_json(metadata[REJECTED]): metadata[REJECTED] for metadata in rows if REJECTED in metadata}
        if answers:
            found[key] = list(answers.values())
    return found


def _records(dataset: Path, manifest: Manifest, *also: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the present key and the record of each row read, newest import first; duplicates only if exact."""
    edits = superseded_keys(dataset, manifest)
    for record in import_records(import_files(dataset, manifest), *_PRESENT, *also):
        if "key" in record and record.get("of", record["key"]) == record["key"]:
            yield edits.get(record["key"], record["key"]), record


@dataclass(frozen=True)
class Origins:
    """The files that rows were read from, and their metadata."""

    first: dict[str, tuple[str, int]] = field(default_factory=dict)
    again: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Pair key to all files that have it, including the first."""
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Pair key to the newest metadata, if its file had any."""

    @property
    def sources(self) -> list[str]:
        """Files that rows came from."""
        return sorted({source for names in self.again.values() for source in names})


def read_origins(dataset: Path) -> Origins:
    """Return the place and metadata of each row of any version, by pair key.

    An edited row has the place and metadata of the row before the edit.
    """
    origins = Origins()
    for manifest in list_versions(dataset):
        path = version_folder(dataset, manifest.digest) / IMPORTS
        for record in import_records([path], "added", "mixed", "known", "replaced", "edited"):
            key = record["key"]
            if record["fate"] == "edited":
                if record["before"] in origins.first:
                    origins.first.setdefault(key, origins.first[record["before"]])
                    origins.again[key] |= origins.again[record["before"]]
                if record["before"] in origins.metadata:
                    origins.metadata.setdefault(key, origins.metadata[record["before"]])
                continue
            origins.first.setdefault(key, (record["source"], record["line"]))
            origins.again[key].add(record["source"])
            if "metadata" in record:
                origins.metadata[key] = record["metadata"]
            elif record.get("before") in origins.metadata:  # replaced
                origins.metadata.setdefault(key, origins.metadata[record["before"]])
    return origins


@dataclass(frozen=True)
class RowOrigin:
    """Origin of a row in the dataset.

    ``source`` and ``line`` are its place, if an import records it. ``edit_of`` are pair keys with
    the same input that the previous version had and this version lacks; ``conflicts_with`` are such
    keys that it still has. ``older_missing`` is the parent, if the dataset lacks it.
    """

    key: str
    version: Manifest
    source: str | None
    line: int | None
    edit_of: tuple[str, ...]
    conflicts_with: tuple[str, ...]
    reviewers: tuple[str, ...]
    older_missing: str | None


def blame(dataset: Path, version: DatasetVersion, key: str) -> RowOrigin:
    """Return the version that added a row, by its full pair key, and the place where it was read."""
    if all(m.key != key for m in version.members):
        raise UserError(f"Version {short(version.digest)} has no row {key!r}", where="ROW")
    line = ancestry(dataset, version.manifest)
    first = 0
    while first + 1 < len(line) and key in read_places(dataset, line[first + 1].digest):
        first += 1
    brought = line[first]
    parent = line[first + 1] if first + 1 < len(line) else None
    edit_of, conflicts_with = _same_input(dataset, version, brought, parent, key)
    files = [version_folder(dataset, brought.digest) / IMPORTS]
    records = import_records(files, "added", "edited", "replaced", "mixed", key=key)
    record = next((each for each in records if each["key"] == key), {})
    place = record.get("line")
    if record.get("fate") == "edited":
        place = read_reviews(dataset).cited_line(record)
    return RowOrigin(
        key=key,
        version=brought,
        source=record.get("source") if place is not None else None,
        line=place,
        edit_of=edit_of,
        conflicts_with=conflicts_with,
        reviewers=tuple(record.get("reviewers", ())),
        older_missing=brought.parent if parent is None else None,
    )


def _same_input(
    dataset: Path, version: DatasetVersion, brought: Manifest, parent: Manifest | None, key: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the parent's other rows with this row's input: the rows it dropped, and the rows it kept."""
    if parent is None:
        return (), ()
    asked = next(m.example.input_key for m in version.members if m.key == key)
    former = load_version(dataset, parent.digest, without_purged=True)
    before = [m.key for m in former.members if m.example.input_key == asked]
    there = read_places(dataset, brought.digest)
    return tuple(k for k in before if k not in there), tuple(k for k in before if k in there)


def ancestors(lineage: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield an adapter's lineage, then the lineage of the adapter that its training started from, and so on."""
    at: Mapping[str, Any] | None = lineage
    while at is not None:
        yield at
        at = at.get("parent")


Use = Literal["trained", "left out", "dev", "test", "absent", "unknown"]


@dataclass(frozen=True)
class RowUse:
    """Use of a row by one adapter's training: ``dev`` selected the checkpoint, ``absent`` means not in the version.

    An adapter that started from another one has also used the other adapter's rows. ``reason`` explains
    an unknown use, names such a parent, or gives the length of a row that was too long; else it is empty.
    """

    adapter: str
    version: str | None
    use: Use
    reason: str = ""


def uses_of_row(dataset: Path, adapters: Path, key: str) -> tuple[RowUse, ...]:
    """Return the use of a row, of any version, by each adapter of a project, sorted by name."""
    return row_uses(dataset, adapters, [key])[key]


def row_uses(
    dataset: Path, adapters: Path, keys: Iterable[str], places: KnownPlaces | None = None
) -> dict[str, tuple[RowUse, ...]]:
    """Return the uses of several rows, by key; see :func:`uses_of_row`."""
    lineages = list(_lineages(adapters))
    places = places or KnownPlaces(dataset)
    return {key: tuple(_row_use(name, lineage, places, key) for name, lineage in lineages) for key in keys}


class KnownPlaces:
    """The places of each version's rows, read once."""

    def __init__(self, dataset: Path) -> None:
        self._dataset = dataset
        self._digests = {manifest.digest for manifest in list_versions(dataset)}
        self._places: dict[str, Places] = {}

    def of(self, version: str | None) -> Places | None:
        """Return the places of a version's rows; None if the version is missing."""
        if version not in self._digests:
            return None
        if version not in self._places:
            self._places[version] = read_places(self._dataset, version)
        return self._places[version]


def _row_use(name: str, lineage: Mapping[str, Any], places: KnownPlaces, key: str) -> RowUse:
    """Return the use of a row by an adapter: its own training's use, unless a parent's use counts more."""
    (own, _), *others = ((_own_use(name, each, places, key), each) for each in ancestors(lineage))
    for wanted in ("trained", "unknown"):
        if own.use == wanted:
            return own
        for used, parent in others:
            if used.use == wanted:
                through = f"through {parent['name']}, from which it started"
                return replace(own, use=used.use, reason=f"{used.reason}, {through}" if used.reason else through)
    return own


_NO_PAIR = "no preference pair"


def _own_use(name: str, lineage: Mapping[str, Any], places: KnownPlaces, key: str) -> RowUse:
    """Return the use of a row by an adapter's own training, without its parents' training."""
    version = (lineage.get("dataset") or {}).get("digest")
    there = places.of(version)
    if there is None:
        reason = f"dataset version {short(version)} is not here" if version else "its lineage names no dataset version"
        return RowUse(name, version, "unknown", reason)
    place = there.get(key)
    if place is None:
        return RowUse(name, version, "absent")
    if place.split != "train":
        return RowUse(name, version, place.split)
    if place.generated and not _with_generated(lineage):
        return RowUse(name, version, "left out", "generated")
    rendering = lineage.get("rendering")
    if rendering is None:
        return RowUse(name, version, "unknown", "its lineage does not say which training rows were left out")
    preferences = lineage.get("preferences")
    if preferences is not None and key in preferences["rows"]:
        return RowUse(name, version, "trained")  # one of its answers was trained on, even if another was too long
    for row in rendering["train"]["left_out"]:
        if row["key"] == key:
            return RowUse(name, version, "left out", f"{row['tokens']:,} tokens")
    return RowUse(name, version, "trained") if preferences is None else RowUse(name, version, "left out", _NO_PAIR)


def trained_keys(dataset: Path, lineage: Mapping[str, Any]) -> set[str]:
    """Return the pair keys of the rows that an adapter's own training used; its dataset version must be here."""
    if "preferences" in lineage:
        return set(lineage["preferences"]["rows"])
    left_out = {row["key"] for row in lineage["rendering"]["train"]["left_out"]}
    places = read_places(dataset, lineage["dataset"]["digest"])
    with_generated = _with_generated(lineage)
    used = {key for key, place in places.items() if place.split == "train" and (with_generated or not place.generated)}
    return used - left_out


def _with_generated(lineage: Mapping[str, Any]) -> bool:
    return bool((lineage.get("config") or {}).get("train", {}).get("generated", True))


def _lineages(adapters: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(adapters.glob("[!.]*/lineage.json")):
        try:
            lineage = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"Unreadable lineage: {error}", where=str(path)) from None
        if not isinstance(lineage, dict):
            raise UserError("Invalid lineage: expected a JSON object", where=str(path))
        yield path.parent.name, lineage


@dataclass(frozen=True)
class AdapterExposure:
    """Number of given rows in an adapter's training, dev and test data.

    For ``unknown`` rows, its lineage or dataset version has no information.
    """

    adapter: str
    version: str | None
    trained: int
    dev: int
    test: int
    unknown: int


def adapter_exposure(dataset: Path, adapters: Path, keys: Iterable[str]) -> tuple[AdapterExposure, ...]:
    """Return the adapters whose data has, or may have, any of these rows, sorted by name."""
    counts: dict[tuple[str, str | None], Counter[Use]] = defaultdict(Counter)
    for row in row_uses(dataset, adapters, keys).values():
        for found in row:
            counts[found.adapter, found.version][found.use] += 1
    return tuple(
        AdapterExposure(name, version, uses["trained"], uses["dev"], uses["test"], uses["unknown"])
        for (name, version), uses in counts.items()
        if uses.keys() & {"trained", "dev", "test", "unknown"}
    )
