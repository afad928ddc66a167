"""Rows in an .xlsx workbook: one sheet, read as a table of texts."""

from __future__ import annotations

import datetime
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from openpyxl.reader.excel import ExcelReader  # type: ignore[import-untyped]
from openpyxl.styles.numbers import BUILTIN_FORMATS  # type: ignore[import-untyped]
from openpyxl.styles.stylesheet import apply_stylesheet  # type: ignore[import-untyped]
from openpyxl.utils import get_column_letter, range_boundaries  # type: ignore[import-untyped]
from openpyxl.worksheet._reader import (  # type: ignore[import-untyped]
    FORMULA_TAG,
    ROW_TAG,
    SHEET_MAIN_NS,
    VALUE_TAG,
    WorkSheetParser,
    iterparse,
)

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.io import expansion_limit
from tunewright.core.progress import Task
from tunewright.core.text import first_of
from tunewright.data.readers.json_rows import RawRow
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.tables import header_columns

_MERGED_TAG = f"{{{SHEET_MAIN_NS}}}mergeCell"
_MOST_ROWS, _MOST_COLUMNS = 1_048_576, 16_384  # Excel's own limits
_MOST_TEXT = 32_767  # characters that Excel keeps of a cell
_PART_BYTES = 128 << 20  # limit of a part that openpyxl holds in memory, such as the shared texts
_ROW_BYTES = 64 << 20  # limit of the XML that is in memory at one time
_ESCAPED = re.compile(r"_x00(09|0[Aa]|0[Dd])_")  # how XML keeps a tab, line feed or carriage return
_PLAIN_FORMATS = ("General", "@", "0")
_AS_CSV = "Save the sheet as CSV in UTF-8, and name that file."
_MOST_NAMED = 3


def open_workbook(path: Path, data: DataConfig, notes: list[str], task: Task | None) -> tuple[str, Iterator[RawRow]]:
    """Return the title and the rows of the sheet to read: data.sheet, or the only visible one that is not empty.

    Cells are texts, as in CSV: numbers as they are stored, dates in ISO 8601, TRUE and FALSE. The first
    row with a value is the header, and empty rows are skipped. Rows have their number in the sheet. A
    damaged workbook, a workbook that expands too much, and merged cells below the header are UserErrors.
    """
    with _reading(path), path.open("rb") as file:
        workbook = _Workbook(path, file)
        title = _choose_sheet(workbook, path, data.sheet)
    others = [name for name in workbook.parts if name != title]
    if others:
        notes.append(f"{path}: sheets not read: {', '.join(others)}")
    return title, _rows(path, title, data, notes, task)


def visible_sheets(path: Path) -> tuple[str, ...]:
    """Return the titles of a workbook's visible sheets."""
    with _reading(path), path.open("rb") as file:
        workbook = _Workbook(path, file)
        return tuple(title for title in workbook.parts if title not in workbook.hidden)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert the errors of openpyxl, zipfile and XML parsers into UserErrors."""
    try:
        yield
    except UserError:
        raise
    # openpyxl assumes valid files; a ParseError is a SyntaxError, and zipfile raises RuntimeError for a password.
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        OSError,
        EOFError,
        SyntaxError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"Unreadable as an .xlsx workbook: {reason}", where=str(path), fix=_AS_CSV) from error


class _Archive(zipfile.ZipFile):
    """The parts of a workbook, of which only sheets may be large: all other parts are held in memory."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self.path = path
        self.sheets: set[str] = set()

    def open(self, name: Any, *args: Any, **kwargs: Any) -> Any:
        """Open a part, unless it is too large."""
        size = self.getinfo(str(name)).file_size
        limit = expansion_limit(self.path.stat().st_size)
        if name not in self.sheets:
            limit = min(limit, _PART_BYTES)
        if size > limit:
            what = f"{name} in the workbook has {size:,} bytes (limit for a file of this size: {limit:,})"
            raise UserError(what, where=str(self.path), fix=_AS_CSV)
        return super().open(name, *args, **kwargs)


class _Workbook:
    """A workbook's shared texts and formats, and the part of each worksheet by its title."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        reader = ExcelReader(file, read_only=True, data_only=True, keep_links=False)
        reader.archive = self.archive = _Archive(file, path)
        reader.read_manifest()
        reader.read_strings()
        reader.read_workbook()
        apply_stylesheet(reader.archive, reader.wb)
        self.book, self.strings = reader.wb, reader.shared_strings
        self.parts: dict[str, str] = {}
        self.hidden: set[str] = set()
        for sheet, relation in reader.parser.find_sheets():
            if relation.Type.endswith("/worksheet") and relation.target in reader.valid_files:
                self.parts[sheet.name] = relation.target
                if sheet.state != "visible":
                    self.hidden.add(sheet.name)
        self.archive.sheets = set(self.parts.values())

    def parser(self, title: str) -> _SheetParser:
        """Return a parser of the sheet."""
        part = self.parts[title]
        source = _SheetBytes(self.archive.open(part), f"{self.path}:{title}")
        return _SheetParser(
            source,
            self.strings,
            data_only=True,
            epoch=self.book.epoch,
            date_formats=self.book._date_formats,
            timedelta_formats=self.book._timedelta_formats,
        )

    def format(self, style: int) -> str:
        """Return the number format of a style, such as ``0%``."""
        number = self.book._cell_styles[style].numFmtId
        custom = number - 164  # formats below are Excel's own
        return str(self.book._number_formats[custom] if custom >= 0 else BUILTIN_FORMATS.get(number, "General"))


class _SheetBytes:
    """A sheet's XML, as long as no row is too long."""

    def __init__(self, stream: Any, where: str) -> None:
        self.stream, self.where = stream, where
        self.read_bytes = self.since_row = 0

    def read(self, size: int) -> bytes:
        """Read some bytes of the part."""
        chunk: bytes = self.stream.read(size)
        self.read_bytes += len(chunk)
        self.since_row += len(chunk)
        if self.since_row > _ROW_BYTES:
            raise UserError(f"A row of over {_ROW_BYTES:,} bytes", where=self.where, fix=_AS_CSV)
        return chunk


class _SheetParser(WorkSheetParser):  # type: ignore[misc]
    """Rows and merged cells of a sheet; its other parts, some of which openpyxl refuses, are ignored."""

    source: _SheetBytes
    merged: list[str]

    def parse(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield each row with a value: its number, and its cells."""
        self.merged = []
        before = 0
        for _, element in iterparse(self.source):
            if element.tag == ROW_TAG:
                if len(element) > _MOST_COLUMNS:
                    raise ValueError(f"a row of over {_MOST_COLUMNS:,} cells")
                number, cells = self.parse_row(element)
                if not before < number <= _MOST_ROWS:
                    raise ValueError(f"row {number} after row {before}")
                before = number
                self.source.since_row = 0
                element.clear()
                if filled := [cell for cell in cells if cell["value"] not in (None, "") or cell["data_type"] == "f"]:
                    yield number, filled
            elif element.tag == _MERGED_TAG:
                self.merged.append(element.get("ref", ""))

    def parse_cell(self, element: Any) -> dict[str, Any]:
        """Return a cell; of the type ``f`` if it is a formula without a stored value."""
        cell: dict[str, Any] = super().parse_cell(element)
        # A stored result that is an empty text has the type "str".
        if element.find(FORMULA_TAG) is not None and not element.findtext(VALUE_TAG) and element.get("t") != "str":
            cell["data_type"] = "f"
        return cell


def _choose_sheet(workbook: _Workbook, path: Path, wanted: str | None) -> str:
    titles = ", ".join(workbook.parts)
    if wanted is not None:
        if wanted not in workbook.parts:
            raise UserError(f"No sheet named {wanted!r} (data.sheet)", where=str(path), fix=f"Sheets: {titles}.")
        return wanted
    filled = [
        title
        for title in workbook.parts
        if title not in workbook.hidden and next(workbook.parser(title).parse(), None) is not None
    ]
    if not filled:
        raise UserError("No visible sheet of the workbook has rows", where=str(path), fix=f"Sheets: {titles}.")
    if len(filled) > 1:
        raise UserError(
            f"Several sheets have rows: {', '.join(filled)}",
            where=str(path),
            fix="Name one with --sheet or data.sheet, or save each as a separate file.",
        )
    return filled[0]


def _rows(path: Path, title: str, data: DataConfig, notes: list[str], task: Task | None) -> Iterator[RawRow]:
    where = f"{path}:{title}"
    reported, size = 0, path.stat().st_size
    with _reading(path), path.open("rb") as file:
        workbook = _Workbook(path, file)
        parser = workbook.parser(title)
        declared = max(1, workbook.archive.getinfo(workbook.parts[title]).file_size)
        table: _Table | None = None
        rows = parser.parse()
        for number, cells in rows:
            if table is None:
                if number < (data.header_row or 1):
                    continue
                table = _Table(where, number, _header(cells, where), workbook)
                header, at = list(table.names.values()), f"{where}:{number}"
                later = ((below, [str(cell["value"]) for cell in lower]) for below, lower in rows)
                table.used, others = header_columns(header, later, at, data, notes, min(table.names))
                table.wanted = {*table.used, *others}
            else:
                yield RawRow(number, table.row(cells))
            if task is not None:
                done = size * parser.source.read_bytes // declared
                task.advance(done - reported)
                reported = done
        if table is not None:
            table.refuse_merged(parser.merged)
            notes.extend(table.notes())
    if task is not None:
        task.advance(size - reported)


def _header(cells: Sequence[dict[str, Any]], where: str) -> dict[int, str]:
    """Return the name of each column from the first one with a name to the last; "" for columns without a name."""
    names: dict[int, str] = {}
    for cell in cells:
        try:
            names[cell["column"]] = _text(cell)
        except RowError as fault:
            raise UserError(f"In the header, {fault}", where=f"{where}:{cell['row']}", fix=fault.fix) from None
    first, last = min(names), max(names)
    if last > _MOST_COLUMNS:
        raise ValueError(f"column {last:,}")
    return {column: names.get(column, "") for column in range(first, last + 1)}


@dataclass
class _Table:
    """The columns of a sheet, and what was lost from its cells."""

    where: str
    header_row: int
    names: dict[int, str]
    workbook: _Workbook
    used: list[str] = field(default_factory=list)
    wanted: set[str] = field(default_factory=set)
    _unnamed: list[str] = field(default_factory=list)
    _lost: list[str] = field(default_factory=list)
    _formatted: list[str] = field(default_factory=list)
    _full: list[str] = field(default_factory=list)

    def row(self, cells: Sequence[dict[str, Any]]) -> dict[str, Any] | RowError:
        """Return a row by the names of its columns; used columns without a value are empty texts."""
        row = dict.fromkeys(self.used, "")  # other columns without a value are not kept
        for cell in cells:
            name = self.names.get(cell["column"])
            if name is None:
                self._unnamed.append(_place(cell))
            elif name in self.wanted:
                try:
                    row[name] = text = _text(cell)
                except RowError as fault:
                    if name in self.used:
                        return RowError(fault.code, str(fault), (name,))
                    self._lost.append(str(fault))
                    continue
                if isinstance(cell["value"], int | float) and cell["data_type"] == "n":
                    shown = self.workbook.format(cell["style_id"])
                    if shown not in _PLAIN_FORMATS:
                        self._formatted.append(f"{_place(cell)} is {text} (shown as {shown})")
                elif len(text) == _MOST_TEXT:
                    self._full.append(_place(cell))
        return row

    def notes(self) -> Iterator[str]:
        """Yield notes on cells that were not read, or not as the sheet shows them."""
        for what, found in (
            ("not read, because their columns have no name", self._unnamed),
            ("not kept as metadata", self._lost),
            ("numbers are read as stored, not as shown", self._formatted),
            (f"cells of {_MOST_TEXT:,} characters, where Excel cuts text", self._full),
        ):
            if found:
                yield f"{self.where}: {what}: {first_of(found, _MOST_NAMED)}"

    def refuse_merged(self, merged: Sequence[str]) -> None:
        """Refuse merged cells of the table below its header, because only the first of them has a value."""
        found = []
        for ref in merged:
            left, top, right, bottom = range_boundaries(ref)
            rows = bottom - max(top, self.header_row + 1) + 1
            width = min(right, max(self.names)) - max(left, min(self.names)) + 1
            if rows > 0 and width > 0 and rows * width > (top > self.header_row and left in self.names):
                found.append((max(top, self.header_row + 1), ref))
        if found:
            found.sort()
            raise UserError(
                f"Merged cells: {first_of((ref for _, ref in found), _MOST_NAMED)}",
                where=f"{self.where}:{found[0][0]}",
                fix="Unmerge them, and fill in each cell: only the first has a value.",
            )


def _place(cell: dict[str, Any]) -> str:
    return f"{get_column_letter(cell['column'])}{cell['row']}"


def _text(cell: dict[str, Any]) -> str:
    """Return a cell's value as text; a cell without a value is a RowError."""
    value, kind = cell["value"], cell["data_type"]
    if kind == "f":
        raise RowError("E109", f"{_place(cell)} is a formula without a stored value")
    if kind == "e" or (isinstance(value, float) and not math.isfinite(value)):
        raise RowError("E109", f"{_place(cell)} is the error {value}")
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), str(value))
