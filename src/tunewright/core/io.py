"""Digests and atomic writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs

from tunewright.core.errors import UserError

_REFUSALS = {
    errno.ENOSPC: ("the disk is full", "Free some space and run the same command again."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space and run the same command again."),
    errno.EIO: (
        "the disk reports an input/output error",
        "Check the disk: the system's log has its errors. Then run the same command again.",
    ),
    errno.EFBIG: (
        "the file exceeds the size limit of this system",
        "Raise the limit (ulimit -f), or choose another folder.",
    ),
    errno.ENOENT: (
        "the file or folder has disappeared",
        "Another program may have deleted it. Run the same command again.",
    ),
    errno.EEXIST: ("a file is in the place of a folder", "Choose another folder."),
    errno.ENOTDIR: ("a file is in the place of a folder", "Choose another folder."),
    errno.EROFS: ("the file system is read-only", "Choose a folder that can be written to."),
    errno.EACCES: ("permission denied", "Choose a folder that you may write to."),
    errno.EPERM: ("permission denied", "Choose a folder that you may write to."),
}

MANIFEST = "manifest.json"
"""In a sealed folder: file names and their SHA-256 digests, written last."""


canonical_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
"""Return the only spelling of a value: sorted keys, no spaces, UTF-8 kept, no NaN (after RFC 8785)."""


def text_lines(text: str) -> list[str]:
    """Return the lines of a text.

    ``str.splitlines`` would also split at line and page separators inside values.
    """
    return text.removesuffix("\n").split("\n") if text else []


def digest(value: Any) -> str:
    """Return the SHA-256 (64 hex digits) of a JSON value's canonical spelling."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 (64 hex digits) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_MOST_EXPANSION = 100
"""A file may contain this many times its own size. JSON Lines that share a prompt of 4,000 characters reach 70."""
_LEAST_LIMIT = 64 << 20  # bytes that any compressed file may contain


def expansion_limit(size: int) -> int:
    """Return how many bytes a compressed file of this size may contain."""
    return max(_LEAST_LIMIT, _MOST_EXPANSION * size)


def refused(error: OSError) -> UserError | None:
    """Return the message if the operating system refused a change of files with this error, or None."""
    if error.errno not in _REFUSALS:
        return None
    what, fix = _REFUSALS[error.errno]
    if error.filename is None:
        return UserError(what.capitalize(), fix=fix)
    return UserError(what, where=str(error.filename), fix=fix)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a UserError where the operating system refuses to write below ``path``."""
    try:
        yield
    except Exception as error:
        number = _refusal(error, path)
        if number is None or isinstance(error, UserError):
            raise
        what, fix = _REFUSALS[number]
        missing = getattr(error, "filename", None) if number == errno.ENOENT else None
        raise UserError(f"{what}; existing files are unchanged", where=str(missing or path), fix=fix) from error


def _refusal(error: Exception, path: Path) -> int | None:
    """Return the error number of a failed write, even if a native writer has it only in its message."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return error.errno
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        if os.strerror(number) in str(error):  # safetensors: "I/O error: No space left on device (os error 28)"
            return number
    # torch.save and numpy's tofile give no reason, so a test write finds it.
    if re.search(r"inline_container\.cc|iostream error|^\d+ requested and \d+ written$", str(error)):
        return _probe(next(p for p in (path, *path.parents) if p.is_dir())) or errno.EIO
    return None


def _probe(folder: Path) -> int | None:
    """Return the error number of writing 16 MB to ``folder``, or None if that works."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(16):
                file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno if error.errno in _REFUSALS else None
    return None


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file atomically: temporary file next to it, fsync, rename; nobody else can read it before it is there."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(mode)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # report the first error
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a sorted, indented JSON document atomically."""
    write_text(path, json_document(value))


def json_document(value: Any) -> str:
    """Return the text that :func:`write_json` writes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def cache_folder(name: str) -> Path:
    """Return a folder of the user's cache, created if it is missing."""
    folder = platformdirs.user_cache_path("tunewright") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fix = "Set XDG_CACHE_HOME to a folder that can be written to."
        raise UserError(f"The cache cannot be written to: {error.strerror}", where=str(folder), fix=fix) from None
    return folder


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` at the end, unless an exception is raised."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            yield temporary
            os.fsync(handle)
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            os.close(handle)
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``path`` at the end if nothing was raised.

    An existing ``path`` is kept: these folders are named by content, so both writers made the same one.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync_file(file)
            temporary.chmod(0o755)
            if not path.exists():
                temporary.rename(path)
                _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def seal(folder: Path) -> None:
    """Mark a folder as complete: sync its files to disk, then write their digests atomically."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    for file in files:
        _sync_file(file)
    for inner in {file.parent for file in files}:
        _sync_folder(inner)
    write_json(folder / MANIFEST, {file.relative_to(folder).as_posix(): file_digest(file) for file in files})


def damage(folder: Path) -> list[str]:
    """Return a message for each file of a sealed folder that is missing or has changed."""
    path = folder / MANIFEST
    try:
        sealed: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        found = [(name, folder / name, sha256) for name, sha256 in sealed.items()]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, AttributeError, TypeError):
        return [f"{MANIFEST} cannot be read"]
    faults = []
    for name, file, sha256 in found:
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file_digest(file) != sha256:
            faults.append(f"{name} has changed")
    return faults


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_sync_folder = _sync_file
