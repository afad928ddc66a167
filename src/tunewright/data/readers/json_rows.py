"""Rows in JSON: one object per line, one array, or objects one after another over several lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tunewright.core.errors import UserError
from tunewright.data.readers.encodings import escaped
from tunewright.data.readers.parents import Parent
from tunewright.data.readers.row_errors import JsonPath
from tunewright.data.readers.validate import RowError, json_decoder, parse_json_row, row_object


class RawRow(NamedTuple):
    """The line that a row starts at (its number where several start on one line), and the row or why it is none."""

    line: int
    row: dict[str, Any] | RowError
    above: JsonPath = ()
    """In a document that holds rows, the keys and indices that lead to this one."""
    parent: Parent | None = None
    """In a document that holds rows, the objects above this one."""


_CHUNK = 1 << 16
_LONGEST = 1 << 26  # characters: a quote that is never closed must not read the rest of a large file into memory
_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = json.JSONDecoder()


def json_lines(text: TextIO) -> Iterator[RawRow]:
    """JSON Lines; blank lines are no rows."""
    for number, line in enumerate(text, start=1):
        if line.isspace():
            continue
        try:
            yield RawRow(number, parse_json_row(line))
        except RowError as fault:
            yield RawRow(number, fault)


def json_array(text: TextIO, path: Path) -> Iterator[RawRow]:
    """The items of one array, read one by one.

    Raises:
        UserError: what is not JSON, by file and line: where its row ends cannot be known.
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
    """Objects one after another, each over several lines.

    Raises:
        UserError: as for ``json_array``.
    """
    cursor = _Cursor(text, path)
    while cursor.peek():
        yield cursor.row()


def told_apart(rows: Iterator[RawRow], path: Path, notes: list[str]) -> Iterator[RawRow]:
    """The rows, with their numbers (from 1) in place of their lines if the second starts on the line of the first.

    A place has to name one row: ``json.dump`` writes all of an array on one line.

    Args:
        notes: gets that places are numbers.
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
    """Return the note that places in a file are the numbers of its rows."""
    return f"{path}: places are row numbers (FILE:NUMBER), not lines, because several rows start on one line"


class _Cursor:
    """A place in a text of which only a part is in memory."""

    def __init__(self, text: TextIO, path: Path) -> None:
        self.text, self.path = text, path
        self.buffer = ""
        self.at = 0
        self.line = 1

    def peek(self) -> str:
        """Return the next character that is no white space, "" at the end."""
        while True:
            match = _SPACE.match(self.buffer, self.at)
            assert match is not None
            self._move(match.end())
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._more():
                return ""

    def step(self) -> None:
        """Pass the character that ``peek`` showed."""
        self._move(self.at + 1)

    def row(self) -> RawRow:
        """Return the JSON value that begins here."""
        while True:
            start = self.line
            try:
                value, end = self._decode()
            except json.JSONDecodeError as error:
                if not self._is_cut(error) or not self._more():
                    self._move(min(error.pos, len(self.buffer)))
                    raise self.refusal(error.msg) from None
                continue
            except RecursionError:
                raise self.refusal("nested too deep") from None
            except ValueError as error:  # a whole number of more digits than Python reads
                raise self.refusal(str(error)) from None
            if end == len(self.buffer) and self._more():
                continue  # a number may go on
            foreign = escaped(self.buffer[self.at : end])
            if foreign is not None:
                line = start + self.buffer.count("\n", self.at, self.at + foreign)
                value = RowError("E101", f"not UTF-8: a foreign byte in line {line}")
            self._move(end)
            return RawRow(start, value)

    def _decode(self) -> tuple[dict[str, Any] | RowError, int]:
        try:
            value, end = json_decoder.raw_decode(self.buffer, self.at)
            return row_object(value), end
        except RowError as fault:
            return fault, _PLAIN.raw_decode(self.buffer, self.at)[1]

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Return whether the error may come from the end of the part in memory, and not from the file."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - 16

    def _more(self) -> bool:
        held = len(self.buffer) - self.at
        if held > _LONGEST:
            raise self.refusal(
                f"a row of more than {_LONGEST:,} characters; if it is a document of rows, see data.rows"
            )
        # Twice what is held, so that a long row is not decoded anew for each small piece of it.
        chunk = self.text.read(max(_CHUNK, held))
        self.buffer, self.at = self.buffer[self.at :] + chunk, 0
        return bool(chunk)

    def _move(self, to: int) -> None:
        self.line += self.buffer.count("\n", self.at, to)
        self.at = to

    def refusal(self, reason: str) -> UserError:
        """Return the file cannot be read from here on."""
        return UserError(
            f"not JSON that can be read from here on: {reason}",
            where=f"{self.path}:{self.line}",
            fix="Mend it there, or write one object per line: then a fault costs one row, not the rest of the file.",
        )
