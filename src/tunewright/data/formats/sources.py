"""What kind of file this is, told from its content, and its rows before they are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tunewright.data.formats.checks import RowError, parse_json_row
from tunewright.data.formats.encodings import Encoding, find_encoding, note_on, open_text
from tunewright.data.formats.json_rows import RawRow, json_array, json_lines, json_objects
from tunewright.data.formats.tables import DELIMITERS, csv_rows, delimiter_of, parquet_rows, saved_rows
from tunewright.errors import UserError
from tunewright.progress import Task
from tunewright.recipe import DataRecipe

_KINDS = "What is read: JSON Lines, a JSON array, CSV or TSV, Parquet, a folder that datasets' save_to_disk wrote."
_JSON_NAMES = (".jsonl", ".ndjson", ".json")
_TABLE_NAMES = (".csv", ".tsv", ".tab", ".txt", ".psv", "")
_PARQUET = b"PAR1"
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x1f\x8b": "compressed by gzip",
    b"(\xb5/\xfd": "compressed by zstd",
}
_HEAD = 1 << 16  # characters


@dataclass(frozen=True)
class Source:
    """How a file holds rows ("JSON Lines"), the rows, read as they are asked for, and the encoding if it is text."""

    kind: str
    rows: Iterator[RawRow]
    encoding: Encoding | None = None


def open_source(path: Path, data: DataRecipe, notes: list[str], task: Task | None = None) -> Source:
    """Look at the beginning of a file (the name decides only where the content does not) and get its rows ready.

    Args:
        notes: gets what the user should know: encoding, columns that are not used.
        task: advanced by the bytes that are read.

    Raises:
        UserError: nothing there, no kind of file that is read, an encoding that is not; from ``rows``, what the
            readers raise.
    """
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
        return Source("Parquet", parquet_rows(path, data, notes, task))
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
    return Source(kind, _text_rows(path, encoding, task, reader), encoding)


def _open_folder(path: Path, data: DataRecipe, notes: list[str], task: Task | None) -> Source:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError("a folder, not a file", where=str(path), fix="Name the files in it.")
    return Source("a saved dataset", saved_rows(path, data, notes, task))


_Reader = Callable[[TextIO], Iterator[RawRow]]


def _text_rows(path: Path, encoding: Encoding, task: Task | None, reader: _Reader) -> Iterator[RawRow]:
    with open_text(path, encoding, task) as text:
        yield from reader(text)


def _text_reader(head: str, path: Path, data: DataRecipe, notes: list[str]) -> tuple[str, _Reader]:
    suffix = path.suffix.lower()
    start = head.lstrip()
    lines = [line for line in start.split("\n") if line.strip()]
    named_json = suffix in _JSON_NAMES
    if start.startswith("[") and (named_json or start[1:].lstrip().startswith("{")):
        return "a JSON array", lambda text: json_array(text, path)
    if any(_is_object(line) for line in lines[: 20 if named_json else 1]):
        return "JSON Lines", json_lines
    if start.startswith("{") and suffix not in _TABLE_NAMES[:3]:
        if len(lines) > 1 and not lines[1].lstrip().startswith("{"):
            return "JSON objects over several lines", lambda text: json_objects(text, path)
        return "JSON Lines", json_lines
    delimiter = delimiter_of(head, data)
    several = bool(lines) and delimiter in lines[0]
    if named_json and not several:
        return "JSON Lines", json_lines
    if suffix not in _TABLE_NAMES and not several:
        raise UserError("not a kind of file that can be read", where=str(path), fix=_KINDS)
    kind = f"CSV, {DELIMITERS[delimiter]}-separated" if several else "CSV"
    return kind, lambda text: csv_rows(text, path, delimiter, data, notes)


def _is_object(line: str) -> bool:
    if not line.startswith("{"):  # an indented one is a part of an object over several lines
        return False
    try:
        return bool(parse_json_row(line))
    except RowError as fault:
        return fault.code in ("E101", "E104", "E105")


def uses_columns(path: Path, data: DataRecipe) -> bool:
    """Whether the recipe's names of columns say how a file is read: it is a table, or its first rows have the keys.

    Raises:
        UserError: as ``open_source``.
    """
    source = open_source(path, data, [])
    if not source.kind.startswith("JSON") and source.kind != "a JSON array":
        return True
    first = (row for _, row in zip(range(20), source.rows, strict=False))
    return any(not isinstance(row, RowError) and data.input in row and data.output in row for _, row in first)
