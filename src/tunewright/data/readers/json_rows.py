"""Rows in JSON: one object per line, one array, or consecutive objects over several lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tunewright.core.errors import UserError
from tunewright.core.strict_json import ConstantError, DuplicateKeyError, strict_decoder
from tunewright.data.readers.encodings import escaped
from tunewright.data.readers.mapping import Parent
from tunewright.data.readers.row_errors import JsonPath
from tunewright.data.readers.validate import RowError, parse_json_row, row_object, strict_fault


class RawRow(NamedTuple):
    """A row, or its error, with the line where it starts (its number if several start on one line)."""

    line: int
    row: dict[str, Any] | RowError
    above: JsonPath = ()
    """For a row inside a document: its path."""
    parent: Parent | None = None
    """For a row inside a document: the objects above it."""


_CHUNK = 1 << 16
LONGEST_ROW = 1 << 26  # characters: an unclosed quote must not read the rest of a large file into memory
_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = json.JSONDecoder()


def json_lines(text: TextIO) -> Iterator[RawRow]:
    """Yield the rows of JSON Lines, skipping blank lines; of a line that is too long, only a part is held."""
    number = 0
    while line := text.readline(LONGEST_ROW):
        number += 1
        if len(line) == LONGEST_ROW and line[-1] != "\n":
            while (rest := text.readline(LONGEST_ROW)) and rest[-1] != "\n":
                pass
            yield RawRow(number, RowError("E108", f"the row has over {LONGEST_ROW - 1:,} characters"))
        elif not line.isspace():
            try:
                yield RawRow(number, parse_json_row(line))
            except RowError as fault:
                yield RawRow(number, fault)


def json_array(text: TextIO, path: Path) -> Iterator[RawRow]:
    """Yield the items of an array, read one by one.

    Raises:
        UserError: invalid JSON, with file and line, since the end of the row is unknown.
    """
    cursor = _Cursor(text, path)
    cursor.peek()
    cursor.step()
    if cursor.peek() == "]":
        cursor.step()
    else:
        while True:
            cursor.peek()
            yield cursor.row()
            mark = cursor.peek()
            if mark not in (",", "]"):
                raise cursor.refusal("a comma or ] is missing" if mark else "the array does not end")
            cursor.step()
            if mark == "]":
                break
    if cursor.peek():
        raise cursor.refusal("text after the end of the array")


def json_objects(text: TextIO, path: Path) -> Iterator[RawRow]:
    """Yield consecutive objects, each over several lines.

    Raises:
        UserError: as for ``json_array``.
    """
    cursor = _Cursor(text, path)
    while cursor.peek():
        yield cursor.row()


def number_if_ambiguous(rows: Iterator[RawRow], path: Path, notes: list[str]) -> Iterator[RawRow]:
    """Yield the rows, with numbers (from 1) instead of lines if the first two start on one line.

    A place must be unique, and ``json.dump`` writes an array on one line.

    Args:
        notes: receives the note that places are numbers.
    """
    first = next(rows, None)
    if first is None:
        return
    try:
        second = next(rows, None)
    except UserError:
        yield first
        raise
    together = [first] if second is None else [first, second]
    if second is None or second.line != first.line:
        yield from together
        yield from rows
        return
    notes.append(numbers_note(path))
    for number, row in enumerate(chain(together, rows), start=1):
        yield row._replace(line=number)


def numbers_note(path: Path) -> str:
    """Return the note that places are row numbers."""
    return f"{path}: places are row numbers (FILE:NUMBER), not lines, because several rows start on one line"


class _Cursor:
    """A position in a text that is only partly in memory."""

    def __init__(self, text: TextIO, path: Path) -> None:
        self.text, self.path = text, path
        self.buffer = ""
        self.at = 0
        self.line = 1

    def peek(self) -> str:
        """Return the next character other than white space; "" at the end."""
        while True:
            match = _SPACE.match(self.buffer, self.at)
            assert match is not None
            self._move(match.end())
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._more():
                return ""

    def step(self) -> None:
        """Skip the character that ``peek`` returned."""
        self._move(self.at + 1)

    def row(self) -> RawRow:
        """Return the JSON value that begins here."""
        while True:
            start = self.line
            try:
                value, end = self._decode()
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - 16
                if not cut or not self._more():
                    self._move(min(error.pos, len(self.buffer)))
                    raise self.refusal(error.msg) from None
                continue
            except RecursionError:
                raise self.refusal("nested too deep") from None
            except ValueError as error:  # a whole number of more digits than Python reads
                raise self.refusal(str(error)) from None
            if end == len(self.buffer) and self._more():
                continue  # a number may continue
            foreign = escaped(self.buffer[self.at : end])
            if foreign is not None:
                line = start + self.buffer.count("\n", self.at, self.at + foreign)
                value = RowError("E101", f"not UTF-8: invalid byte in line {line}")
            self._move(end)
            return RawRow(start, value)

    def _decode(self) -> tuple[dict[str, Any] | RowError, int]:
        try:
            value, end = strict_decoder.raw_decode(self.buffer, self.at)
        except (DuplicateKeyError, ConstantError) as error:
            return strict_fault(error), _PLAIN.raw_decode(self.buffer, self.at)[1]
        try:
            return row_object(value), end
        except RowError as fault:
            return fault, end

    def _more(self) -> bool:
        held = len(self.buffer) - self.at
        if held > LONGEST_ROW:
            raise self.refusal(f"a row of more than {LONGEST_ROW:,} characters (for a document of rows, see data.rows)")
        # Double the buffer, so that a long row is not decoded again for each small piece of it.
        chunk = self.text.read(max(_CHUNK, held))
        self.buffer, self.at = self.buffer[self.at :] + chunk, 0
        return bool(chunk)

    def _move(self, to: int) -> None:
        self.line += self.buffer.count("\n", self.at, to)
        self.at = to

    def refusal(self, reason: str) -> UserError:
        """Return the error that the file cannot be read from here on."""
        return UserError(
            f"Unreadable JSON from here on: {reason}",
            where=f"{self.path}:{self.line}",
            fix="Correct it, or write one object per line, so that a fault affects one row only.",
        )
