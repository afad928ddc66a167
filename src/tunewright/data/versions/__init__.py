"""Dataset versions: immutable sets of examples with their splits, named by a digest that ignores row order.

dataset/HEAD                           the current version's digest
dataset/rows/AB.jsonl                  the rows of all versions (see ``files``)
dataset/removed.jsonl                  rows removed on purpose (see ``logs``)
dataset/versions/DIGEST12/members.tsv  pair key, split, cluster: the version's digest is theirs (see ``files``)
                          manifest.json  origin, counts and settings of the version
                          imports.jsonl  the fate of each row of the added files

Rows are written first and HEAD last, by one writer at a time, so that a crash leaves the old version or the new one.
"""

from __future__ import annotations

import graphlib
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tunewright.core.clock import without_milliseconds
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, new_folder, text_lines, write_json, write_text, writing
from tunewright.core.locks import locked_folder
from tunewright.core.progress import Reporter
from tunewright.data.versions.files import (
    MEMBERS,
    has_rows,
    members_file,
    read_places,
    read_rows,
    remove_rows,
    write_rows,
)
from tunewright.data.versions.logs import (
    KEPT_PAIRS_FILE,
    REMOVED_FILE,
    describe_purges,
    erase_kept_pairs,
    erased_metadata,
    read_removals,
)
from tunewright.data.versions.version import (
    IMPORTS,
    MANIFEST,
    Counts,
    DatasetVersion,
    Manifest,
    Member,
    Mix,
    Numbers,
    Settings,
    SourceFile,
    current_author,
    keys_digest,
    manifest_seal,
    members_digest,
    members_lines,
    read_manifest,
    short,
)

# Names of `version` that are imported from here.
__all__ = [
    "IMPORTS",
    "MANIFEST",
    "Counts",
    "DatasetVersion",
    "Manifest",
    "Member",
    "Mix",
    "Settings",
    "SourceFile",
    "keys_digest",
    "manifest_seal",
    "members_digest",
    "members_lines",
    "read_manifest",
    "short",
]

UNFINISHED = "rows/.unfinished"
VERSION_FILES = (MEMBERS, IMPORTS, MANIFEST)

_RESTORE = "Restore the dataset folder, from git for example."


@contextmanager
def locked(dataset: Path) -> Iterator[None]:
    """Lock the dataset for one writer, and remove leftovers of killed writers; the lock ends with the process."""
    busy = UserError(
        "Another command is changing this dataset", where=str(dataset), fix="Wait for it, then run this again."
    )
    with locked_folder(dataset, busy):
        _remove_leftovers(dataset)
        yield


@contextmanager
def unfinished(dataset: Path, keys: Iterable[str]) -> Iterator[None]:
    """Mark rows that no version has yet until theirs is written, so that the next writer can remove leftovers."""
    write_text(dataset / UNFINISHED, "".join(f"{key}\n" for key in sorted(keys)))
    try:
        yield
    except BaseException:
        # If this also fails, as on a full disk, the next writer does it.
        with suppress(UserError, OSError):
            _clear_unfinished(dataset)
        raise
    (dataset / UNFINISHED).unlink()


def _clear_unfinished(dataset: Path) -> None:
    """Remove the rows of an unfinished version, unless another version has them."""
    marker = dataset / UNFINISHED
    if not marker.is_file():
        return
    keys = set(text_lines(marker.read_text(encoding="utf-8")))
    for manifest in list_versions(dataset):
        keys -= read_places(dataset, manifest.digest).keys()
    with writing(dataset):
        remove_rows(dataset / "rows", keys)
        marker.unlink()


def erase_purged(dataset: Path) -> None:
    """Erase the text and pairs of purged rows from the dataset, and their metadata from every version's imports."""
    purged = read_removals(dataset).purged
    if not purged:
        return
    there = has_rows(dataset / "rows", purged)
    with writing(dataset):
        remove_rows(dataset / "rows", there)
        erase_kept_pairs(dataset, purged)
        for path in sorted(dataset.glob(f"versions/{'[0-9a-f]' * 12}/{IMPORTS}")):
            manifest = path.parent / MANIFEST
            if manifest.is_file():
                files = erased_metadata(path.read_bytes(), manifest.read_bytes(), purged.keys())
                for name, data in files.items():
                    write_text(path.parent / name, data.decode())


def _remove_leftovers(dataset: Path) -> None:
    """Remove leftovers of killed writers, before the holder of the lock writes anything."""
    _clear_unfinished(dataset)
    erase_purged(dataset)
    marker = dataset.glob(f"{Path(UNFINISHED).parent}/.{Path(UNFINISHED).name}.*")
    folders = f"versions/.{'[0-9a-f]' * 12}.*"
    with writing(dataset):
        names = (REMOVED_FILE, "reviews.jsonl", KEPT_PAIRS_FILE)
        for path in (
            *(path for name in names for path in dataset.glob(f".{name}.*")),
            *dataset.glob(".HEAD.*"),
            *dataset.glob("rows/.??.jsonl.*"),
            *dataset.glob(folders),
            *dataset.glob(f"versions/{'[0-9a-f]' * 12}/.*.json*"),
            *marker,
        ):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def save_version(
    dataset: Path,
    manifest: Manifest,
    members: Sequence[Member],
    imports: Iterable[Mapping[str, Any]],
    reporter: Reporter,
) -> Manifest:
    """Write a version and make it current: rows first, HEAD last, so that a crash leaves the old version or the new.

    Returns the manifest on disk, with author, numbers and seal; for an existing version, the stored one. ``imports``,
    the records of imports.jsonl, are read more than once.
    """
    known = read_places(dataset, manifest.parent) if manifest.parent else {}
    place = version_folder(dataset, manifest.digest)
    with unfinished(dataset, (m.key for m in members if m.key not in known)):
        write_rows(dataset / "rows", {m.key: m.example for m in members}, reporter)
        if place.exists():
            manifest = read_manifest(place)
            reporter.warn(
                f"Version {short(manifest.digest)} exists already (created {without_milliseconds(manifest.created)}) "
                "and is current again, with its stored message, parent and imports."
            )
        else:
            with new_folder(place) as folder:
                _write_lines(folder / MEMBERS, members_file(dataset, members_lines(members), manifest.parent))
                records = _new_records(dataset, manifest.parent, imports)
                written = _write_lines(folder / IMPORTS, (canonical_json(record) + "\n" for record in records))
                numbers = _next_numbers(dataset, manifest.parent, members, import_records([folder / IMPORTS]))
                own = {"author": current_author(dataset), "imports": written, "numbers": numbers}
                manifest = manifest.model_copy(update=own)
                seal = manifest_seal(manifest.model_dump(mode="json"))
                manifest = manifest.model_copy(update={"seal": seal})
                write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
        write_head(dataset, manifest.digest)
    return manifest


def _write_lines(path: Path, lines: Iterable[str]) -> str:
    """Write lines as they come, and return their SHA-256."""
    whole = hashlib.sha256()
    with path.open("wb") as file:
        for line in lines:
            data = line.encode()
            whole.update(data)
            file.write(data)
    return whole.hexdigest()


def _new_records(
    dataset: Path, parent: str | None, imports: Iterable[Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """Yield the records of an import that earlier imports do not have.

    A growing file is added many times, and a mix-in is drawn each time; only new rows need a record.
    """
    manifest = next((m for m in list_versions(dataset) if m.digest == parent), None)
    if manifest is None or all(record["fate"] in ("added", "duplicate", "skipped") for record in imports):
        yield from imports
        return
    recorded: dict[tuple[str, int], tuple[str, str]] = {}
    metadata: dict[tuple[str, int], Any] = {}
    for earlier in import_records(reversed(import_files(dataset, manifest))):
        recorded[earlier["source"], earlier["line"]] = earlier["fate"], earlier.get("of", earlier.get("key", ""))
        metadata[earlier["source"], earlier["line"]] = earlier.get("metadata")
    mixed = {key for key, place in read_places(dataset, manifest.digest).items() if place.mixed}
    for record in imports:
        fate, before = record["fate"], recorded.get((record["source"], record["line"]))
        known = fate == "known" and before is not None and before[1] == record["key"]
        known = known and metadata.get((record["source"], record["line"])) == record.get("metadata")
        again = fate in ("contaminated", "unaccepted", "overlapping", "not mixed", "removed") and before == (
            fate,
            record.get("of", record["key"]),
        )
        if not (known or again or (fate == "mixed" and record["key"] in mixed)):
            yield record


def row_numbers(dataset: Path, manifest: Manifest) -> dict[str, int]:
    """Return the numbers of the rows of a version and its ancestors, by pair key.

    New rows are numbered in the order of their files, and a row keeps the number when its answer is edited or replaced.
    Versions of earlier releases have no numbers: their rows are counted.
    """
    numbers: dict[str, int] = {}
    for version in reversed(ancestry(dataset, manifest)):
        records = import_records([version_folder(dataset, version.digest) / IMPORTS])
        fresh = _fresh_rows(read_places(dataset, version.digest), records, numbers)
        first = version.numbers.first_row if version.numbers else max(numbers.values(), default=0) + 1
        numbers |= zip(fresh, itertools.count(first), strict=False)
    return numbers


def _fresh_rows(keys: Iterable[str], records: Iterable[Mapping[str, Any]], numbers: dict[str, int]) -> list[str]:
    """Return the rows of a version that get a number, in order, and add the rows that take over another's."""
    new = [key for key in sorted(keys) if key not in numbers]
    order: dict[str, int] = {}
    for place, record in enumerate(records):
        order.setdefault(record.get("key", ""), place)
        if record["fate"] in ("edited", "replaced") and record["before"] in numbers:
            numbers.setdefault(record["key"], numbers[record["before"]])
    return sorted((key for key in new if key not in numbers), key=lambda key: order.get(key, len(order)))


def _next_numbers(
    dataset: Path, parent: str | None, members: Iterable[Member], records: Iterable[Mapping[str, Any]]
) -> Numbers:
    versions = list_versions(dataset)
    former = next((each for each in versions if each.digest == parent), None)
    numbers = row_numbers(dataset, former) if former else {}
    last = max([*numbers.values(), *(each.numbers.last_row for each in versions if each.numbers)], default=0)
    version = max([len(versions), *(each.numbers.version for each in versions if each.numbers)]) + 1
    fresh = len(_fresh_rows((member.key for member in members), records, numbers))
    return Numbers(version=version, first_row=last + 1, last_row=last + fresh)


def write_head(dataset: Path, digest: str) -> None:
    """Make a version current."""
    write_text(dataset / "HEAD", digest + "\n")


def checkout(dataset: Path, digest: str) -> Manifest:
    """Make an existing version current, by its number or digest; the next `data add` builds on it."""
    if not (dataset / "versions").is_dir():
        raise no_version(dataset)
    with locked(dataset):
        version = load_version(dataset, digest)
        write_head(dataset, version.digest)
    return version.manifest


def load_version(dataset: Path, digest: str | None = None, *, without_purged: bool = False) -> DatasetVersion:
    """Load a version and verify it: every row against its key, all members against the digest.

    Args:
        dataset: the project's dataset folder.
        digest: a version's number, its digest or its beginning; None means the current version.
        without_purged: leave out rows whose text was purged, instead of refusing the version.

    Raises:
        UserError: no such version, an ambiguous beginning, a changed row or member (names file and key), or purged
            text.
    """
    manifest = current_manifest(dataset) if digest is None else _find(dataset, digest)
    if manifest is None:
        raise no_version(dataset)
    places = read_places(dataset, manifest.digest)
    purged = {key: purge for key, purge in read_removals(dataset).purged.items() if key in places}
    if purged and not without_purged:
        raise UserError(
            f"Version {short(manifest.digest)} is incomplete: {describe_purges(purged.values())}",
            where=str(dataset / REMOVED_FILE),
            fix="Use a later version: `tunewright data log` lists them.",
        )
    rows = read_rows(dataset / "rows", places.keys() - purged.keys())
    members = tuple(Member(rows[key], key, *places[key]) for key in sorted(rows))
    return DatasetVersion(manifest, members, tuple(sorted(purged)))


def no_version(dataset: Path) -> UserError:
    """Return the error for a dataset without versions."""
    return UserError("There is no dataset version yet", where=str(dataset), fix="Create one: tunewright data add FILE")


def has_version(dataset: Path) -> bool:
    """Return whether there is a current version."""
    return current_manifest(dataset) is not None


def list_versions(dataset: Path) -> list[Manifest]:
    """Return the manifests of all versions, parents first, else by age."""
    folder = dataset / "versions"
    paths = [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    manifests = sorted((read_manifest(path) for path in paths), key=lambda m: (m.created, m.digest))
    by_digest = {m.digest: m for m in manifests}
    order = graphlib.TopologicalSorter({m.digest: [m.parent] if m.parent in by_digest else [] for m in manifests})
    try:
        return [by_digest[digest] for digest in order.static_order()]
    except graphlib.CycleError as error:
        loop = ", ".join(short(d) for d in error.args[1])
        raise UserError(f"Versions name each other as parents: {loop}", where=str(folder), fix=_RESTORE) from None


def ancestry(dataset: Path, manifest: Manifest) -> list[Manifest]:
    """Return a version and its ancestors, newest first, up to a parent that the dataset lacks."""
    by_digest = {m.digest: m for m in list_versions(dataset)}
    line: list[Manifest] = []
    step: Manifest | None = manifest
    while step is not None:
        line.append(step)
        step = by_digest.get(step.parent or "")
    return line


def import_files(dataset: Path, manifest: Manifest) -> list[Path]:
    """Return the imports.jsonl of a version and of its ancestors, newest first."""
    return [version_folder(dataset, m.digest) / IMPORTS for m in ancestry(dataset, manifest)]


def import_records(files: Iterable[Path], *fates: str, key: str = "") -> Iterator[dict[str, Any]]:
    """Yield the records of some imports.jsonl in order, optionally only of a pair key or with these fates."""
    wanted = [f'"fate":"{fate}"' for fate in fates]
    for path in files:
        for number, line in enumerate(text_lines(path.read_text(encoding="utf-8")), start=1):
            # The lines are canonical JSON: most need no parsing.
            if key not in line or (wanted and not any(text in line for text in wanted)):
                continue
            try:
                record: dict[str, Any] = json.loads(line)
            except json.JSONDecodeError:
                raise UserError("Invalid import record", where=f"{path}:{number}", fix="Restore the file.") from None
            if not fates or record.get("fate") in fates:
                yield record


def version_folder(dataset: Path, digest: str) -> Path:
    """Return the folder of a version."""
    return dataset / "versions" / short(digest)


def current_manifest(dataset: Path) -> Manifest | None:
    """Return the current version's manifest; None if there is no version."""
    head = dataset / "HEAD"
    if not head.is_file():
        # Without HEAD, a single version comes from a killed first writer, and several from an interrupted pull.
        if len(list(dataset.glob("versions/[!.]*"))) > 1 and not (dataset / UNFINISHED).exists():
            fix = "Restore it, from git for example, or choose a version: tunewright data checkout VERSION"
            raise UserError("HEAD, which names the current version, is missing", where=str(head), fix=fix)
        return None
    digest = head.read_text(encoding="utf-8", errors="replace").strip()
    folder = version_folder(dataset, digest)
    manifest = read_manifest(folder) if re.fullmatch("[0-9a-f]{64}", digest) and folder.is_dir() else None
    if manifest is None or manifest.digest != digest:
        raise UserError(f"The current version, {digest!r}, is not in {folder.parent}", where=str(head), fix=_RESTORE)
    return manifest


def _find(dataset: Path, digest: str) -> Manifest:
    versions = list_versions(dataset)
    numbered = [m for m in versions if m.numbers and str(m.numbers.version) == digest]
    if len(numbered) > 1:
        raise UserError(
            f"{len(numbered)} dataset versions have the number {digest}: they were made in separate copies",
            where=str(dataset),
            fix=f"Give one's digest: {', '.join(short(m.digest) for m in numbered)}",
        )
    found = numbered or [m for m in versions if digest and m.digest.startswith(digest)]
    if len(found) != 1:
        names = ", ".join(short(m.digest) for m in found or versions)
        raise UserError(
            f"{len(found) or 'no'} dataset version{'s begin' if found else ' begins'} with {digest!r}",
            where=str(dataset),
            fix=f"Versions: {names}" if names else "Create one: tunewright data add FILE",
        )
    return found[0]
