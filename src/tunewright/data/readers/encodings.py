"""Text of files: decompressed, and decoded by the one encoding that the bytes show."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from tunewright.core.errors import UserError
from tunewright.core.io import expansion_limit
from tunewright.core.progress import Task

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "Zstandard"}
"""First bytes to name."""

_BUFFER = 1 << 16
_DECOMPRESS = {"gzip": "gunzip -k", "Zstandard": "zstd -d"}


def compression_of(magic: bytes) -> str | None:
    """Return the name of a file's compression, by its first bytes."""
    return next((name for mark, name in COMPRESSIONS.items() if magic.startswith(mark)), None)


@contextmanager
def open_bytes(path: Path, task: Task | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed if it is compressed; the task is advanced by the bytes of the file itself.

    Reading a damaged archive, or over ``expansion_limit`` bytes of one, raises a UserError.
    """
    with path.open("rb", buffering=0 if task else -1) as file:
        raw: Any = io.BufferedReader(_Counting(file, task), _BUFFER) if task else file
        compression = compression_of(raw.peek(4))
        content: Any = raw if compression is None else _Decompressed(raw, path, compression)
        yield content if compression is None else io.BufferedReader(content, _BUFFER)


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


_CHUNK = 1 << 20
_SAVE = "Save it as UTF-8: iconv -f ENCODING -t UTF-8 FILE > NEW."
_BOMS = (  # UTF-32's first, since it begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)
_NOT_CP1252 = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
_ESCAPED = re.compile("[\udc80-\udcff]")
_BEYOND_ASCII = re.compile("[\x80-\ud7ff\ue000-\U0010ffff]")


@dataclass(frozen=True)
class Encoding:
    """The encoding of a file."""

    codec: str
    name: str
    mark: bool = False
    """True if the file begins with a byte-order mark."""
    first_line: int = 0
    """For cp1252: the first line that is not UTF-8."""
    excerpt: str = ""
    """Part of that line as decoded."""


def find_encoding(path: Path) -> Encoding:
    """Return the encoding of a text file.

    A byte-order mark decides. Without one, the encoding is UTF-8 if all bytes are valid. It is cp1252, which includes
    the text of latin-1, if fewer than 1% of the sequences beyond ASCII are valid UTF-8. Otherwise the file is UTF-8
    with invalid bytes, and rows with them are faults.
    """
    with open_bytes(path) as file:
        head = file.read(4096)
        for mark, codec, name in _BOMS:
            if head.startswith(mark):
                if codec != "utf-8-sig" and not _is_all(head, file, codec):
                    raise UserError(f"Invalid {name} despite its byte-order mark", where=str(path), fix=_SAVE)
                return Encoding(codec, name, mark=True)
        # UTF-16 of Latin text has a NUL in every second byte, and text in UTF-8 has none.
        if head.count(0) * 3 > len(head):
            raise UserError("UTF-16 without a byte-order mark, or not text", where=str(path), fix=_SAVE)
        if _is_all(head, file, "utf-8"):
            return Encoding("utf-8", "UTF-8")
    return _eight_bit(path)


def _is_all(head: bytes, file: BinaryIO, codec: str) -> bool:
    decoder = codecs.getincrementaldecoder(codec)()
    try:
        decoder.decode(head)
        while chunk := file.read(_CHUNK):
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _eight_bit(path: Path) -> Encoding:
    foreign = utf8 = first = undefined = 0
    excerpt = ""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isascii():
                continue
            text = line.decode(errors="surrogateescape")
            utf8 += len(_BEYOND_ASCII.findall(text))
            here = len(_ESCAPED.findall(text))
            foreign += here
            if here and not first:
                first, excerpt = number, line.decode("cp1252", errors="replace")
            if not undefined and _NOT_CP1252.search(line):
                undefined = number
    # In cp1252 a sequence that is valid UTF-8 by chance is rare; in UTF-8 with a damaged byte nearly all are valid.
    if utf8 * 100 > foreign:
        return Encoding("utf-8", "UTF-8")
    if undefined:
        raise UserError("Neither UTF-8 nor cp1252 (Windows, Western European)", where=f"{path}:{undefined}", fix=_SAVE)
    found = _BEYOND_ASCII.search(excerpt)
    assert found is not None
    around = excerpt[max(0, found.start() - 20) : found.start() + 20].strip()
    return Encoding("cp1252", "cp1252", first_line=first, excerpt=around)


def escaped(text: str) -> int | None:
    """Return the position of the first byte that is not UTF-8, in text from ``open_text``."""
    if text.isascii():
        return None
    found = _ESCAPED.search(text)
    return found.start() if found else None


def invalid_byte_positions(text: str) -> list[int]:
    """Return the positions of all bytes that are not UTF-8, in text from ``open_text``."""
    return [] if text.isascii() else [found.start() for found in _ESCAPED.finditer(text)]


@contextmanager
def open_text(path: Path, encoding: Encoding, task: Task | None = None) -> Iterator[TextIO]:
    """Open a file as text; lines end at ``\\n`` only, and invalid bytes in UTF-8 become lone surrogates."""
    errors = "surrogateescape" if encoding.codec.startswith("utf-8") else "strict"
    with open_bytes(path, task) as file:
        yield io.TextIOWrapper(file, encoding=encoding.codec, errors=errors, newline="\n")
