"""Remote storage of a dataset: its files, and UserErrors for the exceptions of file systems."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunewright.core.errors import UserError
from tunewright.core.io import write_bytes
from tunewright.core.progress import Reporter
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
_CREDENTIALS = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile that AWS_PROFILE names"
_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"}


def _loaded(module: str, name: str) -> type[Exception] | None:
    """Return an exception class of a library, if it has been imported."""
    found: type[Exception] | None = getattr(sys.modules.get(module), name, None)
    return found


def _refused() -> tuple[type[Exception], ...]:
    """Return the exceptions of file systems; those of S3 and HTTP are not OSErrors, and may not be imported."""
    names = (
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("aiohttp", "ClientError"),
    )
    also = [loaded for name in names if (loaded := _loaded(*name))]
    return OSError, ValueError, NotImplementedError, *also


def _code(error: Exception) -> str:
    """Return S3's error code, which s3fs keeps in the cause of an OSError."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _explained(error: Exception) -> tuple[str, str]:
    """Return the message and the fix for an exception."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    code = _code(error)
    no_credentials = _loaded("botocore.exceptions", "NoCredentialsError")
    no_connection = _loaded("botocore.exceptions", "ConnectionError")
    if code == "NoSuchBucket":
        return "No such bucket", "Correct its name, or create it first: a push does not create buckets."
    if no_credentials is not None and isinstance(error, no_credentials):
        return "No credentials", f"{_CREDENTIALS}."
    if code and isinstance(error, PermissionError):
        return f"Access denied ({reason})", f"{_CREDENTIALS}, and that they allow reading and writing."
    if no_connection is not None and isinstance(error, no_connection):
        return f"Cannot connect: {reason}", "Check the network, and AWS_ENDPOINT_URL if the bucket is not at AWS."
    return f"The remote cannot be used: {reason}", "Check the URL, the network and your permissions."


class RemoteStore:
    """The files below a URL; exceptions of the file system become UserErrors."""

    def __init__(self, url: str, options: dict[str, Any] | None) -> None:
        import fsspec  # type: ignore[import-untyped]

        self.url = url.rstrip("/") or url
        with self._refusals():
            self.fs, root = fsspec.core.url_to_fs(self.url, **(options or {}))
            # Others may have pushed since this process looked.
            self.fs.invalidate_cache()
        self.root = str(root).rstrip("/")
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self.has_folders = not protocols & _BUCKETS
        self.is_local = "file" in protocols
        self.is_web = "http" in protocols
        with self._refusals():
            if self.fs.exists(f"{self.root}/rows"):
                raise UserError(
                    "This is a project's dataset folder",
                    where=url,
                    fix="Use a separate folder for pushes.",
                )

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            extra = "pip install 'tunewright[s3]'" if self.url.startswith(("s3://", "s3a://")) else None
            fix = f"Install it: {extra}" if extra else "Install the fsspec package for this URL."
            raise UserError(str(error), where=self.url, fix=fix) from None
        except _refused() as error:
            if isinstance(error, UserError):
                raise
            what, fix = _explained(error)
            raise UserError(what, where=self.url, fix=fix) from error

    def read_if_there(self, name: str) -> bytes | None:
        with self._refusals():
            try:
                data: bytes = self.fs.cat_file(f"{self.root}/{name}")
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return None
        return data

    def read(self, name: str) -> bytes:
        data = self.read_if_there(name)
        if data is None:
            raise UserError("The file is missing", where=f"{self.url}/{name}", fix=AGAIN)
        return data

    def has(self, digest: str) -> bool:
        """Return whether the remote has a complete version."""
        with self._refusals():
            return bool(self.fs.exists(f"{self.root}/versions/{short(digest)}/{MANIFEST}"))

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: fsspec moves it into place at the end of the transaction.

        In a local folder it would copy from the folder for temporary files, and a full disk would leave half a file.
        """
        path = f"{self.root}/{name}"
        if self.is_local:
            write_bytes(Path(path), data)
            return
        with self._refusals():
            if self.has_folders:  # buckets have no folders, and makedirs would create a bucket with a mistyped name
                self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            with self.fs.transaction, self.fs.open(path, "wb") as file:
                file.write(data)

    def remove(self, name: str) -> None:
        """Delete a file."""
        with self._refusals():
            self.fs.rm_file(f"{self.root}/{name}")

    def versions(self) -> list[str]:
        """Return the folder names of all versions on the remote, of any branch."""
        with self._refusals():
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
        with self._refusals():
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
        while (parent := line[-1].parent) is not None and parent not in stop and self.has(parent):
            if any(m.digest == parent for m in line):
                raise UserError(f"Version {short(parent)} is its own ancestor", where=self.url, fix=AGAIN)
            line.append(self._manifest(parent))
        return line

    def _manifest(self, digest: str) -> Manifest:
        name = f"versions/{short(digest)}/{MANIFEST}"
        try:
            manifest = Manifest.model_validate_json(self.read(name))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            what = f"Invalid manifest: {key} {first['msg']}"
            raise UserError(what, where=f"{self.url}/{name}", fix=AGAIN) from None
        if manifest.digest != digest:
            raise UserError(
                f"The manifest belongs to version {short(manifest.digest)}", where=f"{self.url}/{name}", fix=AGAIN
            )
        return manifest
