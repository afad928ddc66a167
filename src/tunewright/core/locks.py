"""Locks between processes, on files and folders that exist anyway (flock).

The system releases them however a process ends. filelock would leave a file of its own in folders that people commit.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tunewright.core.errors import UserError
from tunewright.core.io import writing

_NFS_LOCK = ".lock"
FILE_S = 10.0
"""Seconds that a command waits for another one to finish writing a file."""


def lock(handle: int, seconds: float = 0.0) -> bool:
    """Lock an open file for this process only; return False if another still holds it after ``seconds``."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)
        else:
            return True


def lock_file(file: BinaryIO) -> None:
    """Lock an open file for this process only."""
    if not lock(file.fileno(), FILE_S):
        raise UserError(
            f"Another command has been writing this file for {FILE_S:g} s",
            where=str(file.name),
            fix="Continue it (fg) or end it, and run the same command again.",
        )


@contextmanager
def locked_folder(folder: Path, busy: UserError, seconds: float = 0.0) -> Iterator[None]:
    """Create a folder and lock it for this process only; ``busy`` if another still holds it after ``seconds``."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            held = lock(handle, seconds)
        except OSError as error:
            # NFS locks only what is open for writing, which a folder cannot be (flock(2), "NFS details").
            if error.errno != errno.EBADF:
                raise
            with writing(folder), (folder / _NFS_LOCK).open("a") as file:
                os.dup2(file.fileno(), handle, inheritable=False)
            held = lock(handle, seconds)
        if not held:
            raise busy
        yield
    finally:
        os.close(handle)


def is_locked(folder: Path) -> bool:
    """Return whether a process has locked this folder; False if it is gone.

    The check itself holds a lock for a moment, for which :func:`locked_folder` has to wait.
    """
    on_nfs = folder / _NFS_LOCK
    with suppress(FileNotFoundError):
        handle = os.open(on_nfs if on_nfs.exists() else folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
    return False


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Mark a temporary folder as in use, so that other processes do not remove it as abandoned."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove temporary folders that no process has marked as :func:`in_use`."""
    for folder in folders:
        with suppress(OSError):  # in use, or another process removes it
            handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                if lock(handle):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
