"""Rows in tables: CSV with any usual delimiter, Parquet, saved ``datasets`` folders; and which columns are read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import Task
from tunewright.data.readers.encodings import escaped
from tunewright.data.readers.json_rows import RawRow
from tunewright.data.readers.mapping import mapping_of
from tunewright.data.readers.schemas import misspelt
from tunewright.data.readers.validate import RowError

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_CSV_FIELD_LIMIT = 2**31 - 1  # Python's own default refuses 131,072 characters before data.max_characters is asked
_BATCH = 1024
_SNIFFED = 50  # rows that decide on the delimiter

# Columns by which a table is read without being told how: those it must have, those it may have.
_KNOWN_COLUMNS = (
    (("messages",), ("system", "system_prompt", "only_last", "tools")),
    (("interactions",), ("system", "system_prompt", "only_last", "tools")),
    (("conversation",), ()),
    (("conversations",), ("system", "tools")),
    (("prompt", "completion"), ()),
    (("instruction", "output"), ("input", "system", "history")),
)


def columns(
    header: Sequence[str], where: str, data: DataConfig, notes: list[str], *, nested: bool
) -> tuple[list[str], list[str]]:
    """The columns that are used (by input and output, or a known kind of row, and the groups'), and others to keep.

    Args:
        nested: whether a cell can hold lists.

    Raises:
        UserError: columns that are not there, stand twice, or are not told.
    """
    there = f"Columns: {', '.join(header)}"
    mapping = mapping_of(data)
    if mapping is not None:
        names = mapping.columns(header)
    else:
        known = None if data.input or data.output else _known(header, nested)
        if known is None:
            absent = {name for needed, _ in _KNOWN_COLUMNS for name in needed} - set(header)
            near = [(name, misspelt(name, absent)) for name in header]
            meant = ", ".join(f'unknown column "{name}", did you mean "{like}"?' for name, like in near if like)
            do = "Correct the header, or say" if meant else "Say"
            raise UserError(
                meant or "which columns hold the input and the ideal output?",
                where=where,
                fix=f"{do} --input COLUMN --output COLUMN, or set data.input and data.output. {there}",
            )
        names = known
    names += [name for name in data.group_by if name not in names]
    for name in names:
        if header.count(name) != 1:
            what = "no column" if name not in header else "more than one column"
            why = ", which data.group_by names" if name in data.group_by else ""
            raise UserError(f'{what} named "{name}"{why}', where=where, fix=there)
    others = [name for name in header if name not in names and name not in data.drop_columns]
    # A CSV's cell holds no list of turns; of columns of one name, or of none, nobody could say which is which.
    kept = [name for name in others if name and header.count(name) == 1 and (nested or name != "history")]
    unused = list(dict.fromkeys(name or "(without a name)" for name in others if name not in kept))
    if unused:
        notes.append(f"{where.rsplit(':', 1)[0]}: columns that are not used: {', '.join(unused)}")
    ignored = [name for name in header if name in data.drop_columns]
    if ignored:
        notes.append(f"{where.rsplit(':', 1)[0]}: left out, as data.drop_columns says: {', '.join(ignored)}")
    return names, kept


def _known(header: Sequence[str], nested: bool) -> list[str] | None:
    for needed, also in _KNOWN_COLUMNS:
        lists = "history" in also or len(needed) == 2
        if set(needed) <= set(header) and (nested or lists):
            return [*needed, *(n for n in also if n in header and (nested or n != "history"))]
    return None


def delimiter_of(head: str, data: DataConfig) -> str:
    """The delimiter under which the first lines make the best table: with the config's columns, else most alike."""
    mapping = mapping_of(data)
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
    except csv.Error:  # told when the file is read, by its line
        pass
    return rows


def csv_rows(text: TextIO, path: Path, delimiter: str, data: DataConfig, notes: list[str]) -> Iterator[RawRow]:
    """The rows below the header; a line break inside quotes belongs to its field, blank lines are no rows.

    Raises:
        UserError: columns as in ``columns``; quotes that don't match, by file and line.
    """
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    places: dict[str, int] = {}
    used: list[str] = []
    start = 1
    try:
        for fields in reader:
            if header is None and fields:
                header = fields
                if any(escaped(name) is not None for name in header):
                    raise UserError("not UTF-8", where=f"{path}:{start}", fix="Save the file as UTF-8.")
                used, others = columns(header, f"{path}:{start}", data, notes, nested=False)
                places = {name: header.index(name) for name in (*used, *others)}
            elif header is not None and fields:
                yield RawRow(start, _csv_row(fields, len(header), places, used))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"not CSV that can be read from here on: {error}",
            where=f"{path}:{start}",
            fix='Text with a delimiter, a quote or a line break stands in quotes, and a quote in it is doubled: "".',
        ) from None


def _csv_row(fields: list[str], width: int, places: dict[str, int], used: Sequence[str]) -> dict[str, Any] | RowError:
    if len(fields) != width:
        return RowError("E107", f"{len(fields)} fields where the header has {width}")
    row = {name: fields[at] for name, at in places.items()}
    for name in used:
        if escaped(row[name]) is not None:
            return RowError("E101", "not UTF-8", (name,))
    return row


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn what Arrow finds wrong with a file into a UserError."""
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        raise UserError(f"not {what} that can be read: {error}", where=str(path)) from error


def parquet_rows(path: Path, data: DataConfig, notes: list[str], task: Task | None) -> Iterator[RawRow]:
    """The rows of a Parquet file; they are counted from 1, and null in an object is the same as absent.

    Raises:
        UserError: a damaged file, or columns as in ``columns``.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with _reading(path, "Parquet"), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        used, others = columns(schema.names, f"{path}:1", data, notes, nested=True)
        batches = file.iter_batches(_BATCH, columns=[*used, *others])
        yield from _arrow_rows(batches, schema, file.metadata.num_rows, path.stat().st_size, task)


def saved_rows(folder: Path, data: DataConfig, notes: list[str], task: Task | None) -> Iterator[RawRow]:
    """The rows of a folder that ``Dataset.save_to_disk`` wrote, counted from 1.

    Raises:
        UserError: a damaged folder, several splits, or columns as in ``columns``.
    """
    from datasets import DatasetDict, load_from_disk

    with _reading(folder, "a saved dataset"):
        try:
            saved = load_from_disk(str(folder))
        except Exception as error:  # whatever datasets' own code trips over in a damaged description
            raise UserError(f"not a saved dataset that can be read: {error!r}", where=str(folder)) from error
        if isinstance(saved, DatasetDict):
            splits = ", ".join(str(folder / name) for name in saved)
            fix = f"Name those you want: {splits}."
            raise UserError("a saved dataset of several splits", where=str(folder), fix=fix)
        used, others = columns(saved.column_names, f"{folder}:1", data, notes, nested=True)
        table = saved.select_columns([*used, *others]).with_format("arrow")
        batches = (batch for part in table.iter(_BATCH) for batch in part.to_batches())
        yield from _arrow_rows(batches, saved.features.arrow_schema, len(saved), source_size(folder), task)


def _arrow_rows(
    batches: Iterator[pa.RecordBatch], schema: pa.Schema, rows: int, size: int, task: Task | None
) -> Iterator[RawRow]:
    labels = _class_names(schema)
    number = told = 0
    for batch in batches:
        batch.validate(full=True)  # Arrow trusts offsets: in a damaged file they may point out of memory
        for row in batch.to_pylist():
            number += 1
            yield RawRow(number, {name: _plain(value, labels.get(name)) for name, value in row.items()})
        if task is not None:
            done = size * number // max(rows, 1)
            task.advance(done - told)
            told = done
    if task is not None and told < size:
        task.advance(size - told)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the texts of ``datasets.ClassLabel`` columns, which hold numbers."""
    described = (schema.metadata or {}).get(b"huggingface")
    if described is None:
        return {}
    features = json.loads(described).get("info", {}).get("features", {})
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _plain(value: Any, names: list[str] | None) -> Any:
    """The value without null keys of objects, which Arrow adds where other rows have one; a class by its name."""
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if isinstance(value, dict):
        return {key: _plain(inner, None) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_plain(inner, None) for inner in value]
    return value


def source_size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
