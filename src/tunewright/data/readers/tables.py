"""Rows in tables: the choice of columns, and CSV with one of the common delimiters."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.text import first_of
from tunewright.data.readers.encodings import escaped
from tunewright.data.readers.json_rows import LONGEST_ROW, RawRow
from tunewright.data.readers.mapping import pair_mapping
from tunewright.data.readers.row_errors import RowError, RowsElsewhereError
from tunewright.data.readers.schemas import nearest_known_key

# Known sets of columns: required and optional ones.
_KNOWN_COLUMNS = (
    (("preferred_output", "non_preferred_output"), ("input",)),
    (("prompt", "chosen", "rejected"), ("system", "tools")),
    (("chosen", "rejected"), ("tools",)),
    (("messages",), ("system", "system_prompt", "only_last", "tools")),
    (("interactions",), ("system", "system_prompt", "only_last", "tools")),
    (("conversation",), ()),
    (("conversations",), ("system", "tools")),
    (("prompt", "completion"), ()),
    (("instruction", "output"), ("input", "system", "history")),
)
_TEXT_COLUMNS = (("prompt", "completion"), ("instruction", "output"), ("prompt", "chosen", "rejected"))


class ColumnsError(UserError):
    """A table without the columns of a pair: what to ``do`` about it, and the columns that it has."""

    def __init__(self, what: str, *, where: str | None, do: str, columns: str) -> None:
        self.do = do
        super().__init__(what, where=where, fix=f"{do}Columns: {columns}")


def header_columns(
    header: Sequence[str],
    later: Iterable[tuple[int, Sequence[str]]],
    where: str,
    data: DataConfig,
    notes: list[str],
    first: int = 1,
) -> tuple[list[str], list[str]]:
    """Return ``columns`` of a sheet; if that fails, the error names the one of the ``later`` rows that has the names.

    ``first`` is the number of the first column.
    """
    number = int(where.rpartition(":")[2])
    if data.header_row not in (None, number):
        raise UserError(f"Row {data.header_row} has no values", where=_HEADER_ROW, fix=f"The next row is {number}.")
    if data.header_row and number > 1:
        notes.append(f"{where.rpartition(':')[0]}: rows above data.header_row are not read: {number - 1:,}")
    try:
        return columns(header, where, data, notes, nested=False, first=first)
    except UserError as error:
        below = list(islice(later, _TITLES))
        if not below:
            raise UserError("The file has no rows below its header", where=where) from None
        for number, names in below:
            try:
                columns(names, f"{where.rpartition(':')[0]}:{number}", data, [], nested=False)
            except UserError:
                continue
            what = "this name" if pair_mapping(data) else "known names"
            what = f"{error.what}, but line {number} has {what}"
            raise RowsElsewhereError(what, where=where, fix=_as_header(number)) from None
        number, names = max(below, key=lambda row: sum(map(bool, row[1])))
        if pair_mapping(data) or sum(map(bool, names)) <= sum(map(bool, header)):
            raise
        otherwise = error.fix or ""
        shown = first_of(quoted_name(name[:_LONGEST_NAME]) for name in names)  # it may be a row of long texts
        fix = f"{_as_header(number)} Then use --input and --output with its names: {shown}. "
        fix += f"Otherwise, {otherwise[:1].lower()}{otherwise[1:]}"
        raise RowsElsewhereError(error.what, where=where, fix=fix) from None


def quoted_name(name: str) -> str:
    """Return a column's name, in quotes if blanks begin or end it."""
    return name if name == name.strip() else f'"{name}"'


def _as_header(number: int) -> str:
    return f"If line {number} is the header, set data.header_row: {number} (--header-row {number})."


def columns(
    header: Sequence[str], where: str, data: DataConfig, notes: list[str], *, nested: bool, first: int = 1
) -> tuple[list[str], list[str]]:
    """Return the columns used for input, output and groups, and the other columns to keep as metadata."""
    there = ", ".join(map(quoted_name, filter(None, header)))
    mapping = pair_mapping(data)
    if mapping is not None:
        names = mapping.columns(header)
    else:
        fits = (
            [*needed, *(name for name in also if name in header and (nested or name != "history"))]
            for needed, also in _KNOWN_COLUMNS
            if set(needed) <= set(header) and (nested or needed in _TEXT_COLUMNS)
        )
        known = None if data.input or data.output else next(fits, None)
        if known is None:
            absent = {name for needed, _ in _KNOWN_COLUMNS for name in needed} - set(header)
            near = [(name, nearest_known_key(name, absent)) for name in header]
            meant = ", ".join(f'"{name}", did you mean "{like}"?' for name, like in near if like)
            do = "Correct the header, or use" if meant else "Use"
            raise ColumnsError(
                f"Unknown column {meant}" if meant else "Unknown columns for the input and the ideal output",
                where=where,
                do=f"{do} --input COLUMN --output COLUMN, or set data.input and data.output. ",
                columns=there,
            )
        names = known
    # A file with a split of its own may lack the column.
    split = [name for name in (data.split_column,) if name in header]
    names += [name for name in (*data.group_by, *split) if name is not None and name not in names]
    counts, given = Counter(header), set(names)
    for name in names:
        if counts[name] != 1:
            raise _wrong_count(name, header, where, data, None if nested else first, there)
    others = [name for name in header if name not in given and name not in data.drop_columns]
    # A CSV cell cannot contain a list of turns, and columns with duplicate or empty names are ambiguous.
    kept = [name for name in others if name and counts[name] == 1 and (nested or name != "history")]
    stored = set(kept)
    unused = list(dict.fromkeys(name or "(without a name)" for name in others if name not in stored))
    if unused:
        notes.append(f"{where.rsplit(':', 1)[0]}: unused columns: {', '.join(unused)}")
    ignored = [name for name in header if name in data.drop_columns]
    if ignored:
        notes.append(f"{where.rsplit(':', 1)[0]}: dropped by data.drop_columns: {', '.join(ignored)}")
    return names, kept


def _wrong_count(
    name: str, header: Sequence[str], where: str, data: DataConfig, first: int | None, there: str
) -> UserError:
    """Return the error for a column that is absent or repeated; ``first`` is the number of a sheet's first column."""
    why = " (data.group_by)" if name in data.group_by else ""
    if name in header:
        at = [number for number, each in enumerate(header, start=first or 1) if each == name]
        places = [f"column {number}" for number in at]
        if first is not None:
            from openpyxl.utils import get_column_letter  # type: ignore[import-untyped]

            places = [f"{get_column_letter(number)}{where.rpartition(':')[2]}" for number in at]
        what = f'More than one column named "{name}"{why}: {" and ".join(places)}'
        return UserError(what, where=where, fix="Rename one of them.")
    plain = {" ".join(each.split()).casefold(): each for each in header}
    near = difflib.get_close_matches(" ".join(name.split()).casefold(), plain, n=1, cutoff=_NEAR)
    meant = f', did you mean "{plain[near[0]]}"?' if near else ""
    return ColumnsError(f'No column named "{name}"{why}{meant}', where=where, do="", columns=there)


DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_CSV_FIELD_LIMIT = 2**31 - 1  # Python's default limit of 131,072 characters would apply before data.max_characters
_SNIFFED = 50  # rows that decide the delimiter
_SEPARATOR = re.compile(r'"?sep=([^"\r\n])"?\r?', re.IGNORECASE)
_HEADER_ROW = "data.header_row (--header-row)"
_TITLES = 30  # rows that are searched for the header if the first row is not it
_NEAR = 0.8  # of 1, as for keys of rows
_LONGEST_NAME = 40  # characters of a name in a message


def separator_line(head: str) -> str | None:
    """Return the delimiter that a first line such as ``sep=;`` sets, which Excel writes and reads."""
    match = _SEPARATOR.fullmatch(head.partition("\n")[0])
    return match[1] if match else None


def delimiter_of(head: str, data: DataConfig) -> str:
    """Return the delimiter that gives the config's columns, else the most regular table, in the first lines."""
    mapping = pair_mapping(data)
    best, best_score = ",", (False, False, 0.0, 0)
    if data.header_row:
        head = head.split("\n", data.header_row - 1)[-1]
    for delimiter in DELIMITERS:
        rows = _parse_head(head, delimiter)
        if not rows:
            continue
        # Titles above the header have another number of fields.
        usual = Counter(map(len, rows)).most_common(1)[0][0]
        at = 0 if len(rows[0]) > 1 else next(n for n, row in enumerate(rows) if len(row) == usual)
        named = [n for n, row in enumerate(rows) if mapping is not None and mapping.keys <= set(row)]
        header, rows = rows[(named or [at])[0]], rows[(named or [at])[0] :]
        alike = sum(len(row) == len(header) for row in rows) / len(rows)
        score = (bool(named), at == 0, alike, len(header))
        if len(header) > 1 and score > best_score:
            best, best_score = delimiter, score
    return best


def _parse_head(head: str, delimiter: str) -> list[list[str]]:
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


def csv_rows(
    text: TextIO, path: Path, delimiter: str, above: int, data: DataConfig, notes: list[str]
) -> Iterator[RawRow]:
    """Yield the rows below the header, which has ``above`` lines above it."""
    for _ in range(above):
        text.readline(LONGEST_ROW)
    rows = _csv_records(text, path, delimiter, above, notes)
    for line, header in islice(rows, 1):
        if any(escaped(name) is not None for name in header):
            raise UserError("Not UTF-8", where=f"{path}:{line}", fix="Save the file as UTF-8.")
        used, others = header_columns(header, rows, f"{path}:{line}", data, notes)
        # In the file's order, which its corrected copy keeps.
        places = {name: header.index(name) for name in sorted((*used, *others), key=header.index)}
        for start, fields in rows:
            yield RawRow(start, _csv_row(fields, len(header), places, used))


def _csv_records(
    text: TextIO, path: Path, delimiter: str, above: int, notes: list[str]
) -> Iterator[tuple[int, list[str]]]:
    """Yield each row with a value, and the line where it starts; line breaks in quotes belong to the field."""
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    lines = _BoundedLines(text)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start = above + 1
    empty = 0
    try:
        for fields in reader:
            lines.taken = 0
            if any(fields):
                yield start, fields
            else:
                empty += bool(fields)
            start = above + reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"Unreadable CSV from here on: {error}",
            where=f"{path}:{start}",
            fix='Quote text with a delimiter, a quote or a line break, and double quotes in it: "".',
        ) from None
    if empty:
        notes.append(f"{path}: rows without a value skipped: {empty:,}")


class _BoundedLines:
    """The lines of a text, while the lines of one row are not too long together."""

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


def source_size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
