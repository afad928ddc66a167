"""Files of pairs: chat JSONL, prompt/completion JSONL and CSV."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tunewright.data.checks import RowError, example_from_object, example_from_pair, parse_json_row
from tunewright.data.examples import Example
from tunewright.errors import UserError
from tunewright.progress import Task
from tunewright.recipe import DataRecipe

_CSV_FIELD_LIMIT = 2**31 - 1  # Python's own default refuses 131,072 characters before data.max_characters is asked
_KINDS = "Files of pairs end in .jsonl, .ndjson or .json (one JSON object per line), or in .csv."

# One row: the line it starts at, and how to make the example of it (raises RowError).
_Row = tuple[int, Callable[[], Example]]


@dataclass(frozen=True)
class SourceRow:
    """An example and where it was read: the file as the user named it, and the line (from 1) that the row starts at."""

    example: Example
    source: str
    line: int


@dataclass(frozen=True)
class Fault:
    """A row that is no example, and why."""

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Reading:
    """All that one file holds: examples, faulty rows, and what the user should know besides."""

    rows: list[SourceRow]
    faults: list[Fault]
    notes: list[str]


def read_pairs(path: Path, data: DataRecipe, task: Task | None = None) -> Reading:
    """Read a file of pairs; faulty rows are collected, blank lines are no rows.

    A byte-order mark is read as such. In CSV, a line break inside quotes belongs to its field.

    Args:
        data: the recipe's names of the CSV columns, its system turn and its limit of characters.
        task: advanced by each line's bytes.

    Raises:
        UserError: the file as a whole cannot be read: missing, a folder, empty, of another kind or encoding, a JSON
            array, a CSV column that is not there or quotes that don't match.
    """
    if path.is_dir():
        raise UserError("a folder, not a file", where=str(path), fix="Name the files in it.")
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".ndjson", ".json", ".csv"):
        raise UserError("not a kind of file that can be read", where=str(path), fix=_KINDS)
    reading = Reading([], [], [])
    with _opened(path) as file:
        _refuse_other_encodings(path, file)
        lines = _lines(file, task)
        rows = _csv_rows(lines, path, data, reading.notes) if kind == ".csv" else _json_rows(lines, path, data)
        for line, make in rows:
            try:
                reading.rows.append(SourceRow(make(), str(path), line))
            except RowError as fault:
                reading.faults.append(Fault(str(path), line, str(fault)))
    if not reading.rows and not reading.faults:
        raise UserError("the file is empty: there is no row in it", where=str(path))
    return reading


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be opened: {reason}", where=str(path)) from None
    with file:
        yield file


def _refuse_other_encodings(path: Path, file: BinaryIO) -> None:
    """Leave the file behind its byte-order mark, if that is UTF-8's."""
    head = file.read(3)
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError("the file is in UTF-16", where=str(path), fix="Save it as UTF-8.")
    file.seek(3 if head == codecs.BOM_UTF8 else 0)


def _lines(file: BinaryIO, task: Task | None) -> Iterator[bytes]:
    for line in file:
        if task is not None:
            task.advance(len(line))
        yield line


def _json_rows(lines: Iterator[bytes], path: Path, data: DataRecipe) -> Iterator[_Row]:
    first = True
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        if first and line.lstrip().startswith(b"["):
            _refuse_json_array(path)
        first = False

        def make(line: bytes = line) -> Example:
            return example_from_object(parse_json_row(line), data)

        yield number, make


def _refuse_json_array(path: Path) -> None:
    """One message for the whole file, where each of its lines would be told to be no JSON."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return
    if isinstance(whole, list) and any(isinstance(row, dict) for row in whole):
        raise UserError(
            "one JSON array, not one object per line",
            where=str(path),
            fix=f"Turn it into JSON lines: jq -c '.[]' {path.name} > {path.stem}.jsonl",
        )


def _csv_rows(lines: Iterator[bytes], path: Path, data: DataRecipe, notes: list[str]) -> Iterator[_Row]:
    # A byte that is not UTF-8 travels as a lone surrogate to the row it stands in, which is then refused by its line.
    text = (line.decode(errors="surrogateescape") for line in lines)
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            if header is None and fields:
                header = fields
                places = _columns(header, f"{path}:{start}", data)
                unused = [name for i, name in enumerate(header) if i not in places]
                if unused:
                    notes.append(f"{path}: columns that are not used: {', '.join(unused)}")
            elif header is not None and fields:
                yield start, _csv_example(fields, len(header), places, data)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"not CSV that can be read from here on: {error}",
            where=f"{path}:{start}",
            fix='Text with a comma, a quote or a line break stands in quotes, and a quote in it is doubled: "".',
        ) from None


def _columns(header: list[str], where: str, data: DataRecipe) -> tuple[int, int]:
    """The places of the input's and the output's column."""
    if any(_not_utf8(name) for name in header):
        raise UserError("not UTF-8", where=where, fix="Save the file as UTF-8.")
    there = f"Columns: {', '.join(header)}"
    if data.input is None or data.output is None:
        raise UserError(
            "which columns hold the input and the ideal output?",
            where=where,
            fix=f"Say --input COLUMN --output COLUMN, or set data.input and data.output. {there}",
        )
    for name in (data.input, data.output):
        if header.count(name) != 1:
            what = "no column" if name not in header else "more than one column"
            raise UserError(f'{what} named "{name}"', where=where, fix=there)
    if data.input == data.output:
        raise UserError(f'"{data.input}" cannot be input and output at once', where=where, fix=there)
    return header.index(data.input), header.index(data.output)


def _not_utf8(text: str) -> bool:
    return any("\udc80" <= c <= "\udcff" for c in text)


def _csv_example(fields: list[str], width: int, places: tuple[int, int], data: DataRecipe) -> Callable[[], Example]:
    def make() -> Example:
        if len(fields) != width:
            raise RowError(f"{len(fields)} fields where the header has {width}")
        if any(_not_utf8(fields[place]) for place in places):
            raise RowError("not UTF-8")
        return example_from_pair(fields[places[0]], fields[places[1]], data)

    return make
