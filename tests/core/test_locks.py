"""Locks between processes: one holder, a limit to each wait, and folders on NFS."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from tunewright.core import locks
from tunewright.core.errors import UserError
from tunewright.core.locks import in_use, lock_file, locked_folder, remove_abandoned

BUSY = UserError("busy")


def _hold_as_nfs(handle: int, operation: int) -> None:
    """Lock as Linux does on NFS: exclusively only what is open for writing (flock(2), "NFS details")."""
    writable = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    if operation & fcntl.LOCK_EX and not writable:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    _FLOCK(handle, operation)


_FLOCK = fcntl.flock


@pytest.mark.parametrize("nfs", [False, True])
def test_folder_has_one_holder_and_is_free_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, nfs: bool
) -> None:
    if nfs:
        monkeypatch.setattr(fcntl, "flock", _hold_as_nfs)
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        with locked_folder(folder, BUSY), pytest.raises(UserError, match="busy"), locked_folder(folder, BUSY, 0.02):
            raise AssertionError("two holders")
    assert [file.name for file in folder.iterdir()] == ([".lock"] if nfs else [])


def test_file_that_another_command_keeps_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "FILE_S", 0.02)
    path = tmp_path / "reviews.jsonl"
    with path.open("ab") as first, path.open("ab") as second:
        lock_file(first)
        with pytest.raises(UserError, match=r"has been writing this file for 0\.02 s") as caught:
            lock_file(second)
    assert caught.value.where == str(path)


def test_only_abandoned_folders_are_removed(tmp_path: Path) -> None:
    for name in ("used", "left"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "used")
    with in_use(tmp_path / "used"):
        remove_abandoned([*tmp_path.iterdir(), tmp_path / "gone"])
        assert {path.name for path in tmp_path.iterdir()} == {"used", "link"}
    remove_abandoned([tmp_path / "link"])
    assert (tmp_path / "used" / "inner").is_dir()
