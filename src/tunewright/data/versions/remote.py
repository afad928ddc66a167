"""Dataset versions elsewhere: push and pull to a folder, S3 or any other place that fsspec reaches.

URL/HEAD                            the digest of the version that was pushed last
URL/versions/DIGEST12/rows.jsonl    the rows that the version's parent does not have
                      members.tsv, imports.jsonl, manifest.json   as in the dataset folder; the manifest comes last

No file but HEAD is ever written again, so two who push at once cannot spoil each other's versions, and a version whose
manifest is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunewright.data.examples import Example
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
    version_folder,
    write_head,
)
from tunewright.data.versions.members import MEMBERS, places_of, read_members, read_places
from tunewright.data.versions.rows import parse_rows, rows_text, write_rows
from tunewright.disk import new_folder
from tunewright.errors import UserError
from tunewright.progress import Reporter

_ROWS = "rows.jsonl"
_FILES = len(VERSION_FILES) + 1
_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"}

_ADD = "`tunewright data add FILE` makes one."
_AGAIN = "Restore the file, or push the version again from a side that has it whole, after removing its folder there."


@dataclass(frozen=True)
class Transfer:
    """What a push or a pull copied, versions oldest first; ``head`` is current on both sides unless one is ``ahead``.

    ``ahead`` counts the versions that the side copied to has and the other lacks: nothing was done then.
    """

    url: str
    versions: tuple[str, ...]
    rows: int
    bytes: int
    head: str
    ahead: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        return {
            "url": self.url,
            "versions": list(self.versions),
            "rows": self.rows,
            "bytes": self.bytes,
            "head": self.head,
            "ahead": self.ahead,
        }


def push(dataset: Path, url: str, reporter: Reporter, *, options: dict[str, Any] | None = None) -> Transfer:
    """Copy the current version and those that it was made from to ``url``: what is not there yet, HEAD last.

    Each version is verified before it is copied. Other branches stay here.

    Args:
        url: any URL or path that fsspec knows: a folder, s3://bucket/prefix, …
        options: fsspec's storage options (endpoint, credentials); None: from the environment, as the library does.

    Raises:
        UserError: no version yet, a version was changed by hand, the other side has versions that this side's are not
            made from (nothing is copied then), or it cannot be reached.
    """
    if not dataset.is_dir():
        raise UserError("there is no dataset to push", where=str(dataset), fix=_ADD)
    with locked(dataset):
        head = current_manifest(dataset)
        if head is None:
            raise UserError("there is no dataset version to push", where=str(dataset), fix=_ADD)
        mine = ancestry(dataset, head)
        place = _Place(url, options)
        before = place.head()
        if before is not None and before not in {m.digest for m in mine}:
            theirs = place.line(before)
            if head.digest not in {m.digest for m in theirs}:
                raise _diverged(mine, theirs, url)
            return Transfer(url, (), 0, 0, before, ahead=_position(theirs, head.digest))
        lacking = [m for m in reversed(mine[: _position(mine, before)]) if not place.has(m.digest)]
        rows = size = 0
        with reporter.task("pushing", len(lacking) * _FILES, "files") as task:
            for manifest in lacking:
                new, files = _packed(dataset, manifest)
                for name, data in files.items():
                    place.write(f"versions/{short(manifest.digest)}/{name}", data)
                    task.advance(note=f"{short(manifest.digest)}/{name}")
                    size += len(data)
                rows += new
        if place.head() != before:
            raise UserError("somebody else pushed at the same time", where=url, fix="Run the push again.")
        if before != head.digest:
            place.write("HEAD", f"{head.digest}\n".encode())
    return Transfer(url, tuple(m.digest for m in lacking), rows, size, head.digest)


def pull(dataset: Path, url: str, reporter: Reporter, *, options: dict[str, Any] | None = None) -> Transfer:
    """Copy the other side's current version and those that it was made from; what is here already stays as it is.

    Every row, member list and manifest is checked against its digest; then the version becomes current.

    Args:
        url, options: as for ``push``.

    Raises:
        UserError: nothing was pushed there, something there was changed, this side has versions that the other side's
            are not made from, or it cannot be reached. The current version then stays what it was.
    """
    with locked(dataset):
        current = current_manifest(dataset)
        mine = ancestry(dataset, current) if current else []
        place = _Place(url, options)
        head = place.head()
        if head is None:
            raise UserError("no dataset was pushed there", where=url, fix=f"Push one: tunewright data push {url}")
        if head in {m.digest for m in mine}:
            return Transfer(url, (), 0, 0, mine[0].digest, ahead=_position(mine, head))
        theirs = place.line(head, stop={m.digest for m in mine})
        if current is not None and theirs[-1].parent != current.digest:
            raise _diverged(mine, place.line(head), url)
        lacking = [m for m in reversed(theirs) if not (version_folder(dataset, m.digest) / MANIFEST).is_file()]
        rows: dict[str, Example] = {}
        size = 0
        with reporter.task("pulling", len(lacking) * _FILES, "files") as task:
            for manifest in lacking:
                new, read = _unpack(dataset, place, manifest, reporter)
                task.advance(_FILES, note=short(manifest.digest))
                rows |= new
                size += read
        load_version(dataset, head)
        write_head(dataset, head)
    return Transfer(url, tuple(m.digest for m in lacking), len(rows), size, head)


def _position(line: Sequence[Manifest], digest: str | None) -> int:
    """How many versions of a line, newest first, come after the one with this digest; all if none has it."""
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


def _packed(dataset: Path, manifest: Manifest) -> tuple[int, dict[str, bytes]]:
    """How many rows a version brought, and its files as they are pushed, the manifest last."""
    version = load_version(dataset, manifest.digest)
    known = _parents_rows(dataset, manifest)
    new = {m.key: m.example for m in version.members if m.key not in known}
    folder = version_folder(dataset, manifest.digest)
    files = {name: (folder / name).read_bytes() for name in VERSION_FILES}
    _check_files(manifest, files, str(folder))
    return len(new), {_ROWS: rows_text(new).encode(), **files}


def _parents_rows(dataset: Path, manifest: Manifest) -> Mapping[str, Any]:
    """The parent's members by pair key; none where there is no parent, or the dataset does not have it."""
    if manifest.parent is None or not version_folder(dataset, manifest.parent).is_dir():
        return {}
    return read_places(dataset, manifest.parent)


def _unpack(dataset: Path, place: _Place, manifest: Manifest, reporter: Reporter) -> tuple[dict[str, Example], int]:
    """Bring one version here, its parent being here; the rows that it brought, and the bytes read."""
    base = f"versions/{short(manifest.digest)}"
    files = {name: place.read(f"{base}/{name}") for name in VERSION_FILES}
    _check_files(manifest, files, f"{place.url}/{base}")
    data = place.read(f"{base}/{_ROWS}")
    where = f"{place.url}/{base}/{_ROWS}"
    rows = parse_rows(data, where)
    members = read_members(dataset, manifest.digest, files[MEMBERS], f"{place.url}/{base}/{MEMBERS}")
    missing = places_of(members).keys() - rows.keys()
    missing -= _parents_rows(dataset, manifest).keys()
    if missing:
        raise UserError(f"the row {min(missing)} is missing", where=where, fix=_AGAIN)
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
    wrong = {
        IMPORTS: manifest.imports not in (None, hashlib.sha256(files[IMPORTS]).hexdigest()),
        MANIFEST: manifest.seal not in (None, manifest_seal(document)),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise UserError("it was changed: it does not have its digest", where=f"{where}/{name}", fix=_AGAIN)


class _Place:
    """The other side: files by their path below the URL, and the user's mistakes for what a file system raises."""

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
        with self._refusals():
            if self.fs.exists(f"{self.root}/rows"):
                raise UserError(
                    "this is a project's own dataset folder",
                    where=url,
                    fix="Use a folder that is there only for pushes.",
                )

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        # The exceptions of S3 (no credentials, no endpoint) and HTTP are no OSErrors; who uses them has loaded these.
        names = (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError"))
        also: list[type[Exception]] = [getattr(sys.modules[m], name) for m, name in names if m in sys.modules]
        refused: tuple[type[Exception], ...] = (OSError, ValueError, NotImplementedError, *also)
        try:
            yield
        except ImportError as error:
            raise UserError(str(error), where=self.url, fix="Install the package that such a URL needs.") from None
        except refused as error:
            if isinstance(error, UserError):
                raise
            told = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UserError(
                f"cannot be reached or used: {told}", where=self.url, fix="Check the URL, the network and your rights."
            ) from error

    def read_if_there(self, name: str) -> bytes | None:
        with self._refusals():
            try:
                data: bytes = self.fs.cat_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return None
        return data

    def read(self, name: str) -> bytes:
        data = self.read_if_there(name)
        if data is None:
            raise UserError("the file is missing", where=f"{self.url}/{name}", fix=_AGAIN)
        return data

    def has(self, digest: str) -> bool:
        """Whether a version is there, whole."""
        with self._refusals():
            return bool(self.fs.exists(f"{self.root}/versions/{short(digest)}/{MANIFEST}"))

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, or leave what was there: fsspec moves it into place when the transaction ends."""
        path = f"{self.root}/{name}"
        with self._refusals():
            if self.has_folders:  # in a bucket there are none, and a bucket of a mistyped name must not be made
                self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            with self.fs.transaction, self.fs.open(path, "wb") as file:
                file.write(data)

    def head(self) -> str | None:
        """The digest of the version that was pushed last.

        Raises:
            UserError: HEAD holds something else.
        """
        data = self.read_if_there("HEAD")
        if data is None:
            return None
        digest = data.decode(errors="replace").strip()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise UserError(f"HEAD is no digest of a version: {digest[:80]!r}", where=f"{self.url}/HEAD", fix=_AGAIN)
        return digest

    def line(self, head: str, stop: Collection[str] = ()) -> list[Manifest]:
        """The version ``head`` and those that it was made from, newest first, up to those in ``stop`` or not there."""
        line = [self._manifest(head)]
        while (parent := line[-1].parent) is not None and parent not in stop and self.has(parent):
            if any(m.digest == parent for m in line):
                raise UserError(f"version {short(parent)} is its own ancestor", where=self.url, fix=_AGAIN)
            line.append(self._manifest(parent))
        return line

    def _manifest(self, digest: str) -> Manifest:
        name = f"versions/{short(digest)}/{MANIFEST}"
        try:
            manifest = Manifest.model_validate_json(self.read(name))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            what = f"not a version's manifest: {key} {first['msg']}"
            raise UserError(what, where=f"{self.url}/{name}", fix=_AGAIN) from None
        if manifest.digest != digest:
            raise UserError(
                f"the manifest is that of version {short(manifest.digest)}", where=f"{self.url}/{name}", fix=_AGAIN
            )
        return manifest
