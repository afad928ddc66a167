"""Dataset versions elsewhere: push and pull to a folder, S3 or any other place that fsspec reaches.

URL/HEAD                            the digest of the version that was pushed last
URL/versions/DIGEST12/rows.jsonl    the rows that the version's parent does not have
                      members.tsv, imports.jsonl, manifest.json   as in the dataset folder; the manifest comes last
URL/reviews/SHA12.jsonl             what each push brought of the log of reviews; all of them together are the log
URL/removed/SHA12.jsonl             likewise of the log of removals; all.jsonl is their union
URL/erased/SHA12                    which purges were carried out there, by the digest of their keys

No file but HEAD is ever written again, unless a purge takes text or metadata out of it. So two who push at once cannot
spoil each other's versions or lose each other's verdicts, and a version whose manifest is there is whole.
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
from tunewright.data.examples import Example
from tunewright.data.purge import take_over
from tunewright.data.review.reviews import (
    Event,
    Judged,
    event_line,
    lacking,
    read_reviews,
    unite_reviews,
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
from tunewright.data.versions.erasing import erased_metadata
from tunewright.data.versions.members import MEMBERS, places_of, read_members, read_places
from tunewright.data.versions.place import AGAIN, ALL_REMOVED, REMOVED, REVIEWS, Place
from tunewright.data.versions.removals import Removals, read_removals
from tunewright.data.versions.rows import parse_rows, rows_text, write_rows

_ROWS = "rows.jsonl"
_FILES = len(VERSION_FILES) + 1

_ADD = "`tunewright data add FILE` makes one."


@dataclass(frozen=True)
class Transfer:
    """What a push or a pull copied, versions oldest first; ``head`` is current on both sides unless one is ``ahead``.

    ``ahead`` counts the versions that the side copied to has and the other lacks: no version was copied then.
    ``reviews`` counts the records copied from one log of reviews to the other; ``verdicts`` of them are verdicts, the
    rest samples drawn and verdicts taken back.
    """

    url: str
    versions: tuple[str, ...]
    rows: int
    bytes: int
    head: str
    ahead: int = 0
    reviews: int = 0
    verdicts: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        return {
            "url": self.url,
            "versions": list(self.versions),
            "rows": self.rows,
            "bytes": self.bytes,
            "head": self.head,
            "ahead": self.ahead,
            "reviews": self.reviews,
            "verdicts": self.verdicts,
        }


def push(dataset: Path, url: str, reporter: Reporter, *, options: dict[str, Any] | None = None) -> Transfer:
    """Copy the current version and those that it was made from to ``url``: what is not there yet, HEAD last.

    Each version is verified before it is copied. Other branches stay here. Reviews are copied too, whether or not there
    is a version to copy.

    Args:
        url: any URL or path that fsspec knows: a folder, s3://bucket/prefix, …
        options: fsspec's storage options (endpoint, credentials); None: from the environment, as the library does.

    Raises:
        UserError: no version yet, a version was changed by hand, the other side has versions that this side's are not
            made from (nothing is copied then), a log of reviews was changed, or it cannot be reached.
    """
    if not dataset.is_dir():
        raise UserError("there is no dataset to push", where=str(dataset), fix=_ADD)
    with locked(dataset):
        head = current_manifest(dataset)
        if head is None:
            raise UserError("there is no dataset version to push", where=str(dataset), fix=_ADD)
        mine = ancestry(dataset, head)
        place = Place(url, options)
        before = place.head()
        if before is not None and before not in {m.digest for m in mine}:
            theirs = place.line(before)
            if head.digest not in {m.digest for m in theirs}:
                raise _diverged(mine, theirs, url)
            told = _push_reviews(dataset, place, reporter)
            place.erase(_push_removals(dataset, place, reporter), reporter)
            return Transfer(url, (), 0, told.bytes, before, _position(theirs, head.digest), *told.counts)
        new_ones = [m for m in reversed(mine[: _position(mine, before)]) if not place.has(m.digest)]
        told = _push_reviews(dataset, place, reporter)
        purged = _push_removals(dataset, place, reporter)
        rows, size = 0, told.bytes
        with reporter.task("pushing", len(new_ones) * _FILES, "files") as task:
            for manifest in new_ones:
                new, files = _packed(dataset, manifest, purged)
                for name, data in files.items():
                    place.write(f"versions/{short(manifest.digest)}/{name}", data)
                    task.advance(note=f"{short(manifest.digest)}/{name}")
                    size += len(data)
                rows += new
        if place.head() != before:
            raise UserError("somebody else pushed at the same time", where=url, fix="Run the push again.")
        if before != head.digest:
            place.write("HEAD", f"{head.digest}\n".encode())
        place.erase(purged, reporter)
    return Transfer(url, tuple(m.digest for m in new_ones), rows, size, head.digest, 0, *told.counts)


def pull(dataset: Path, url: str, reporter: Reporter, *, options: dict[str, Any] | None = None) -> Transfer:
    """Copy the other side's current version and those that it was made from; what is here already stays as it is.

    Every row, member list, manifest and review is checked against its digest; then the version becomes current. The
    reviews are united with those here, whether or not there is a version to copy.

    Args:
        url, options: as for ``push``.

    Raises:
        UserError: nothing was pushed there, something there was changed, this side has versions that the other side's
            are not made from, or it cannot be reached. The current version then stays what it was.
    """
    with locked(dataset):
        current = current_manifest(dataset)
        mine = ancestry(dataset, current) if current else []
        place = Place(url, options)
        head = place.head()
        if head is None:
            raise UserError("no dataset was pushed there", where=url, fix=f"Push one: tunewright data push {url}")
        if head in {m.digest for m in mine}:
            removals = place.removals(reporter)
            take_over(dataset, removals, reporter)
            gone = read_removals(dataset).purged
            theirs_now = [without_purged(event, gone) for event in place.reviews(reporter)]
            brought = _Reviews.of(unite_reviews(dataset, theirs_now))
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
            # Not before all is here: the version that is current until then may have purged rows.
            take_over(dataset, removals, reporter)
            load_version(dataset, head)
            brought = _Reviews.of(unite_reviews(dataset, events))
            write_head(dataset, head)
    return Transfer(url, tuple(m.digest for m in new_ones), len(rows), size + brought.bytes, head, 0, *brought.counts)


@dataclass(frozen=True)
class _Reviews:
    """Reviews that were copied: records, how many of them verdicts, and bytes."""

    counts: tuple[int, int]
    bytes: int

    @classmethod
    def of(cls, events: Sequence[Event]) -> _Reviews:
        size = sum(len(event_line(event).encode()) for event in events)
        return cls((len(events), sum(isinstance(event, Judged) for event in events)), size)


def _push_reviews(dataset: Path, place: Place, reporter: Reporter) -> _Reviews:
    """Copy the events that the other side lacks, as one file of their own."""
    reviews = read_reviews(dataset)
    purged = read_removals(dataset).purged.keys() | {e.key for e in place.removals(reporter) if e.event == "purged"}
    if reviews.torn:
        reporter.warn("The last review in reviews.jsonl was cut off by a crash: it is not copied.")
    if not reviews.events:
        return _Reviews.of(())
    mine, theirs = ([without_purged(e, purged) for e in log] for log in (reviews.events, place.reviews(reporter)))
    new = lacking(mine, theirs)
    if new:
        data = "".join(map(event_line, new)).encode()
        place.write(f"{REVIEWS}/{short(hashlib.sha256(data).hexdigest())}.jsonl", data)
    return _Reviews.of(new)


def _push_removals(dataset: Path, place: Place, reporter: Reporter) -> set[str]:
    """Copy the removals that the other side lacks, as one file; return the pair keys that either side has purged."""
    mine, theirs = read_removals(dataset), Removals(tuple(place.removals(reporter)))
    if new := theirs.lacking(mine.events):
        data = "".join(event.line for event in new).encode()
        place.write(f"{REMOVED}/{short(hashlib.sha256(data).hexdigest())}.jsonl", data)
        reporter.say(f"Copied {len(new):,} records of removals to {place.url}.")
        place.write(ALL_REMOVED, "".join(event.line for event in (*dict.fromkeys(theirs.events), *new)).encode())
    if unknown := theirs.purged.keys() - mine.purged.keys():
        reporter.warn(f"{len(unknown):,} rows were purged by somebody else: `tunewright data pull` purges them here.")
    return {*mine.purged, *theirs.purged}


def _position(line: Sequence[Manifest], digest: str | None) -> int:
    """Return how many versions of a line, newest first, come after the one with this digest; all if none has it."""
    return next((i for i, m in enumerate(line) if m.digest == digest), len(line))


def _diverged(here: Sequence[Manifest], there: Sequence[Manifest], url: str) -> UserError:
    shared = {m.digest for m in here} & {m.digest for m in there}
    common = next((m for m in here if m.digest in shared), None)
    sides = [
        ", ".join(f"{short(m.digest)} ({m.message or 'no message'})" for m in line if m.digest not in shared)
        for line in (here, there)
    ]
    return UserError(
        f"the histories went apart {f'after version {short(common.digest)}' if common else 'from the start'}: "
        f"only here: {sides[0]}; only there: {sides[1]}",
        where=url,
        fix=f"Check out {short(common.digest)}, pull, and add your files again: nothing of either side is lost."
        if common
        else "These are two datasets: push to another URL.",
    )


def _packed(dataset: Path, manifest: Manifest, purged: Collection[str]) -> tuple[int, dict[str, bytes]]:
    """Return how many rows a version brought, and its files as they are pushed, the manifest last."""
    version = load_version(dataset, manifest.digest, without_purged=True)
    known = _parents_rows(dataset, manifest)
    new = {m.key: m.example for m in version.members if m.key not in known and m.key not in purged}
    folder = version_folder(dataset, manifest.digest)
    files = {name: (folder / name).read_bytes() for name in VERSION_FILES}
    _check_files(manifest, files, str(folder))
    # The other side's purges may not have been pulled yet. The order of the files stays, the manifest last.
    files |= erased_metadata(files[IMPORTS], files[MANIFEST], purged)
    return len(new), {_ROWS: rows_text(new).encode(), **files}


def _parents_rows(dataset: Path, manifest: Manifest) -> Mapping[str, Any]:
    """Return the parent's members by pair key; none where there is no parent, or the dataset does not have it."""
    if manifest.parent is None or not version_folder(dataset, manifest.parent).is_dir():
        return {}
    return read_places(dataset, manifest.parent)


def _unpack(
    dataset: Path, place: Place, manifest: Manifest, purged: Collection[str], reporter: Reporter
) -> tuple[dict[str, Example], int]:
    """Bring one version here, its parent being here; the rows that it brought, and the bytes read."""
    base = f"versions/{short(manifest.digest)}"
    files = {name: place.read(f"{base}/{name}") for name in VERSION_FILES}
    # Before the check: where an erasure there was stopped halfway, this is what makes the files fit again.
    files |= erased_metadata(files[IMPORTS], files[MANIFEST], purged)
    _check_files(manifest, files, f"{place.url}/{base}")
    data = place.read(f"{base}/{_ROWS}")
    where = f"{place.url}/{base}/{_ROWS}"
    rows = {key: row for key, row in parse_rows(data, where).items() if key not in purged}
    members = read_members(dataset, manifest.digest, files[MEMBERS], f"{place.url}/{base}/{MEMBERS}")
    missing = places_of(members).keys() - rows.keys()
    missing -= _parents_rows(dataset, manifest).keys() | purged
    if missing:
        raise UserError(f"the row {min(missing)} is missing", where=where, fix=AGAIN)
    write_rows(dataset / "rows", rows, reporter)
    with new_folder(version_folder(dataset, manifest.digest)) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return rows, len(data) + sum(map(len, files.values()))


def _check_files(manifest: Manifest, files: dict[str, bytes], where: str) -> None:
    """Check imports and manifest against the digests in the manifest; who reads the members checks those.

    Raises:
        UserError: naming the file that was changed.
    """
    document = json.loads(files[MANIFEST])
    # Not the digests of ``manifest``, which was read before: a purge may have replaced these two since.
    imports, seal = document.get("imports"), document.get("seal")
    wrong = {
        IMPORTS: imports not in (None, hashlib.sha256(files[IMPORTS]).hexdigest()),
        MANIFEST: document.get("digest") != manifest.digest or seal not in (None, manifest_seal(document)),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise UserError("it was changed: it does not have its digest", where=f"{where}/{name}", fix=AGAIN)
