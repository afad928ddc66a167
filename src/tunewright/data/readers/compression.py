"""Files compressed by gzip or Zstandard, read as the bytes that they contain."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tunewright.core.errors import UserError
from tunewright.core.progress import Task

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "Zstandard"}
"""First bytes to name."""

MOST_EXPANSION = 100
"""A file may contain this many times its own size. JSON Lines that share a prompt of 4,000 characters reach 70."""

LEAST_LIMIT = 64 << 20  # bytes that any file may contain
_BUFFER = 1 << 16
_DECOMPRESS = {"gzip": "gunzip -k", "Zstandard": "zstd -d"}


def expansion_limit(size: int) -> int:
    """Return how many bytes a compressed file of this size may contain."""
    return max(LEAST_LIMIT, MOST_EXPANSION * size)


def compression_of(path: Path) -> str | None:
    """Return the name of a file's compression, by its first bytes."""
    with path.open("rb") as file:
        return _compression(file.read(4))


def _compression(magic: bytes) -> str | None:
    return next((name for mark, name in COMPRESSIONS.items() if magic.startswith(mark)), None)


@contextmanager
def open_bytes(path: Path, task: Task | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed if it is compressed.

    Args:
        task: advanced by the bytes of the file itself.

    Raises:
        UserError: from reads: a truncated or damaged archive, or one that contains over ``expansion_limit`` bytes.
    """
    with path.open("rb", buffering=0 if task else -1) as file:
        raw: Any = io.BufferedReader(_Counting(file, task), _BUFFER) if task else file
        compression = _compression(raw.peek(4))
        yield raw if compression is None else _decompressed(raw, path, compression)


def _decompressed(file: BinaryIO, path: Path, compression: str) -> BinaryIO:
    raw: Any = _Decompressed(file, path, compression)
    return io.BufferedReader(raw, _BUFFER)


class _Counting(io.RawIOBase):
    """A file that reports the bytes read to a task."""

    def __init__(self, file: BinaryIO, task: Task) -> None:
        self.file, self.task = file, task

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        chunk = self.file.read(len(buffer))
        buffer[: len(chunk)] = chunk
        if chunk:
            self.task.advance(len(chunk))
        return len(chunk)


class _Decompressed(io.RawIOBase):
    """The content of a compressed file."""

    def __init__(self, file: BinaryIO, path: Path, compression: str) -> None:
        self.path, self.compression = path, compression
        self.left = expansion_limit(path.stat().st_size)
        if compression == "gzip":
            self.stream: Any = gzip.GzipFile(fileobj=file)
        else:
            import pyarrow as pa  # type: ignore[import-untyped]

            # The package zstandard ends a truncated stream without an error.
            self.stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        try:
            chunk = self.stream.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            fix = f"Get the file again, or see what `{_DECOMPRESS[self.compression]} {self.path}` reports."
            raise UserError(
                f"Truncated or damaged {self.compression} data: {error}", where=str(self.path), fix=fix
            ) from None
        self.left -= len(chunk)
        if self.left < 0:
            limit = expansion_limit(self.path.stat().st_size)
            raise UserError(
                f"The file contains over {limit:,} bytes, the limit for {self.compression} of its size",
                where=str(self.path),
                fix=f"If you trust it, decompress it first: {_DECOMPRESS[self.compression]} {self.path}",
            )
        buffer[: len(chunk)] = chunk
        return len(chunk)
