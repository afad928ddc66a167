"""Which encoding a text file is in, told from its bytes; a file is read in one encoding or refused."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from tunewright.core.errors import UserError
from tunewright.core.progress import Task

_CHUNK = 1 << 20
_SAVE = "Save it as UTF-8: iconv -f ENCODING -t UTF-8 FILE > NEW."
_BOMS = (  # UTF-32's before UTF-16's, which it begins with
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)
_ESCAPED = re.compile("[\udc80-\udcff]")
_BEYOND_ASCII = re.compile("[\x80-\ud7ff\ue000-\U0010ffff]")


@dataclass(frozen=True)
class Encoding:
    """How a file's bytes become text."""

    codec: str
    name: str
    mark: bool = False
    """The file begins with a byte-order mark."""
    first_line: int = 0
    """For cp1252: the first line that is not UTF-8."""
    excerpt: str = ""
    """That line, as it is read."""


def find_encoding(path: Path) -> Encoding:
    """Return the encoding of a whole text file.

    A byte-order mark decides. Without one it is UTF-8, if all bytes are; else cp1252, of which latin-1's text is a
    part, if fewer than one in a hundred of the sequences beyond ASCII are UTF-8's. What stands between is a UTF-8 file
    with foreign bytes in it: its codec is utf-8, and those rows are faults.

    Raises:
        UserError: UTF-16 or UTF-32 that breaks off, or bytes of no encoding that is read here, with file and line.
    """
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(0)
        for mark, codec, name in _BOMS:
            if head.startswith(mark):
                if codec != "utf-8-sig" and not _is_all(file, codec):
                    line = _first_bad_line(path, codec)
                    raise UserError(f"not {name}, as its byte-order mark says", where=f"{path}:{line}", fix=_SAVE)
                return Encoding(codec, name, mark=True)
        if head.count(0) * 3 > len(head):
            raise UserError("UTF-16 without a byte-order mark, or no text", where=str(path), fix=_SAVE)
        if _is_all(file, "utf-8"):
            return Encoding("utf-8", "UTF-8")
    return _eight_bit(path)


def _is_all(file: BinaryIO, codec: str) -> bool:
    decoder = codecs.getincrementaldecoder(codec)()
    try:
        while chunk := file.read(_CHUNK):
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _first_bad_line(path: Path, codec: str) -> int:
    decoder = codecs.getincrementaldecoder(codec)("replace")
    line = 1
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            before, found, _ = decoder.decode(chunk).partition("\ufffd")
            line += before.count("\n")
            if found:
                break
    return line


def _eight_bit(path: Path) -> Encoding:
    foreign = utf8 = first = undefined = 0
    excerpt = ""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isascii():
                continue
            text = line.decode(errors="surrogateescape")
            utf8 += len(_BEYOND_ASCII.findall(text))
            here = len(_ESCAPED.findall(text))
            foreign += here
            if here and not first:
                first, excerpt = number, line.decode("cp1252", errors="replace")
            if not undefined and not _is_cp1252(line):
                undefined = number
    if utf8 * 100 > foreign:
        return Encoding("utf-8", "UTF-8")
    if undefined:
        raise UserError("neither UTF-8 nor cp1252 (Windows, Western European)", where=f"{path}:{undefined}", fix=_SAVE)
    return Encoding("cp1252", "cp1252", first_line=first, excerpt=_around_foreign(excerpt))


def _is_cp1252(line: bytes) -> bool:
    try:
        line.decode("cp1252")
    except UnicodeDecodeError:
        return False
    return True


def _around_foreign(text: str) -> str:
    found = _BEYOND_ASCII.search(text)
    assert found is not None
    return text[max(0, found.start() - 20) : found.start() + 20].strip()


def note_on(path: Path, encoding: Encoding) -> str | None:
    """Return what the user is told of an encoding that nothing in the file declares."""
    if encoding.codec != "cp1252":
        return None
    return (
        f"{path}: read as cp1252 (Windows, Western European; latin-1's text is a part of it), since line "
        f'{encoding.first_line} is not UTF-8. It reads "{encoding.excerpt}": if that is wrong, save the file as UTF-8.'
    )


def escaped(text: str) -> int | None:
    """Where the first byte stands that is not UTF-8, in text read by ``open_text``."""
    if text.isascii():
        return None
    found = _ESCAPED.search(text)
    return found.start() if found else None


def foreign_places(text: str) -> list[int]:
    """Where all the bytes stand that are not UTF-8, in text read by ``open_text``."""
    return [] if text.isascii() else [found.start() for found in _ESCAPED.finditer(text)]


class _Counting(io.RawIOBase):
    """A file that tells a task how many bytes of it were read."""

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


@contextmanager
def open_text(path: Path, encoding: Encoding, task: Task | None = None) -> Iterator[TextIO]:
    """The text of a file; lines end at ``\\n`` only, and foreign bytes in UTF-8 become lone surrogates."""
    errors = "surrogateescape" if encoding.codec.startswith("utf-8") else "strict"
    with path.open("rb", buffering=0 if task else -1) as file:
        counted: Any = _Counting(file, task) if task else None
        raw: Any = io.BufferedReader(counted, 1 << 16) if task else file
        yield io.TextIOWrapper(raw, encoding=encoding.codec, errors=errors, newline="\n")
