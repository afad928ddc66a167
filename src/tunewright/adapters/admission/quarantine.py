"""A folder that a foreign adapter is copied into before it is read, so that what is checked is what is kept.

Of a folder only plain files are opened, by file descriptor and without following links; of an archive only plain
members are written, by names from a list. Bytes are counted as they come: sizes that a file system or an archive claims
count for nothing.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tunewright.adapters.manifest import LOCAL, MANIFEST, SIGNATURE
from tunewright.adapters.registry import CHECKPOINTS, CONFIG, HISTORY, LINEAGE, REPLAY, WEIGHTS
from tunewright.core.errors import UserError
from tunewright.core.io import writing

README = "README.md"

MEGABYTE = 1 << 20

LARGEST = 2048 * MEGABYTE
"""All files together: rank 64 on all linear layers of a 70B base is 1.6 GB in 16 bits."""

MOST_MEMBERS = 64
"""Of an archive or a folder: an adapter of ours has at most 25 files (9 checkpoints of two)."""

CAPS = {
    CONFIG: MEGABYTE,
    LINEAGE: 64 * MEGABYTE,
    MANIFEST: MEGABYTE,
    SIGNATURE: MEGABYTE,
    HISTORY: 64 * MEGABYTE,
    REPLAY: 64 * MEGABYTE,
    WEIGHTS: LARGEST,
    README: MEGABYTE,
    LOCAL: MEGABYTE,
}
"""Bytes that each file may have, by its name; no other name is let in."""

_CHECKPOINT = re.compile(rf"{CHECKPOINTS}/step-[0-9]{{1,9}}")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill")
_CODE = (".py", ".pyc", ".so", ".sh", ".dll", ".dylib", ".exe")
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def quarantine(root: Path) -> Iterator[Path]:
    """An empty folder within ``root``, readable by its owner alone, that is gone afterwards whatever happened.

    Those of imports that were killed go too: theirs nobody holds a lock on.
    """
    for left in root.glob(".quarantine-*"):
        _remove_if_left(left)
    with writing(root):
        folder = Path(tempfile.mkdtemp(dir=root, prefix=".quarantine-"))
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        with writing(root):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove_if_left(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)


class Intake:
    """What has come into a quarantine so far: no file twice, none of another name or larger than it may be."""

    def __init__(self, folder: Path, where: str) -> None:
        self.folder = folder
        self.where = where
        self.files: set[str] = set()
        self._bytes = 0
        self._members = 0

    def count(self, name: str) -> None:
        """Count one more file, folder or member.

        Raises:
            UserError: there are more than an adapter has.
        """
        self._members += 1
        if self._members > MOST_MEMBERS:
            raise UserError(f"over {MOST_MEMBERS} files and folders: no adapter has so many", where=self.where)
        if len(name) > 255:
            raise UserError(f"a name of {len(name):,} characters", where=self.where)

    def take(self, name: str, source: IO[bytes]) -> None:
        """Copy one file in.

        Args:
            name: its path within the adapter, with ``/``.
            source: its bytes.

        Raises:
            UserError: a name that is not allowed or came before, or more bytes than it may have.
        """
        require_known(name, self.where)
        if name in self.files:
            raise UserError("it is there twice", where=f"{self.where}, {name}")
        self.files.add(name)
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        cap = CAPS[name.rpartition("/")[2]]
        taken = 0
        with target.open("xb") as file:
            while chunk := source.read(MEGABYTE):
                taken += len(chunk)
                self._bytes += len(chunk)
                if taken > cap or self._bytes > LARGEST:
                    most = cap if taken > cap else LARGEST
                    what = "it" if taken > cap else "all files together"
                    raise UserError(
                        f"{what} came to over {most // MEGABYTE:,} MB, which is more than an adapter has",
                        where=f"{self.where}, {name}",
                    )
                file.write(chunk)


def require_known(name: str, where: str) -> None:
    """Refuse a file by its path within the adapter, unless it is one of those that adapters have.

    Raises:
        UserError: saying what is wrong with the name.
    """
    where = f"{where}, {name!a}"
    require_plain_path(name, where)
    folder, _, file = name.rpartition("/")
    lowered = file.lower()
    if folder and not (_CHECKPOINT.fullmatch(folder) and file in (CONFIG, WEIGHTS)):
        raise UserError("an adapter has no such file", where=where)
    if file in CAPS:
        return
    if lowered.endswith(_PICKLES):
        raise UserError("a pickle can run code when it is read: only safetensors are let in", where=where)
    if lowered.endswith(_CODE):
        raise UserError("an adapter holds no code", where=where)
    if lowered.endswith(".safetensors"):
        raise UserError(f"weights are in one file, {WEIGHTS}", where=where)
    raise UserError(
        "an adapter has no such file",
        where=where,
        fix=f"Needed are {CONFIG} and {WEIGHTS}; {README}, {LINEAGE}, {MANIFEST} and {SIGNATURE} may be there.",
    )


def require_plain_path(name: str, where: str) -> None:
    """Refuse a path that could lead out of its folder, or be another path on another system.

    Raises:
        UserError: saying what is wrong with it.
    """
    parts = name.split("/")
    if not name.isascii():
        raise UserError("a name with letters that are not ASCII can pass for another", where=where)
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise UserError("a name with control characters", where=where)
    if name.startswith("/"):
        raise UserError("an absolute path", where=where)
    if "\\" in name or re.match("[A-Za-z]:", name):
        raise UserError("a path of Windows", where=where)
    if ".." in parts:
        raise UserError("a path that leads out of the folder (..)", where=where)
    if "" in parts or "." in parts:
        raise UserError("a path with empty parts", where=where)


def take_folder(source: Path, intake: Intake) -> None:
    """Copy the adapter in a folder into quarantine.

    Raises:
        UserError: a link, a device, a name that is not allowed, or too much of anything.
    """
    root = _open(str(source), os.O_DIRECTORY, None, intake.where)
    try:
        _take_level(root, "", intake)
    finally:
        os.close(root)


def _open(name: str, flags: int, level: int | None, where: str) -> int:
    try:
        return os.open(name, os.O_RDONLY | flags, dir_fd=level)
    except OSError as error:  # no permission, or a link since it was looked at
        raise UserError(f"cannot be read: {error.strerror}", where=where) from None


def _take_level(level: int, prefix: str, intake: Intake) -> None:
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
                raise UserError("an adapter has no such folder", where=where)
            inner = _open(name, os.O_DIRECTORY | os.O_NOFOLLOW, level, where)
            try:
                _take_level(inner, f"{path}/", intake)
            finally:
                os.close(inner)
            continue
        _require_plain(kind, where)
        require_known(path, intake.where)
        # It may be another by now: the file that was opened is asked again. A pipe would keep a reader waiting.
        handle = _open(name, os.O_NOFOLLOW | os.O_NONBLOCK, level, where)
        with os.fdopen(handle, "rb") as file:
            facts = os.fstat(file.fileno())
            _require_plain(facts.st_mode, where)
            if facts.st_nlink > 1:
                raise UserError("a hard link: the file is another one's too", where=where, fix=_COPY)
            intake.take(path, file)


_COPY = "Copy the folder first, with what its links lead to (cp -rL), if you know where they lead."


def _require_plain(kind: int, where: str) -> None:
    if not stat.S_ISREG(kind):
        raise UserError(f"{_KINDS.get(stat.S_IFMT(kind), 'no plain file')}, not a plain file", where=where, fix=_COPY)
