"""The private folder of an engine's process; what a killed gateway has left is taken away at the next start."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "tunewright-engine-"
_LOCK = "lock"


class PrivateFolder:
    """A new folder for temporary files that only this user can open (mode 0700).

    A lock in it is held for as long as this process lives, and goes with it however it ends: a folder whose lock is
    free is nobody's any more. One without a lock is left alone.
    """

    def __init__(self) -> None:
        _remove_left()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        # It has its name only once it is held, or another process could take it for free.
        fresh = self.path / f"{_LOCK}.new"
        self._lock = fresh.open("xb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        fresh.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Take it away; a second call does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_left() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is going, or somebody holds it
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            with (folder / _LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
