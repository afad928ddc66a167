"""Remote storage of a dataset: its files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from tunewright.core.errors import UserError, first_fault
from tunewright.core.progress import Reporter
from tunewright.core.remote_files import RemoteFiles
from tunewright.data.review.reviews import Event, event_line, events_in, without_purged
from tunewright.data.versions import IMPORTS, MANIFEST, Manifest, keys_digest, short
from tunewright.data.versions.removals import Removal, erased_metadata
from tunewright.data.versions.removals import events_in as removals_in

REVIEWS = "reviews"
REMOVED = "removed"
ALL_REMOVED = "removed/all.jsonl"
ERASED = "erased"
AGAIN = "Restore the file, or delete the version's folder there and push it again from a complete copy."

_ROW_KEY = re.compile(rb'{"key":"([0-9a-f]{64})"')


class RemoteStore(RemoteFiles):
    """The files of a dataset below a URL."""

    def __init__(self, url: str, options: dict[str, Any] | None) -> None:
        super().__init__(url, options, again=AGAIN)
        if self.has("rows"):
            fix = "Use a separate folder for pushes."
            raise UserError("This is a project's dataset folder", where=url, fix=fix)

    def has_version(self, digest: str) -> bool:
        """Return whether the remote has a complete version."""
        return self.has(f"versions/{short(digest)}/{MANIFEST}")

    def versions(self) -> list[str]:
        """Return the folder names of all versions on the remote, of any branch."""
        with self.refusals():
            try:
                listed = self.fs.ls(f"{self.root}/versions", detail=False)
            except FileNotFoundError:
                return []
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed)
        return sorted(name for name in names if re.fullmatch("[0-9a-f]{12}", name))

    def removals(self, reporter: Reporter) -> list[Removal]:
        """Return all events of the remote's logs of removals.

        Raises:
            UserError: a file was changed; names it.
        """
        # For web servers that do not list files, one file has all events.
        events = removals_in(self.read_if_there(ALL_REMOVED) or b"", f"{self.url}/{ALL_REMOVED}")
        for name in self._names(REMOVED, reporter):
            path = f"{REMOVED}/{name}"
            data = self.read(path)
            events += removals_in(data, f"{self.url}/{path}")
            if short(hashlib.sha256(data).hexdigest()) != name.removesuffix(".jsonl"):
                what = "The file was changed: its digest does not match"
                raise UserError(what, where=f"{self.url}/{path}", fix="Restore the file.")
        return events

    def erase(self, purged: Collection[str], reporter: Reporter) -> int:
        """Erase the text and metadata of purged rows from the remote, and return the number of changed files.

        A marker records the purges carried out, so that the next push does not search all files again.

        Raises:
            UserError: a file cannot be written, and still contains the text; names it.
        """
        marker = f"{ERASED}/{short(keys_digest(purged))}"
        if not purged or self.read_if_there(marker) is not None:
            return 0
        wanted = {key.encode() for key in purged}
        changed = 0
        for version in self.versions():
            changed += self._erase_metadata(f"versions/{version}", purged)
            name = f"versions/{version}/rows.jsonl"
            data = self.read_if_there(name) or b""
            lines = data.splitlines(keepends=True)
            kept = b"".join(line for line in lines if not (match := _ROW_KEY.match(line)) or match[1] not in wanted)
            if kept != data:
                self._rewrite(name, kept)
                changed += 1
        for name in self._names(REVIEWS, reporter):
            changed += self._redact(f"{REVIEWS}/{name}", purged)
        self.write(marker, b"")
        if changed:
            reporter.say(f"Erased the text of purged rows from {changed:,} files of {self.url}.")
        if changed and not self.has_folders:
            reporter.warn("If the bucket has versioning, it keeps the former content: delete it there.")
        return changed

    def _erase_metadata(self, folder: str, purged: Collection[str]) -> int:
        imports, manifest = (self.read_if_there(f"{folder}/{name}") for name in (IMPORTS, MANIFEST))
        if imports is None or manifest is None:  # an interrupted push, which will write the files again
            return 0
        files = erased_metadata(imports, manifest, purged)
        for name, data in files.items():
            self._rewrite(f"{folder}/{name}", data)
        return len(files)

    def _redact(self, name: str, purged: Collection[str]) -> int:
        data = self.read(name)
        events = [event for _, event in events_in(data, f"{self.url}/{name}")]
        kept = [without_purged(event, purged) for event in events]
        if kept == events:
            return 0
        text = "".join(map(event_line, kept)).encode()
        self._rewrite(f"{REVIEWS}/{short(hashlib.sha256(text).hexdigest())}.jsonl", text)
        self.remove(name)
        return 1

    def _rewrite(self, name: str, data: bytes) -> None:
        try:
            self.write(name, data)
        except UserError as error:
            raise UserError(
                f"Could not erase the text of purged rows on the remote: {error.what}",
                where=f"{self.url}/{name}",
                fix=f"The file still contains the text. {error.fix or ''} Then push again.",
            ) from error

    def head(self) -> str | None:
        """Return the digest of the latest pushed version.

        Raises:
            UserError: HEAD is invalid.
        """
        data = self.read_if_there("HEAD")
        if data is None:
            return None
        digest = data.decode(errors="replace").strip()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise UserError(f"Invalid version digest in HEAD: {digest[:80]!r}", where=f"{self.url}/HEAD", fix=AGAIN)
        return digest

    def reviews(self, reporter: Reporter) -> list[Event]:
        """Return all review events on the remote.

        Raises:
            UserError: a file was changed; names it.
        """
        events: list[Event] = []
        for name in self._names(REVIEWS, reporter):
            path = f"{REVIEWS}/{name}"
            data = self.read(path)
            events += [event for _, event in events_in(data, f"{self.url}/{path}")]
            if short(hashlib.sha256(data).hexdigest()) != name.removesuffix(".jsonl"):
                # Each line has a valid digest, so lines are missing or duplicated.
                raise UserError(
                    "The file was changed: its digest does not match",
                    where=f"{self.url}/{path}",
                    fix="Restore the file, or delete it and push again from the copies that have its reviews.",
                )
        return events

    def _names(self, folder: str, reporter: Reporter) -> list[str]:
        """Return the files in a folder; empty if it does not exist."""
        with self.refusals():
            try:
                listed = self.fs.ls(f"{self.root}/{folder}", detail=False)
            except FileNotFoundError:
                if self.is_web and folder == REVIEWS:
                    reporter.warn(f"No reviews were copied: {self.url} has none, or does not list files.")
                return []
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed)
        return sorted(name for name in names if re.fullmatch(r"[0-9a-f]{12}\.jsonl", name))

    def line(self, head: str, stop: Collection[str] = ()) -> list[Manifest]:
        """Return the version ``head`` and its ancestors, newest first, up to a version in ``stop`` or a missing one."""
        line = [self._manifest(head)]
        while (parent := line[-1].parent) is not None and parent not in stop and self.has_version(parent):
            if any(m.digest == parent for m in line):
                raise UserError(f"Version {short(parent)} is its own ancestor", where=self.url, fix=AGAIN)
            line.append(self._manifest(parent))
        return line

    def _manifest(self, digest: str) -> Manifest:
        name = f"versions/{short(digest)}/{MANIFEST}"
        try:
            manifest = Manifest.model_validate_json(self.read(name))
        except ValidationError as error:
            raise UserError(f"Invalid manifest: {first_fault(error)}", where=f"{self.url}/{name}", fix=AGAIN) from None
        if manifest.digest != digest:
            raise UserError(
                f"The manifest belongs to version {short(manifest.digest)}", where=f"{self.url}/{name}", fix=AGAIN
            )
        return manifest
