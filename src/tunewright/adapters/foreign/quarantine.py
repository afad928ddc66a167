"""Quarantine: a foreign adapter is copied here before it is read, so that the checked files are the stored files.

From a folder, only plain files are opened, by file descriptor and without following links. From a URL, only the files
that a manifest names are fetched. Bytes are counted as they arrive: sizes that a file system or a server claims are
ignored.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tunewright.adapters.manifest import DSSE, LOCAL, MANIFEST, SIGNATURE, read_manifest
from tunewright.adapters.registry import CHECKPOINTS, CONFIG, HISTORY, LINEAGE, REPLAY, WEIGHTS
from tunewright.core.errors import UserError
from tunewright.core.io import writing
from tunewright.core.locks import in_use, remove_abandoned
from tunewright.core.remote_files import RemoteFile, RemoteFiles

README = "README.md"

NO_ARCHIVE = "Not a folder: archives are not imported"

MEGABYTE = 1 << 20

LARGEST = 2048 * MEGABYTE
"""Size limit of all files together: rank 64 on all linear layers of a 70B base is 1.6 GB in 16 bits."""

MOST_MEMBERS = 64
"""Limit of files and folders: an adapter of ours has at most 25 files (9 checkpoints of two)."""

CAPS = {
    CONFIG: MEGABYTE,
    LINEAGE: 64 * MEGABYTE,
    MANIFEST: MEGABYTE,
    SIGNATURE: MEGABYTE,
    DSSE: MEGABYTE,
    HISTORY: 64 * MEGABYTE,
    REPLAY: 64 * MEGABYTE,
    WEIGHTS: LARGEST,
    README: MEGABYTE,
    LOCAL: MEGABYTE,
}
"""Size limit of each file by its name; no other name is allowed."""

_CHECKPOINT = re.compile(rf"{CHECKPOINTS}/step-[0-9]{{1,9}}")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill")


@contextmanager
def quarantine(root: Path) -> Iterator[Path]:
    """Yield an empty folder within ``root``, readable only by its owner; remove it and leftovers of killed imports."""
    remove_abandoned(root.glob(".quarantine-*"))
    with writing(root):
        folder = Path(tempfile.mkdtemp(dir=root, prefix=".quarantine-"))
    with in_use(folder):
        try:
            with writing(root):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class QuarantinedFiles:
    """The files copied into a quarantine so far: each name once, allowed, and within its size limit."""

    def __init__(self, folder: Path, where: str) -> None:
        self.folder = folder
        self.where = where
        self.files: set[str] = set()
        self._bytes = 0
        self._members = 0

    def count(self, name: str) -> None:
        """Count one more file or folder, and refuse too many."""
        self._members += 1
        if self._members > MOST_MEMBERS:
            raise UserError(f"More than {MOST_MEMBERS} files and folders, the limit for an adapter", where=self.where)
        if len(name) > 255:
            raise UserError(f"A name has {len(name):,} characters (limit 255)", where=self.where)

    def take(self, name: str, source: BinaryIO | RemoteFile) -> None:
        """Copy one file in; ``name`` is its path within the adapter, with ``/``."""
        require_known(name, self.where)
        if name in self.files:
            raise UserError("The file is there twice", where=f"{self.where}, {name}")
        self.files.add(name)
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        cap = CAPS[name.rpartition("/")[2]]
        taken = 0
        with target.open("xb") as file:
            while chunk := source.read(MEGABYTE):
                taken += len(chunk)
                self._bytes += len(chunk)
                # Counted while copying: the size that a file system or a server states may be wrong or change.
                if taken > cap or self._bytes > LARGEST:
                    most = cap if taken > cap else LARGEST
                    what = "The file is" if taken > cap else "All files together are"
                    raise UserError(
                        f"{what} larger than {most // MEGABYTE:,} MB, the limit for an adapter",
                        where=f"{self.where}, {name}",
                    )
                file.write(chunk)


def require_known(name: str, where: str) -> None:
    """Refuse a file whose path within the adapter is not on the allowlist."""
    folder, _, file = name.rpartition("/")
    if name in CAPS or (file in (CONFIG, WEIGHTS) and _CHECKPOINT.fullmatch(folder)):
        return
    where = f"{where}, {name!a}"
    if file.lower().endswith(_PICKLES):
        raise UserError("A pickle can run code when it is read: only safetensors are allowed", where=where)
    if file.lower().endswith(".safetensors"):
        raise UserError(f"All weights must be in {WEIGHTS}", where=where)
    raise UserError(
        "This file is not part of an adapter",
        where=where,
        fix=f"Required are {CONFIG} and {WEIGHTS}; {README}, {LINEAGE}, {MANIFEST} and {SIGNATURE} are optional.",
    )


def quarantine_folder(source: Path, intake: QuarantinedFiles) -> None:
    """Copy the adapter in a folder into quarantine."""
    # Every open is relative to this handle, so a folder replaced by a link cannot redirect the copy.
    root = _open(str(source), os.O_DIRECTORY, None, intake.where)
    try:
        _take_level(root, "", intake)
    finally:
        os.close(root)


def quarantine_remote(source: RemoteFiles, intake: QuarantinedFiles) -> None:
    """Copy the adapter at a URL into quarantine: the files that its manifest names."""
    if _ARCHIVE.search(source.url):
        raise UserError(NO_ARCHIVE, where=intake.where, fix="Unpack it, and import its folder or push it to a URL.")
    if not source.has(MANIFEST):
        raise UserError(f"No adapter: {MANIFEST} is missing", where=intake.where, fix=_PUSH)

    def take(name: str) -> None:
        intake.count(name)
        with source.opened(name) as file:
            intake.take(name, file)

    take(MANIFEST)
    manifest = read_manifest(intake.folder)
    assert manifest is not None
    for name in (SIGNATURE, DSSE):
        if source.has(name):
            take(name)
    for name in sorted(manifest.files):
        require_known(name, intake.where)
        take(name)


_ARCHIVE = re.compile(r"^(zip|tar|libarchive)://|\.(zip|tar|t[bgx]z2?|tar\.[a-z0-9]+)(\?.*)?$", re.IGNORECASE)
_PUSH = "Push it from its project (tunewright adapters push URL NAME), and import URL/NAME-DIGEST."


def _open(name: str, flags: int, level: int | None, where: str) -> int:
    try:
        return os.open(name, os.O_RDONLY | flags, dir_fd=level)
    except OSError as error:  # no permission, or a link has replaced the file since the check
        raise UserError(f"Cannot read the file: {error.strerror}", where=where) from None


def _take_level(level: int, prefix: str, intake: QuarantinedFiles) -> None:
    names = []
    with os.scandir(level) as entries:
        for entry in entries:
            intake.count(entry.name)
            names.append(entry.name)
    for name in sorted(names):
        path = prefix + name
        where = f"{intake.where}, {path!a}"
        kind = os.stat(name, dir_fd=level, follow_symlinks=False).st_mode
        if stat.S_ISDIR(kind):
            if path != CHECKPOINTS and not _CHECKPOINT.fullmatch(path):
                raise UserError("This folder is not part of an adapter", where=where)
            inner = _open(name, os.O_DIRECTORY | os.O_NOFOLLOW, level, where)
            try:
                _take_level(inner, f"{path}/", intake)
            finally:
                os.close(inner)
            continue
        _require_plain(kind, where)
        require_known(path, intake.where)
        # The file may have been replaced: check the opened one again. O_NONBLOCK, because opening a pipe would block.
        handle = _open(name, os.O_NOFOLLOW | os.O_NONBLOCK, level, where)
        with os.fdopen(handle, "rb") as file:
            facts = os.fstat(file.fileno())
            _require_plain(facts.st_mode, where)
            # A hard link could name a private file of the user, whose content the copy would store.
            if facts.st_nlink > 1:
                raise UserError("The file is a hard link to another file", where=where, fix=_COPY)
            intake.take(path, file)


_COPY = "If you trust its links, copy the folder first and follow them: cp -rL."


def _require_plain(kind: int, where: str) -> None:
    if not stat.S_ISREG(kind):
        raise UserError("Not a plain file, but a link, a pipe, a socket or a device", where=where, fix=_COPY)
