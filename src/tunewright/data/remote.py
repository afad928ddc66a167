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
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunewright.config.project import OpenFolder
from tunewright.core.errors import UserError, first_fault
from tunewright.core.io import new_folder
from tunewright.core.progress import Reporter
from tunewright.core.remote_files import RemoteFiles
from tunewright.core.text import count_of
from tunewright.data.examples import Example
from tunewright.data.remove import merge_removals
from tunewright.data.review import reviews
from tunewright.data.review.reviews import Event, VerdictEvent, event_line, lacking, merge_reviews, without_purged
from tunewright.data.versions import (
    IMPORTS,
    MANIFEST,
    VERSION_FILES,
    Manifest,
    ancestry,
    current_manifest,
    keys_digest,
    load_version,
    locked,
    short,
    unfinished,
    version_folder,
    write_head,
)
from tunewright.data.versions.files import (
    MEMBERS,
    parse_rows,
    places_of,
    read_members,
    read_places,
    rows_text,
    write_rows,
)
from tunewright.data.versions.logs import (
    KEPT_PAIRS_FILE,
    Removal,
    Removals,
    erased_metadata,
    events_in,
    read_kept_pairs,
    read_removals,
)
from tunewright.data.versions.version import changed_files

_ROWS = "rows.jsonl"
_FILES = len(VERSION_FILES) + 1
_REVIEWS = "reviews"
_REMOVED = "removed"
_ALL_REMOVED = "removed/all.jsonl"
_ERASED = "erased"
_ADD = "Create one: tunewright data add FILE"
_AGAIN = "Restore the file, or delete the version's folder there and push it again from a complete copy."
_CHANGED = "The file was changed: its digest does not match"
_ROW_KEY = re.compile(rb'{"key":"([0-9a-f]{64})"')


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

    @classmethod
    def of(
        cls, url: str, head: str, events: Sequence[Event], versions: tuple[str, ...], rows: int, size: int, ahead: int
    ) -> Transfer:
        """Return the result for these review events and what else was copied."""
        size += sum(len(event_line(event).encode()) for event in events)
        verdicts = sum(isinstance(event, VerdictEvent) for event in events)
        return cls(url, versions, rows, size, head, ahead, len(events), verdicts)


def push(project: OpenFolder, url: str, *, options: dict[str, Any] | None = None) -> Transfer:
    """Copy the current version with its ancestors and reviews to a folder or bucket, as far as they are missing there.

    Each version is verified before it is copied, and HEAD comes last. Other branches are not copied.

    Args:
        url: any URL or path that fsspec knows: a folder, s3://bucket/prefix, …
        options: fsspec's storage options (endpoint, credentials); None: from the environment.

    Raises:
        UserError: no version yet, a version changed by hand, diverged histories (nothing is copied then), a changed
            log of reviews, or an unreachable remote.
    """
    dataset, reporter = project.folder.dataset, project.reporter
    if not dataset.is_dir():
        raise UserError("There is no dataset to push", where=str(dataset), fix=_ADD)
    if kept := len(read_kept_pairs(dataset)):
        reporter.warn(f"{kept:,} preference pairs in dataset/{KEPT_PAIRS_FILE} are not copied: copy the file yourself.")
    with locked(dataset):
        head = current_manifest(dataset)
        if head is None:
            raise UserError("There is no dataset version to push", where=str(dataset), fix=_ADD)
        mine = ancestry(dataset, head)
        remote = RemoteStore(url, options)
        before = remote.head()
        theirs: list[Manifest] = []  # includes versions that are missing here
        if before is not None and before not in {m.digest for m in mine}:
            theirs = remote.line(before)
            if head.digest not in {m.digest for m in theirs}:
                raise _diverged(mine, theirs, url)
        missing = [] if theirs else reversed(mine[: _position(mine, before)])
        new_ones = [m for m in missing if not remote.has_version(m.digest)]
        events = _push_reviews(dataset, remote, reporter)
        purged = _push_removals(dataset, remote, reporter)
        rows, size = 0, 0
        with reporter.task("pushing", len(new_ones) * _FILES, "files") as task:
            for manifest in new_ones:
                new, files = _packed(dataset, manifest, purged)
                for name, data in files.items():
                    remote.write(f"versions/{short(manifest.digest)}/{name}", data)
                    task.advance(note=f"{short(manifest.digest)}/{name}")
                    size += len(data)
                rows += new
        if not theirs and remote.head() != before:
            raise UserError("Another push ran at the same time", where=url, fix="Run the push again.")
        if not theirs and before != head.digest:
            remote.write("HEAD", f"{head.digest}\n".encode())
        remote.erase(purged, reporter)
    there = theirs[0].digest if theirs else head.digest
    ahead = _position(theirs, head.digest)
    return Transfer.of(url, there, events, tuple(m.digest for m in new_ones), rows, size, ahead)


def pull(project: OpenFolder, url: str, *, options: dict[str, Any] | None = None) -> Transfer:
    """Copy the current version and reviews from a shared folder or bucket, verify and check them out.

    Existing versions are unchanged. Reviews are always merged.

    Args:
        url: as for ``push``.
        options: as for ``push``.

    Raises:
        UserError: nothing was pushed there, the remote's files were changed, the histories diverged, or the remote is
            unreachable. The current version is then unchanged.
    """
    dataset, reporter = project.folder.dataset, project.reporter
    with locked(dataset):
        current = current_manifest(dataset)
        mine = ancestry(dataset, current) if current else []
        remote = RemoteStore(url, options)
        head = remote.head()
        if head is None:
            raise UserError("The remote has no dataset", where=url, fix=f"Push one: tunewright data push {url}")
        known = {m.digest for m in mine}
        theirs = [] if head in known else remote.line(head, stop=known)
        if theirs and current is not None and theirs[-1].parent != current.digest:
            raise _diverged(mine, remote.line(head), url)
        new_ones = [m for m in reversed(theirs) if not (version_folder(dataset, m.digest) / MANIFEST).is_file()]
        removals = remote.removals()
        purged = read_removals(dataset).purged.keys() | {e.key for e in removals if e.event == "purged"}
        events = [without_purged(event, purged) for event in remote.reviews(reporter)]
        rows: dict[str, Example] = {}
        size = 0
        with unfinished(dataset, ()), reporter.task("pulling", len(new_ones) * _FILES, "files") as task:
            for manifest in new_ones:
                new, read = _unpack(dataset, remote, manifest, purged, reporter)
                task.advance(_FILES, note=short(manifest.digest))
                rows |= new
                size += read
            # Purge only after everything is copied: the version that is current until then may have purged rows.
            merge_removals(dataset, removals, reporter)
            if theirs:
                load_version(dataset, head)
            brought = merge_reviews(dataset, events)
            if theirs:
                write_head(dataset, head)
    here = head if theirs else mine[0].digest
    ahead = 0 if theirs else _position(mine, head)
    return Transfer.of(url, here, brought, tuple(m.digest for m in new_ones), len(rows), size, ahead)


def _push_reviews(dataset: Path, remote: RemoteStore, reporter: Reporter) -> list[Event]:
    """Copy the events that the remote lacks, as one new file."""
    log = reviews.read_reviews(dataset)
    purged = read_removals(dataset).purged.keys() | {e.key for e in remote.removals() if e.event == "purged"}
    if log.torn:
        reporter.warn("The last review in reviews.jsonl was cut off by a crash and is not copied.")
    if not log.events:
        return []
    mine, theirs = ([without_purged(e, purged) for e in each] for each in (log.events, remote.reviews(reporter)))
    new = lacking(mine, theirs)
    remote.write_lines(_REVIEWS, map(event_line, new))
    return new


def _push_removals(dataset: Path, remote: RemoteStore, reporter: Reporter) -> set[str]:
    """Copy the removals that the remote lacks, as one file; return the pair keys purged in either copy."""
    mine, theirs = read_removals(dataset), Removals(tuple(remote.removals()))
    if new := theirs.lacking(mine.events):
        remote.write_lines(_REMOVED, (event.line for event in new))
        reporter.say(f"Copied {count_of(len(new), 'removal record')} to {remote.url}.")
        remote.write(_ALL_REMOVED, "".join(event.line for event in (*dict.fromkeys(theirs.events), *new)).encode())
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
    known = _parent_keys(dataset, manifest)
    new = {m.key: m.example for m in version.members if m.key not in known and m.key not in purged}
    folder = version_folder(dataset, manifest.digest)
    files = {name: (folder / name).read_bytes() for name in VERSION_FILES}
    _check_files(manifest, files, str(folder))
    # The remote's purges may not have been pulled yet. The order of files must stay, with the manifest last.
    files |= erased_metadata(files[IMPORTS], files[MANIFEST], purged)
    return len(new), {_ROWS: rows_text(new).encode(), **files}


def _parent_keys(dataset: Path, manifest: Manifest) -> set[str]:
    """Return the pair keys of a version's parent; none without a parent in the dataset."""
    if manifest.parent is None or not version_folder(dataset, manifest.parent).is_dir():
        return set()
    return set(read_places(dataset, manifest.parent))


def _unpack(
    dataset: Path, remote: RemoteStore, manifest: Manifest, purged: Collection[str], reporter: Reporter
) -> tuple[dict[str, Example], int]:
    """Write one version whose parent exists; return the rows that it added, and the bytes read."""
    base = f"versions/{short(manifest.digest)}"
    files = {name: remote.read(f"{base}/{name}") for name in VERSION_FILES}
    # Before the check, since this makes the files of an interrupted erasure consistent again.
    files |= erased_metadata(files[IMPORTS], files[MANIFEST], purged)
    _check_files(manifest, files, f"{remote.url}/{base}")
    data = remote.read(f"{base}/{_ROWS}")
    where = f"{remote.url}/{base}/{_ROWS}"
    rows = {key: row for key, row in parse_rows(data, where).items() if key not in purged}
    source = f"{remote.url}/{base}/{MEMBERS}"
    members = read_members(dataset, manifest.digest, files[MEMBERS], source)
    missing = places_of(members, source).keys() - rows.keys() - _parent_keys(dataset, manifest) - set(purged)
    if missing:
        raise UserError(f"The row {min(missing)} is missing", where=where, fix=_AGAIN)
    write_rows(dataset / "rows", rows, reporter)
    with new_folder(version_folder(dataset, manifest.digest)) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return rows, len(data) + sum(map(len, files.values()))


def _check_files(manifest: Manifest, files: dict[str, bytes], where: str) -> None:
    """Check imports and manifest against the digests in the manifest; members are checked when they are read."""
    # Not the digests in ``manifest``, which was read earlier: a purge may have replaced both files since.
    wrong = changed_files(files[IMPORTS], files[MANIFEST])
    if json.loads(files[MANIFEST]).get("digest") != manifest.digest:
        wrong.append(MANIFEST)
    if wrong:
        raise UserError(_CHANGED, where=f"{where}/{wrong[0]}", fix=_AGAIN)


class RemoteStore(RemoteFiles):
    """The files of a dataset below a URL."""

    def __init__(self, url: str, options: dict[str, Any] | None) -> None:
        super().__init__(url, options, again=_AGAIN)
        if self.has("rows"):
            fix = "Use a separate folder for pushes."
            raise UserError("This is a project's dataset folder", where=url, fix=fix)

    def head(self) -> str | None:
        """Return the digest of the latest pushed version."""
        data = self.read_if_there("HEAD")
        if data is None:
            return None
        digest = data.decode(errors="replace").strip()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise UserError(f"Invalid version digest in HEAD: {digest[:80]!r}", where=f"{self.url}/HEAD", fix=_AGAIN)
        return digest

    def has_version(self, digest: str) -> bool:
        """Return whether the remote has a complete version."""
        return self.has(f"versions/{short(digest)}/{MANIFEST}")

    def line(self, head: str, stop: Collection[str] = ()) -> list[Manifest]:
        """Return the version ``head`` and its ancestors, newest first, up to a version in ``stop`` or a missing one."""
        line = [self._manifest(head)]
        while (parent := line[-1].parent) is not None and parent not in stop and self.has_version(parent):
            if any(m.digest == parent for m in line):
                raise UserError(f"Version {short(parent)} is its own ancestor", where=self.url, fix=_AGAIN)
            line.append(self._manifest(parent))
        return line

    def _manifest(self, digest: str) -> Manifest:
        name = f"versions/{short(digest)}/{MANIFEST}"
        try:
            manifest = Manifest.model_validate_json(self.read(name))
        except ValidationError as error:
            raise UserError(f"Invalid manifest: {first_fault(error)}", where=f"{self.url}/{name}", fix=_AGAIN) from None
        if manifest.digest != digest:
            raise UserError(
                f"The manifest belongs to version {short(manifest.digest)}", where=f"{self.url}/{name}", fix=_AGAIN
            )
        return manifest

    def _names(self, folder: str, pattern: str) -> list[str]:
        """Return the sorted names in a folder that match; a web server may not list files."""
        with self.refusals():
            try:
                listed = self.fs.ls(f"{self.root}/{folder}", detail=False)
            except FileNotFoundError:
                return []
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed)
        return sorted(name for name in names if re.fullmatch(pattern, name))

    def _log_files(self, folder: str) -> list[str]:
        return [f"{folder}/{name}" for name in self._names(folder, r"[0-9a-f]{12}\.jsonl")]

    def _log(self, folder: str, fix: str) -> Iterator[tuple[str, bytes]]:
        """Yield name and content of the files of a log; ``fix`` is the remedy if a file was changed."""
        for path in self._log_files(folder):
            data = self.read(path)
            yield path, data
            # After the caller has parsed it: lines also have digests, so if they match, lines are missing or repeated.
            if f"{folder}/{short(hashlib.sha256(data).hexdigest())}.jsonl" != path:
                raise UserError(_CHANGED, where=f"{self.url}/{path}", fix=fix)

    def write_lines(self, folder: str, lines: Iterable[str]) -> None:
        """Add a file to a log, unless there are no lines."""
        if data := "".join(lines).encode():
            self.write(f"{folder}/{short(hashlib.sha256(data).hexdigest())}.jsonl", data)

    def removals(self) -> list[Removal]:
        """Return all events of the remote's logs of removals."""
        # For web servers that do not list files, one file contains all events.
        events = events_in(self.read_if_there(_ALL_REMOVED) or b"", f"{self.url}/{_ALL_REMOVED}")
        for path, data in self._log(_REMOVED, "Restore the file."):
            events += events_in(data, f"{self.url}/{path}")
        return events

    def reviews(self, reporter: Reporter) -> list[Event]:
        """Return all review events on the remote."""
        events: list[Event] = []
        files = 0
        fix = "Restore the file, or delete it and push again from the copies that have its reviews."
        for path, data in self._log(_REVIEWS, fix):
            events += [event for _, event in reviews.events_in(data, f"{self.url}/{path}")]
            files += 1
        if self.is_web and not files:
            reporter.warn(f"No reviews were copied: {self.url} has none, or does not list files.")
        return events

    def erase(self, purged: Collection[str], reporter: Reporter) -> None:
        """Erase the text and metadata of purged rows from the remote.

        A marker records the purges carried out, so that the next push does not search all files again.
        """
        marker = f"{_ERASED}/{short(keys_digest(purged))}"
        if not purged or self.read_if_there(marker) is not None:
            return
        wanted = {key.encode() for key in purged}
        changed = 0
        for version in self._names("versions", "[0-9a-f]{12}"):
            folder = f"versions/{version}"
            files: dict[str, bytes] = {}
            imports, manifest = (self.read_if_there(f"{folder}/{name}") for name in (IMPORTS, MANIFEST))
            if imports is not None and manifest is not None:  # otherwise an interrupted push will write them again
                files = erased_metadata(imports, manifest, purged)
            rows = self.read_if_there(f"{folder}/{_ROWS}") or b""
            lines = rows.splitlines(keepends=True)
            kept = b"".join(line for line in lines if not (match := _ROW_KEY.match(line)) or match[1] not in wanted)
            for name, data in (files if kept == rows else {**files, _ROWS: kept}).items():
                self._rewrite(f"{folder}/{name}", data)
                changed += 1
        # A file whose digest does not match is also erased, and refused when its reviews are read.
        for name in self._log_files(_REVIEWS):
            events = [event for _, event in reviews.events_in(self.read(name), f"{self.url}/{name}")]
            redacted = [without_purged(event, purged) for event in events]
            if redacted != events:
                text = "".join(map(event_line, redacted)).encode()
                self._rewrite(f"{_REVIEWS}/{short(hashlib.sha256(text).hexdigest())}.jsonl", text)
                self.remove(name)
                changed += 1
        self.write(marker, b"")
        if changed:
            reporter.say(f"Erased the text of purged rows from {changed:,} files of {self.url}.")
        if changed and not self.has_folders:
            reporter.warn("If the bucket has versioning, it keeps the former content: delete it there.")

    def _rewrite(self, name: str, data: bytes) -> None:
        try:
            self.write(name, data)
        except UserError as error:
            raise UserError(
                f"Could not erase the text of purged rows on the remote: {error.what}",
                where=f"{self.url}/{name}",
                fix=f"The file still contains the text. {error.fix or ''} Then push again.",
            ) from error
