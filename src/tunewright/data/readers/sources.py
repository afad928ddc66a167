"""Detection of a file's format from its content, and access to its unchecked rows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import Task
from tunewright.core.text import first_of
from tunewright.data.pii import find_in_value
from tunewright.data.readers.arrow import parquet_rows, saved_rows
from tunewright.data.readers.encodings import (
    COMPRESSIONS,
    Encoding,
    compression_of,
    find_encoding,
    open_bytes,
    open_text,
)
from tunewright.data.readers.json_rows import (
    RawRow,
    array_hint,
    check_expression,
    document_rows,
    json_array,
    json_lines,
    json_objects,
    number_if_ambiguous,
    parse_json_row,
    row_object,
    rows_hint,
)
from tunewright.data.readers.mapping import check_groups, names_parent, pair_mapping, search_jmespath
from tunewright.data.readers.row_errors import RowError, RowsElsewhereError
from tunewright.data.readers.schemas import KNOWN_KEYS, misspelled_keys, parse_conversation
from tunewright.data.readers.source_files import JSON_SUFFIXES, is_saved, plain_suffix
from tunewright.data.readers.tables import DELIMITERS, csv_rows, delimiter_of, quoted_name, separator_line
from tunewright.data.readers.validate import example_from_object

_KINDS = (
    "Supported: JSON Lines, a JSON array, CSV or TSV, each also as .gz or .zst, Parquet, an .xlsx workbook, a folder "
    "written by datasets' save_to_disk."
)
_TABLE_NAMES = (".csv", ".tsv", ".tab", ".txt", ".psv", "")
_PARQUET = b"PAR1"
_ZIP = b"PK\x03\x04"
_OTHERS = {
    b"\xd0\xcf\x11\xe0": "a workbook that is encrypted or in the format of Excel 97 (.xls); save it as .xlsx without a "
    "password",
    b"BZh": "compressed by bzip2",
    b"\xfd7zX": "compressed by xz",
}
_HEAD = 1 << 16  # characters
_LOOKED_AT = 20  # rows that decide whether names of columns can be keys of rows
_MOST_SHOWN = 50  # columns in a message
_SHORT = 40  # characters of a value in a message
_SEARCHED = 1_000  # characters of a value that are searched for a secret


@dataclass(frozen=True)
class SourceFile:
    """A file's name in messages, its format ("JSON Lines"), its rows as an iterator, and the encoding of text."""

    name: str
    kind: str
    rows: Iterator[RawRow]
    encoding: Encoding | None = None
    table: bool = False
    """True if the rows have columns."""
    delimiter: str = ""
    """The delimiter of a CSV file; empty for other formats."""


def open_source(path: Path, data: DataConfig, notes: list[str], task: Task | None = None) -> SourceFile:
    """Detect the format of a file from its beginning, and from its name if the content is ambiguous.

    ``notes`` receives notes for the user: encoding, unused columns, rows without lines. ``task`` is advanced by the
    bytes read.
    """
    check_mapping(data)
    if path.is_dir():
        if not is_saved(path):
            raise UserError("Expected a file, got a folder", where=str(path), fix="Name the files in it.")
        _refuse_rows(data, "a saved dataset", path)
        return SourceFile(str(path), "a saved dataset", saved_rows(path, data, notes, task), table=True)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise UserError("No such file", where=str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot open the file: {reason}", where=str(path)) from None
    if not path.is_file():
        raise UserError("Not a regular file", where=str(path), fix="Save it as a file first.")
    if magic == _PARQUET:
        _refuse_rows(data, "Parquet", path)
        return SourceFile(str(path), "Parquet", parquet_rows(path, data, notes, task), table=True)
    if magic == _ZIP:
        _refuse_rows(data, "a workbook", path)
        from tunewright.data.readers.workbooks import open_workbook

        title, rows = open_workbook(path, data, notes, task)
        return SourceFile(f"{path}:{title}", f"sheet {title}", rows, table=True)
    compression = compression_of(magic)
    if compression is not None:
        with open_bytes(path) as file:
            magic = file.read(4)
    for first, what in (_OTHERS | {_PARQUET: "Parquet", _ZIP: "a zip archive"} | COMPRESSIONS).items():
        if magic.startswith(first):
            inside = f" inside {compression}: decompress the file first" if compression else ""
            raise UserError(f"Unsupported file format: {what}{inside}", where=str(path), fix=_KINDS)
    encoding = find_encoding(path)
    if encoding.codec == "cp1252":  # the only encoding that is guessed
        notes.append(
            f"{path}: read as cp1252 (Windows, Western European; includes latin-1), because line {encoding.first_line} "
            f'is not UTF-8. That line has "{encoding.excerpt}": if this is wrong, save the file as UTF-8.'
        )
    with open_text(path, encoding) as text:
        head = text.read(_HEAD)  # white space does not count
        while len(head.lstrip()) < _HEAD // 2 and (more := text.read(_HEAD)):
            head = head.lstrip() + more
        kind, reader = _text_reader(head, path, data, notes)
    table = kind.startswith("CSV")
    delimiter = (separator_line(head) or delimiter_of(head, data)) if table else ""
    kind += f" in {compression}" if compression else ""
    return SourceFile(str(path), kind, _text_rows(path, encoding, task, reader), encoding, table, delimiter)


def is_workbook(path: Path) -> bool:
    """Return whether the file is a zip archive, as .xlsx workbooks are."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == _ZIP


def check_mapping(data: DataConfig) -> None:
    """Check the templates and JMESPaths of the config, before any file is read; an invalid one raises a UserError."""
    pair_mapping(data)
    check_groups(data)
    if data.rows is not None:
        check_expression(data.rows)


def _refuse_rows(data: DataConfig, kind: str, path: Path) -> None:
    if data.rows is not None:
        what = f"data.rows requires a JSON document ({path} is {kind})"
        raise UserError(what, where="data.rows (--rows)", fix="Leave it out for this file.")


_Reader = Callable[[TextIO], Iterator[RawRow]]


def _text_rows(path: Path, encoding: Encoding, task: Task | None, reader: _Reader) -> Iterator[RawRow]:
    with open_text(path, encoding, task) as text:
        yield from reader(text)


def _text_reader(head: str, path: Path, data: DataConfig, notes: list[str]) -> tuple[str, _Reader]:
    suffix = plain_suffix(path)
    start = head.lstrip()
    lines = [line for line in start.split("\n") if line.strip()]
    named_json = suffix in JSON_SUFFIXES
    expression = data.rows
    if expression is not None and (named_json or start.startswith(("{", "["))):
        above = [group for group in data.group_by if names_parent(group, data)]
        return f"rows at {expression} of a JSON document", lambda text: document_rows(
            text, path, expression, notes, above
        )
    if len(lines) > 1 and named_json and _is_row(lines[0], "[") and _is_row(lines[1], ("[", "{")):
        return "JSON Lines", json_lines
    if start.startswith("[") and (named_json or start[1:].lstrip().startswith("{")):
        return "a JSON array", lambda text: _no_container(
            number_if_ambiguous(json_array(text, path), path, notes), path, data, array=True
        )
    if any(_is_row(line, "{") for line in lines[: 20 if named_json else 1]):
        return "JSON Lines", lambda text: _no_container(json_lines(text), path, data, array=False)
    if start.startswith("{") and suffix not in _TABLE_NAMES[:3]:
        if len(lines) > 1 and not lines[1].lstrip().startswith("{"):
            kind = "JSON objects over several lines"
            return kind, lambda text: _no_container(
                number_if_ambiguous(json_objects(text, path), path, notes), path, data, array=False
            )
        return "JSON Lines", json_lines
    separator = separator_line(head)
    delimiter = separator or delimiter_of(head, data)
    # Titles above the header may lack the delimiter.
    several = any(delimiter in line for line in (lines if suffix in _TABLE_NAMES else lines[:1]))
    if named_json and not several:
        return "JSON Lines", json_lines
    if suffix not in _TABLE_NAMES and not several:
        raise UserError("Unsupported file format", where=str(path), fix=_KINDS)
    _refuse_rows(data, "a table", path)
    kind = f"CSV, {DELIMITERS.get(delimiter, delimiter)}-separated" if several else "CSV"
    kind += ", as its first line says" if separator else ""
    skipped = (data.header_row or 1 + bool(separator)) - 1
    return kind, lambda text: csv_rows(text, path, delimiter, skipped, data, notes)


def _no_container(rows: Iterator[RawRow], path: Path, data: DataConfig, *, array: bool) -> Iterator[RawRow]:
    """Yield the rows, but refuse an array whose first object, or the only object, seems to contain the rows."""
    first = list(islice(rows, 1 if array else 2))
    row = first[0].row if len(first) == 1 and isinstance(first[0].row, dict) else {}
    if row and not array and all(isinstance(each, dict) and next(iter(each), None) == "0" for each in row.values()):
        fix = "Write it by rows, such as with to_json(orient='records') of pandas."
        raise RowsElsewhereError(
            "The only object has columns instead of rows", where=f"{path}:{first[0].line}", fix=fix
        )
    hint = array_hint(row) if array else rows_hint(row, path.name)
    if hint and (fault := _no_row(row, data)):
        what = "The objects of the array are not rows" if array else "The only object is not a row"
        options, keys = _reading_options(hint, [row] if array else row, data)
        raise RowsElsewhereError(
            f"{what}, but seem{'' if array else 's'} to contain the rows ({fault})",
            where=f"{path}:{first[0].line}",
            fix=f"Use {options}, or set data.rows (docs/how-to/file-formats.md). "
            f"Keys: {first_of(row)}; of a row: {first_of(keys)}."
            + (" If each object of the array is one row, use --input and --output with its keys." if array else ""),
        )
    yield from first
    yield from rows


def _reading_options(expression: str, document: Any, data: DataConfig) -> tuple[str, Sequence[str]]:
    """Return options that read the rows of a document, tried on the first rows, and the keys of a row."""
    while True:
        selected = search_jmespath(check_expression(expression), document)
        rows = [
            row_object(item)
            for item in selected[:_LOOKED_AT]
            if isinstance(item, dict) or (item and isinstance(item, list))
        ]
        options = f"--rows {shlex.quote(expression)}"
        for columns in ({}, {"input": "0", "output": "1"}):
            with suppress(RowError):
                for row in rows:
                    example_from_object(row, data.model_copy(update=columns))
                return " ".join([options, *(f"--{name} {place}" for name, place in columns.items())]), list(rows[0])
        inner = array_hint(rows[0])
        if inner is None:
            return options, list(rows[0])
        expression = f"{expression.removesuffix('[]')}{inner}"  # rows inside rows, as in SQuAD


def _no_row(row: dict[str, Any], data: DataConfig) -> RowError | None:
    """Return the error of an object without any known key; None if it may be a row."""
    if not row.keys().isdisjoint(KNOWN_KEYS) or misspelled_keys(row):
        return None
    try:
        parse_conversation(row, data)
    except RowError as fault:
        return fault
    return None


def _is_row(line: str, start: str | tuple[str, ...]) -> bool:
    if not line.startswith(start):  # an indented object is a part of an object over several lines
        return False
    try:
        return bool(parse_json_row(line))
    except RowError as fault:
        return fault.code in ("E101", "E104", "E105")


def require_columns(paths: Sequence[Path], data: DataConfig, where: str) -> None:
    """Refuse column names that apply to no file: no file is a table or has first rows with these keys."""
    mapping = pair_mapping(data)
    if mapping is not None and mapping.templated:
        return
    there: dict[str, Any] = {}
    for path in paths:
        source = open_source(path, data, [])
        if source.table:
            return
        for raw in islice(source.rows, _LOOKED_AT):
            if not isinstance(raw.row, RowError):
                if data.input in raw.row and data.output in raw.row:
                    return
                there = raw.row | there
    raise UserError(
        f"No file is a CSV or another table, and no row has both the keys {data.input} and {data.output}",
        where=where,
        fix=f"Keys of the first rows: {shown_columns(there)}" if there else None,
    )


# Templates on the whole row: every column is read, regardless of its name.
_ANY_COLUMNS = {"input": "{{ row }}", "output": "{{ row | tojson }}", "group_by": (), "drop_columns": ()}


def first_rows(file: Path, data: DataConfig) -> list[dict[str, Any]]:
    """Return a file's first rows without a fault, regardless of the names of their columns.

    Raises:
        UserError: the file cannot be read, or two columns have the same name.
    """
    source = open_source(file, data.model_copy(update=_ANY_COLUMNS), [])
    return [raw.row for raw in islice(source.rows, _LOOKED_AT) if not isinstance(raw.row, RowError)]


def first_values(file: Path, data: DataConfig) -> dict[str, Any]:
    """Return the columns (or keys) of a file's first rows, each with its first value; raises as ``first_rows`` does."""
    values: dict[str, Any] = {}
    for row in first_rows(file, data):
        values |= {key: value for key, value in row.items() if key not in values}
    return values


def shown_columns(values: Mapping[str, Any]) -> str:
    """Return columns, each with the beginning of its value, unless that contains a secret: ``0 ("q0-0"), 1 ("B")``."""
    shown = []
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        secret = any(found.category == "secret" for found in find_in_value(name, text[:_SEARCHED]))
        line = " ".join(text[:_SEARCHED].split())
        line = line if len(line) <= _SHORT else f"{line[: _SHORT - 1]}…"
        quoted = f'"{line}"' if isinstance(value, str) else line
        shown.append(quoted_name(name) if secret else f"{quoted_name(name)} ({quoted})")
    return first_of(shown, _MOST_SHOWN)
