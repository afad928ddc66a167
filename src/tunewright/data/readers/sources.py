"""What kind of file this is, told from its content, and its rows before they are checked."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import Task
from tunewright.data.readers.documents import array_hint, check_expression, document_rows, keys_told, rows_hint
from tunewright.data.readers.encodings import Encoding, find_encoding, note_on, open_text
from tunewright.data.readers.json_rows import RawRow, json_array, json_lines, json_objects, told_apart
from tunewright.data.readers.mapping import mapping_of
from tunewright.data.readers.parents import check_groups, names_parent
from tunewright.data.readers.schemas import KNOWN_KEYS, conversation_of, mistyped
from tunewright.data.readers.tables import DELIMITERS, csv_rows, delimiter_of, parquet_rows, saved_rows
from tunewright.data.readers.validate import RowError, parse_json_row

_KINDS = "What is read: JSON Lines, a JSON array, CSV or TSV, Parquet, a folder that datasets' save_to_disk wrote."
JSON_NAMES = (".jsonl", ".ndjson", ".json")
SAVED = ("state.json", "dataset_dict.json")
"""A folder with one of these was written by ``Dataset.save_to_disk``."""
_TABLE_NAMES = (".csv", ".tsv", ".tab", ".txt", ".psv", "")
_PARQUET = b"PAR1"
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x1f\x8b": "compressed by gzip",
    b"(\xb5/\xfd": "compressed by zstd",
}
_HEAD = 1 << 16  # characters
_LOOKED_AT = 20  # rows that decide whether names of columns, or an array's objects, can be rows


@dataclass(frozen=True)
class Source:
    """How a file holds rows ("JSON Lines"), the rows, read as they are asked for, and the encoding if it is text."""

    kind: str
    rows: Iterator[RawRow]
    encoding: Encoding | None = None
    table: bool = False
    """Rows are read by columns."""


def open_source(path: Path, data: DataConfig, notes: list[str], task: Task | None = None) -> Source:
    """Look at the beginning of a file (the name decides only where the content does not) and get its rows ready.

    Args:
        notes: gets what the user should know: encoding, columns that are not used, rows without lines.
        task: advanced by the bytes that are read.

    Raises:
        UserError: nothing there, no kind of file that is read, an encoding that is not, a config that maps rows by
            no template or JMESPath; from ``rows``, what the readers raise.
    """
    check_mapping(data)
    if path.is_dir():
        return _open_folder(path, data, notes, task)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be opened: {reason}", where=str(path)) from None
    if not path.is_file():
        raise UserError("not a file that can be read twice", where=str(path), fix="Save it as a file first.")
    if magic == _PARQUET:
        _refuse_rows(data, "Parquet", path)
        return Source("Parquet", parquet_rows(path, data, notes, task), table=True)
    for archive, what in _ARCHIVES.items():
        if magic.startswith(archive):
            raise UserError(f"not a kind of file that can be read: {what}", where=str(path), fix=_KINDS)
    encoding = find_encoding(path)
    note = note_on(path, encoding)
    if note:
        notes.append(note)
    with open_text(path, encoding) as text:
        head = text.read(_HEAD)
        while len(head.lstrip()) < _HEAD // 2 and (more := text.read(_HEAD)):
            head = head.lstrip() + more
        kind, reader = _text_reader(head, path, data, notes)
    return Source(kind, _text_rows(path, encoding, task, reader), encoding, table=kind.startswith("CSV"))


def check_mapping(data: DataConfig) -> None:
    """Refuse what the config maps rows by, before any file is read.

    Raises:
        UserError: data.input or data.output is a template that is none, data.rows or a group above it no JMESPath.
    """
    mapping_of(data)
    check_groups(data)
    if data.rows is not None:
        check_expression(data.rows)


def _refuse_rows(data: DataConfig, kind: str, path: Path) -> None:
    if data.rows is not None:
        what = f"data.rows finds rows in a JSON document, and {path} is {kind}"
        raise UserError(what, where="data.rows (--rows)", fix="Leave it out for this file.")


def _open_folder(path: Path, data: DataConfig, notes: list[str], task: Task | None) -> Source:
    if not any((path / name).is_file() for name in SAVED):
        raise UserError("a folder, not a file", where=str(path), fix="Name the files in it.")
    _refuse_rows(data, "a saved dataset", path)
    return Source("a saved dataset", saved_rows(path, data, notes, task), table=True)


_Reader = Callable[[TextIO], Iterator[RawRow]]


def _text_rows(path: Path, encoding: Encoding, task: Task | None, reader: _Reader) -> Iterator[RawRow]:
    with open_text(path, encoding, task) as text:
        yield from reader(text)


def _text_reader(head: str, path: Path, data: DataConfig, notes: list[str]) -> tuple[str, _Reader]:
    suffix = path.suffix.lower()
    start = head.lstrip()
    lines = [line for line in start.split("\n") if line.strip()]
    named_json = suffix in JSON_NAMES
    expression = data.rows
    if expression is not None and (named_json or start.startswith(("{", "["))):
        above = [group for group in data.group_by if names_parent(group, data)]
        return f"rows at {expression} of a JSON document", lambda text: document_rows(
            text, path, expression, notes, above
        )
    if start.startswith("[") and (named_json or start[1:].lstrip().startswith("{")):
        return "a JSON array", lambda text: _no_nested_rows(told_apart(json_array(text, path), path, notes), path, data)
    if any(_is_object(line) for line in lines[: 20 if named_json else 1]):
        return "JSON Lines", lambda text: _no_document(json_lines(text), path, data)
    if start.startswith("{") and suffix not in _TABLE_NAMES[:3]:
        if len(lines) > 1 and not lines[1].lstrip().startswith("{"):
            kind = "JSON objects over several lines"
            return kind, lambda text: _no_document(told_apart(json_objects(text, path), path, notes), path, data)
        return "JSON Lines", json_lines
    delimiter = delimiter_of(head, data)
    several = bool(lines) and delimiter in lines[0]
    if named_json and not several:
        return "JSON Lines", json_lines
    if suffix not in _TABLE_NAMES and not several:
        raise UserError("not a kind of file that can be read", where=str(path), fix=_KINDS)
    _refuse_rows(data, "a table", path)
    kind = f"CSV, {DELIMITERS[delimiter]}-separated" if several else "CSV"
    return kind, lambda text: csv_rows(text, path, delimiter, data, notes)


def _no_nested_rows(rows: Iterator[RawRow], path: Path, data: DataConfig) -> Iterator[RawRow]:
    """The rows, unless the first ones are no rows themselves but all seem to hold some."""
    first = list(islice(rows, 1))
    objects = [raw.row for raw in first if isinstance(raw.row, dict)]
    if array_hint(objects) and _no_row(objects[0], data):
        first += islice(rows, _LOOKED_AT - 1)
        objects = [raw.row for raw in first if isinstance(raw.row, dict)]
    if len(objects) == len(first) and (hint := array_hint(objects)) is not None:
        faults = [_no_row(row, data) for row in objects]
        if all(faults):
            raise UserError(
                f"an array of objects that are no rows themselves, and seem to hold the rows ({faults[0]})",
                where=f"{path}:{first[0].line}",
                fix=f"Say where in them they are: --rows {shlex.quote(hint)}, or set data.rows (docs/formats.md). "
                f"Keys of the objects: {keys_told(objects[0])}.",
            )
    yield from first
    yield from rows


def _no_row(row: dict[str, Any], data: DataConfig) -> RowError | None:
    """Return why an object without any known key is no row; None where it may be one."""
    if not row.keys().isdisjoint(KNOWN_KEYS) or mistyped(row):
        return None
    try:
        conversation_of(row, data)
    except RowError as fault:
        return fault
    return None


def _no_document(rows: Iterator[RawRow], path: Path, data: DataConfig) -> Iterator[RawRow]:
    """The rows, unless the only one is no row itself but seems to hold them."""
    first = list(islice(rows, 2))
    document = first[0].row if len(first) == 1 else None
    if isinstance(document, dict) and (hint := rows_hint(document)) and (fault := _no_row(document, data)):
        raise UserError(
            f"one object that is no row itself, and seems to hold the rows ({fault})",
            where=f"{path}:{first[0].line}",
            fix=f"Say where in it they are: --rows {shlex.quote(hint)}, or set data.rows (docs/formats.md).",
        )
    yield from first
    yield from rows


def _is_object(line: str) -> bool:
    if not line.startswith("{"):  # an indented one is a part of an object over several lines
        return False
    try:
        return bool(parse_json_row(line))
    except RowError as fault:
        return fault.code in ("E101", "E104", "E105")


def require_columns(paths: Sequence[Path], data: DataConfig, where: str) -> None:
    """Refuse names of columns that say of no file how it is read: none is a table, or has the keys in its first rows.

    Raises:
        UserError: as it says, with the keys that are there; or as ``open_source``.
    """
    mapping = mapping_of(data)
    if mapping is not None and mapping.templated:
        return
    there: dict[str, None] = {}
    for path in paths:
        source = open_source(path, data, [])
        if source.table:
            return
        for raw in islice(source.rows, _LOOKED_AT):
            if not isinstance(raw.row, RowError):
                if data.input in raw.row and data.output in raw.row:
                    return
                there |= dict.fromkeys(raw.row)
    raise UserError(
        f"no file is a CSV or another table, and no row has both the keys {data.input} and {data.output}",
        where=where,
        fix=f"Keys of the first rows: {keys_told(there)}." if there else None,
    )
