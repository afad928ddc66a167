"""Rows in CSV with one of the common delimiters."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.readers.encodings import escaped
from tunewright.data.readers.json_rows import LONGEST_ROW, RawRow
from tunewright.data.readers.mapping import pair_mapping
from tunewright.data.readers.tables import columns
from tunewright.data.readers.validate import RowError

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_CSV_FIELD_LIMIT = 2**31 - 1  # Python's default limit of 131,072 characters would apply before data.max_characters
_SNIFFED = 50  # rows that decide the delimiter


def delimiter_of(head: str, data: DataConfig) -> str:
    """Return the delimiter that gives the config's columns, else the most regular table, in the first lines."""
    mapping = pair_mapping(data)
    best, best_score = ",", (False, 0.0, 0)
    for delimiter in DELIMITERS:
        rows = _parsed(head, delimiter)
        if not rows or len(rows[0]) < 2:
            continue
        header = rows[0]
        named = mapping is not None and mapping.keys <= set(header)
        alike = sum(len(row) == len(header) for row in rows) / len(rows)
        score = (named, alike, len(header))
        if score > best_score:
            best, best_score = delimiter, score
    return best


def _parsed(head: str, delimiter: str) -> list[list[str]]:
    rows: list[list[str]] = []
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    try:
        for row in csv.reader(io.StringIO(head, newline="\n"), delimiter=delimiter, strict=True):
            if row:
                rows.append(row)
            if len(rows) > _SNIFFED:
                break
    except csv.Error:  # reported with its line when the file is read
        pass
    return rows


def csv_rows(text: TextIO, path: Path, delimiter: str, data: DataConfig, notes: list[str]) -> Iterator[RawRow]:
    """Yield the rows below the header; line breaks in quotes belong to the field, and blank lines are skipped.

    Raises:
        UserError: the errors of ``columns``, or unbalanced quotes, with file and line.
    """
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    lines = _BoundedLines(text)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    places: dict[str, int] = {}
    used: list[str] = []
    start = 1
    try:
        for fields in reader:
            lines.taken = 0
            if header is None and fields:
                header = fields
                if any(escaped(name) is not None for name in header):
                    raise UserError("Not UTF-8", where=f"{path}:{start}", fix="Save the file as UTF-8.")
                used, others = columns(header, f"{path}:{start}", data, notes, nested=False)
                places = {name: header.index(name) for name in (*used, *others)}
            elif header is not None and fields:
                yield RawRow(start, _csv_row(fields, len(header), places, used))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"Unreadable CSV from here on: {error}",
            where=f"{path}:{start}",
            fix='Quote text with a delimiter, a quote or a line break, and double quotes in it: "".',
        ) from None


class _BoundedLines:
    """The lines of a text, as long as those of one row are not too long together."""

    def __init__(self, text: TextIO) -> None:
        self.text = text
        self.taken = 0

    def __iter__(self) -> _BoundedLines:
        return self

    def __next__(self) -> str:
        line = self.text.readline(LONGEST_ROW - self.taken)
        self.taken += len(line)
        if self.taken == LONGEST_ROW and not line.endswith("\n"):
            raise csv.Error(f"a row of over {LONGEST_ROW - 1:,} characters")
        if not line:
            raise StopIteration
        return line


def _csv_row(fields: list[str], width: int, places: dict[str, int], used: Sequence[str]) -> dict[str, Any] | RowError:
    if len(fields) != width:
        return RowError("E107", f"{len(fields)} fields (the header has {width})")
    row = {name: fields[at] for name, at in places.items()}
    for name in used:
        if escaped(row[name]) is not None:
            return RowError("E101", "not UTF-8", (name,))
    return row
