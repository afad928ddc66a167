"""Push and pull of dataset versions: to a folder, S3 or any other URL of fsspec.

URL/HEAD                            the digest of the latest pushed version
URL/versions/DIGEST12/rows.jsonl    the rows that the version's parent lacks
                      members.tsv, imports.jsonl, manifest.json   as in the dataset folder; the manifest comes last
URL/reviews/SHA12.jsonl             the review events of each push; together they are the log
URL/removed/SHA12.jsonl             likewise of the log of removals; all.jsonl is their union
URL/erased/SHA12                    marker of purges carried out there, named by the digest of their keys

Except for HEAD and purges, files are written once. Concurrent pushes therefore cannot damage each other's versions or
lose verdicts, and a version with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.core.errors import UserError
from tunewright.core.io import new_folder
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.data.examples import Example
from tunewright.data.purge import merge_removals
from tunewright.data.remote_store import AGAIN, ALL_REMOVED, REMOVED, REVIEWS, RemoteStore
from tunewright.data.review.reviews import (
    Event,
    VerdictEvent,
    event_line,
    lacking,
    merge_reviews,
    read_reviews,
    without_purged,
)
from tunewright.data.versions import (
    IMPORTS,
    MANIFEST,
    VERSION_FILES,
    Manifest,
    ancestry,
    current_manifest,
    load_version,
    locked,
    manifest_seal,
    short,
    unfinished,
    version_folder,
    write_head,
)
from tunewright.data.versions.kept_pairs import KEPT_PAIRS_FILE, read_kept_pairs
from tunewright.data.versions.members import MEMBERS, places_of, read_members, read_places
from tunewright.data.versions.removals import Removals, erased_metadata, read_removals
from tunewright.data.versions.rows import parse_rows, rows_text, write_rows

_ROWS = "rows.jsonl"
_FILES = len(VERSION_FILES) + 1

_ADD = "Create one: tunewright data add FILE"


@dataclass(frozen=True)
class Transfer:
    """Result of a push or a pull, versions oldest first; ``head`` is current in both copies unless one is ``ahead``.

    ``ahead`` counts the versions that only the target has; no version was copied then. ``reviews`` counts the review
    events copied, of which ``verdicts`` are verdicts, the rest draws and withdrawals.
    """

    url: str
    versions: tuple[str, ...]
    rows: int
    bytes: int
    head: str
    ahead: int = 0
    reviews: int = 0
    verdicts: int = 0


def push(dataset: Path, url: str, reporter: Reporter, *, options: dict[str, Any] | None = None) -> Transfer:
    """Copy the current version and its ancestors to ``url``, as far as they are missing there; HEAD comes last.

    Each version is verified before it is copied. Other branches are not copied. Reviews are always copied.

    Args:
        url: any URL or path that fsspec knows: a folder, s3://bucket/prefix, …
        options: fsspec's storage options (endpoint, credentials); None: from the environment.

    Raises:
        UserError: no version yet, a version changed by hand, diverged histories (nothing is copied then), a changed
            log of reviews, or an unreachable remote.
    """
    if not dataset.is_dir():
        raise UserError("There is no dataset to push", where=str(dataset), fix=_ADD)
    if kept := len(read_kept_pairs(dataset)):
        reporter.warn(f"{kept:,} preference pairs in dataset/{KEPT_PAIRS_FILE} are not copied: copy the file yourself.")
    with locked(dataset):
        head = current_manifest(dataset)
        if head is None:
            raise UserError("There is no dataset version to push", where=str(dataset), fix=_ADD)
        mine = ancestry(dataset, head)
        place = RemoteStore(url, options)
        before = place.head()
        if before is not None and before not in {m.digest for m in mine}:
            theirs = place.line(before)
            if head.digest not in {m.digest for m in theirs}:
                raise _diverged(mine, theirs, url)
            reviews = _push_reviews(dataset, place, reporter)
            place.erase(_push_removals(dataset, place, reporter), reporter)
            return Transfer(url, (), 0, reviews.bytes, before, _position(theirs, head.digest), *reviews.counts)
        new_ones = [m for m in reversed(mine[: _position(mine, before)]) if not place.has_version(m.digest)]
        reviews = _push_reviews(dataset, place, reporter)
        purged = _push_removals(dataset, place, reporter)
        rows, size = 0, reviews.bytes
        with reporter.task("pushing", len(new_ones) * _FILES, "files") as task:
            for manifest in new_ones:
                new, files = _packed(dataset, manifest, purged)
                for name, data in files.items():
                    place.write(f"versions/{short(manifest.digest)}/{name}", data)
                    task.advance(note=f"{short(manifest.digest)}/{name}")
                    size += len(data)
                rows += new
        if place.head() != before:
            raise UserError("Another push ran at the same time", where=url, fix="Run the push again.")
        if before != head.digest:
            place.write("HEAD", f"{head.digest}\n".encode())
        place.erase(purged, reporter)
    return Transfer(url, tuple(m.digest for m in new_ones), rows, size, head.digest, 0, *reviews.counts)


def pull(dataset: Path, url: str, reporter: Reporter, *, options: dict[str, Any] | None = None) -> Transfer:
    """Copy the remote's current version and its ancestors; existing versions are unchanged.

    Every row, member list, manifest and review is checked against its digest; then the version becomes current. Reviews
    are always merged.

    Args:
        url, options: as for ``push``.

    Raises:
        UserError: nothing was pushed there, the remote's files were changed, the histories diverged, or the remote is
            unreachable. The current version is then unchanged.
    """
    with locked(dataset):
        current = current_manifest(dataset)
        mine = ancestry(dataset, current) if current else []
        place = RemoteStore(url, options)
        head = place.head()
        if head is None:
            raise UserError("The remote has no dataset", where=url, fix=f"Push one: tunewright data push {url}")
        if head in {m.digest for m in mine}:
            removals = place.removals(reporter)
            merge_removals(dataset, removals, reporter)
            gone = read_removals(dataset).purged
            theirs_now = [without_purged(event, gone) for event in place.reviews(reporter)]
            brought = _Reviews.of(merge_reviews(dataset, theirs_now))
            return Transfer(url, (), 0, brought.bytes, mine[0].digest, _position(mine, head), *brought.counts)
        theirs = place.line(head, stop={m.digest for m in mine})
        if current is not None and theirs[-1].parent != current.digest:
            raise _diverged(mine, place.line(head), url)
        new_ones = [m for m in reversed(theirs) if not (version_folder(dataset, m.digest) / MANIFEST).is_file()]
        removals = place.removals(reporter)
        purged = read_removals(dataset).purged.keys() | {e.key for e in removals if e.event == "purged"}
        events = [without_purged(event, purged) for event in place.reviews(reporter)]
        rows: dict[str, Example] = {}
        size = 0
        with unfinished(dataset, ()), reporter.task("pulling", len(new_ones) * _FILES, "files") as task:
            for manifest in new_ones:
                new, read = _unpack(dataset, place, manifest, purged, reporter)
                task.advance(_FILES, note=short(manifest.digest))
                rows |= new
                size += read
            # Purge only after everything is copied: the version that is current until then may have purged rows.
            merge_removals(dataset, removals, reporter)
            load_version(dataset, head)
            brought = _Reviews.of(merge_reviews(dataset, events))
            write_head(dataset, head)
    return Transfer(url, tuple(m.digest for m in new_ones), len(rows), size + brought.bytes, head, 0, *brought.counts)


@dataclass(frozen=True)
class _Reviews:
    """Copied reviews: numbers of events and of verdicts, and bytes."""

    counts: tuple[int, int]
    bytes: int

    @classmethod
    def of(cls, events: Sequence[Event]) -> _Reviews:
        size = sum(len(event_line(event).encode()) for event in events)
        return cls((len(events), sum(isinstance(event, VerdictEvent) for event in events)), size)


def _push_reviews(dataset: Path, place: RemoteStore, reporter: Reporter) -> _Reviews:
    """Copy the events that the remote lacks, as one new file."""
    reviews = read_reviews(dataset)
    purged = read_removals(dataset).purged.keys() | {e.key for e in place.removals(reporter) if e.event == "purged"}
    if reviews.torn:
        reporter.warn("The last review in reviews.jsonl was cut off by a crash and is not copied.")
    if not reviews.events:
        return _Reviews.of(())
    mine, theirs = ([without_purged(e, purged) for e in log] for log in (reviews.events, place.reviews(reporter)))
    new = lacking(mine, theirs)
    if new:
        data = "".join(map(event_line, new)).encode()
        place.write(f"{REVIEWS}/{short(hashlib.sha256(data).hexdigest())}.jsonl", data)
    return _Reviews.of(new)


def _push_removals(dataset: Path, place: RemoteStore, reporter: Reporter) -> set[str]:
    """Copy the removals that the remote lacks, as one file; return the pair keys purged in either copy."""
    mine, theirs = read_removals(dataset), Removals(tuple(place.removals(reporter)))
    if new := theirs.lacking(mine.events):
        data = "".join(event.line for event in new).encode()
        place.write(f"{REMOVED}/{short(hashlib.sha256(data).hexdigest())}.jsonl", data)
        reporter.say(f"Copied {count_of(len(new), 'removal record')} to {place.url}.")
        place.write(ALL_REMOVED, "".join(event.line for event in (*dict.fromkeys(theirs.events), *new)).encode())
    if unknown := theirs.purged.keys() - mine.purged.keys():
        reporter.warn(f"{len(unknown):,} rows were purged elsewhere: `tunewright data pull` purges them here.")
    return {*mine.purged, *theirs.purged}


def _position(line: Sequence[Manifest], digest: str | None) -> int:
    """Return the number of versions newer than the one with this digest; all of them if it is missing."""
    return next((i for i, m in enumerate(line) if m.digest == digest), len(line))


def _diverged(here: Sequence[Manifest], there: Sequence[Manifest], url: str) -> UserError:
    shared = {m.digest for m in here} & {m.digest for m in there}
    common = next((m for m in here if m.digest in shared), None)
    sides = [
        ", ".join(f"{short(m.digest)} ({m.message or 'no message'})" for m in line if m.digest not in shared)
        for line in (here, there)
    ]
    return UserError(
        f"The histories diverged {f'after version {short(common.digest)}' if common else 'from the start'}: "
        f"only here: {sides[0]}; only there: {sides[1]}",
        where=url,
        fix=f"Check out {short(common.digest)}, pull, and add your files again. Nothing is lost."
        if common
        else "They are different datasets: push to another URL.",
    )


def _packed(dataset: Path, manifest: Manifest, purged: Collection[str]) -> tuple[int, dict[str, bytes]]:
    """Return the number of rows that a version added, and its files to push, the manifest last."""
    version = load_version(dataset, manifest.digest, without_purged=True)
    known = _parent_members(dataset, manifest)
    new = {m.key: m.example for m in version.members if m.key not in known and m.key not in purged}
    folder = version_folder(dataset, manifest.digest)
    files = {name: (folder / name).read_bytes() for name in VERSION_FILES}
    _check_files(manifest, files, str(folder))
    # The remote's purges may not have been pulled yet. The order of files must stay, with the manifest last.
    files |= erased_metadata(files[IMPORTS], files[MANIFEST], purged)
    return len(new), {_ROWS: rows_text(new).encode(), **files}


def _parent_members(dataset: Path, manifest: Manifest) -> Mapping[str, Any]:
    """Return the parent's members by pair key; empty without a parent in the dataset."""
    if manifest.parent is None or not version_folder(dataset, manifest.parent).is_dir():
        return {}
    return read_places(dataset, manifest.parent)


def _unpack(
    dataset: Path, place: RemoteStore, manifest: Manifest, purged: Collection[str], reporter: Reporter
) -> tuple[dict[str, Example], int]:
    """Write one version whose parent exists; return the rows that it added, and the bytes read."""
    base = f"versions/{short(manifest.digest)}"
    files = {name: place.read(f"{base}/{name}") for name in VERSION_FILES}
    # Before the check, since this makes the files of an interrupted erasure consistent again.
    files |= erased_metadata(files[IMPORTS], files[MANIFEST], purged)
    _check_files(manifest, files, f"{place.url}/{base}")
    data = place.read(f"{base}/{_ROWS}")
    where = f"{place.url}/{base}/{_ROWS}"
    rows = {key: row for key, row in parse_rows(data, where).items() if key not in purged}
    members = read_members(dataset, manifest.digest, files[MEMBERS], f"{place.url}/{base}/{MEMBERS}")
    missing = places_of(members).keys() - rows.keys()
    missing -= _parent_members(dataset, manifest).keys() | purged
    if missing:
        raise UserError(f"The row {min(missing)} is missing", where=where, fix=AGAIN)
    write_rows(dataset / "rows", rows, reporter)
    with new_folder(version_folder(dataset, manifest.digest)) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return rows, len(data) + sum(map(len, files.values()))


def _check_files(manifest: Manifest, files: dict[str, bytes], where: str) -> None:
    """Check imports and manifest against the digests in the manifest; members are checked when they are read.

    Raises:
        UserError: a file was changed; names it.
    """
    document = json.loads(files[MANIFEST])
    # Not the digests in ``manifest``, which was read earlier: a purge may have replaced both files since.
    imports, seal = document.get("imports"), document.get("seal")
    wrong = {
        IMPORTS: imports not in (None, hashlib.sha256(files[IMPORTS]).hexdigest()),
        MANIFEST: document.get("digest") != manifest.digest or seal not in (None, manifest_seal(document)),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise UserError("The file was changed: its digest does not match", where=f"{where}/{name}", fix=AGAIN)
