"""Rows in tables: the choice of columns, CSV with one of the common delimiters, Parquet and saved datasets."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import Task
from tunewright.data.readers.encodings import escaped
from tunewright.data.readers.json_rows import LONGEST_ROW, RawRow
from tunewright.data.readers.mapping import pair_mapping
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.schemas import nearest_known_key

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    from numpy.typing import NDArray

_BATCH = 1024
_PARQUET_BATCH = 1 << 16  # rows; each batch repeats the dictionary of its row group, so small batches are slow
_BATCH_BYTES = 256 << 20  # limit of a batch, on average within a row group
_ROW_BYTES = 64 << 20  # limit of one row, and of the rows that are Python objects at one time
_OBJECT_BYTES = 64  # overhead of a value in a list or object, besides its text

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


def columns(
    header: Sequence[str], where: str, data: DataConfig, notes: list[str], *, nested: bool
) -> tuple[list[str], list[str]]:
    """Return the columns used for input, output and groups, and the other columns to keep as metadata."""
    there = f"Columns: {', '.join(header)}"
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
            raise UserError(
                f"Unknown column {meant}" if meant else "Unknown columns for the input and the ideal output",
                where=where,
                fix=f"{do} --input COLUMN --output COLUMN, or set data.input and data.output. {there}",
            )
        names = known
    # A file with a split of its own may lack the column.
    split = [name for name in (data.split_column,) if name in header]
    names += [name for name in (*data.group_by, *split) if name is not None and name not in names]
    counts, given = Counter(header), set(names)
    for name in names:
        if counts[name] != 1:
            what = "no column" if name not in header else "more than one column"
            why = " (data.group_by)" if name in data.group_by else ""
            raise UserError(f'{what} named "{name}"{why}', where=where, fix=there)
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


DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_CSV_FIELD_LIMIT = 2**31 - 1  # Python's default limit of 131,072 characters would apply before data.max_characters
_SNIFFED = 50  # rows that decide the delimiter


def delimiter_of(head: str, data: DataConfig) -> str:
    """Return the delimiter that gives the config's columns, else the most regular table, in the first lines."""
    mapping = pair_mapping(data)
    best, best_score = ",", (False, 0.0, 0)
    for delimiter in DELIMITERS:
        rows = _parse_head(head, delimiter)
        if not rows or len(rows[0]) < 2:
            continue
        header = rows[0]
        named = mapping is not None and mapping.keys <= set(header)
        alike = sum(len(row) == len(header) for row in rows) / len(rows)
        score = (named, alike, len(header))
        if score > best_score:
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


def csv_rows(text: TextIO, path: Path, delimiter: str, data: DataConfig, notes: list[str]) -> Iterator[RawRow]:
    """Yield the rows below the header; line breaks in quotes belong to the field, and blank lines are skipped."""
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


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Convert Arrow's errors into UserErrors."""
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except MemoryError:  # Arrow's own class is also an ArrowException
        raise UserError(f"Not enough memory to read the file as {what}", where=str(path)) from None
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        raise UserError(f"Unreadable as {what}: {error}", where=str(path)) from error


def parquet_rows(path: Path, data: DataConfig, notes: list[str], task: Task | None) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file, numbered from 1; null in an object counts as absent."""
    import pyarrow.parquet as pq

    with _reading(path, "Parquet"), pq.ParquetFile(path) as plain:
        schema, metadata = plain.schema_arrow, plain.metadata
        used, others = columns(schema.names, f"{path}:1", data, notes, nested=True)
        # Texts stay in their dictionaries: a file of a kilobyte can repeat a long one in a million rows.
        with pq.ParquetFile(path, metadata=metadata, read_dictionary=_text_columns(metadata)) as file:
            batches = _parquet_batches(file, [*used, *others])
            yield from _arrow_rows(batches, schema, metadata.num_rows, path.stat().st_size, task)


def _parquet_batches(file: pq.ParquetFile, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for group in range(file.metadata.num_row_groups):
        # Where a column's description is damaged, Arrow raises when it reads a row, but ends the process when it is
        # asked for the description (pyarrow 26).
        next(file.iter_batches(1, row_groups=[group], columns=names), None)
        rows = _rows_per_batch(file.metadata, group, names)
        yield from file.iter_batches(rows, row_groups=[group], columns=names)


def _text_columns(metadata: Any) -> list[str]:
    columns = map(metadata.schema.column, range(metadata.num_columns))
    return [
        column.path
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type in ("STRING", "JSON", "ENUM", "NONE")
    ]


def _rows_per_batch(metadata: Any, group: int, names: Sequence[str]) -> int:
    """Return how many rows of a Parquet row group to read at once, by the bytes that these columns can take."""
    described = metadata.row_group(group)
    size = 0.0  # a row's size: pages as stored, in which a dictionary counts once (as in memory)
    for number in range(metadata.num_columns):
        path = metadata.schema.column(number).path
        if not any(path == name or path.startswith(f"{name}.") for name in names):
            continue
        column, width = described.column(number), metadata.schema.column(number).length
        size += column.total_uncompressed_size / max(described.num_rows, 1)
        if width > 0:
            size += width * column.num_values / max(described.num_rows, 1)
        if "DELTA_BYTE_ARRAY" in column.encodings:  # a value may repeat the one before it in a few bytes
            size += column.total_uncompressed_size
    return max(1, min(_PARQUET_BATCH, int(_BATCH_BYTES / max(size, 1))))


def saved_rows(folder: Path, data: DataConfig, notes: list[str], task: Task | None) -> Iterator[RawRow]:
    """Yield the rows of a folder that ``Dataset.save_to_disk`` wrote, counted from 1."""
    from datasets import DatasetDict, load_from_disk

    with _reading(folder, "a saved dataset"):
        try:
            saved = load_from_disk(str(folder))
        except Exception as error:  # a damaged description can raise anything in datasets' code
            raise UserError(f"Unreadable as a saved dataset: {error!r}", where=str(folder)) from error
        if isinstance(saved, DatasetDict):
            splits = ", ".join(str(folder / name) for name in saved)
            fix = f"Name one or more of them: {splits}."
            raise UserError("The saved dataset has several splits", where=str(folder), fix=fix)
        used, others = columns(saved.column_names, f"{folder}:1", data, notes, nested=True)
        table = saved.select_columns([*used, *others]).with_format("arrow")
        batches = (batch for part in table.iter(_BATCH) for batch in part.to_batches())
        yield from _arrow_rows(batches, saved.features.arrow_schema, len(saved), source_size(folder), task)


def _arrow_rows(
    batches: Iterator[pa.RecordBatch], schema: pa.Schema, rows: int, size: int, task: Task | None
) -> Iterator[RawRow]:
    import pyarrow as pa

    labels = _class_names(schema)
    number = reported = 0
    for batch in batches:
        batch.validate(full=True)  # Arrow trusts offsets, which may point out of memory in a damaged file
        for part in _parts(batch):
            if isinstance(part, RowError):
                number += 1
                yield RawRow(number, part)
                continue
            fields = [schema.field(name) for name in part.schema.names]
            for row in part.cast(pa.schema(fields)).to_pylist():
                number += 1
                yield RawRow(number, {name: _plain(value, labels.get(name)) for name, value in row.items()})
        if task is not None:
            done = size * number // max(rows, 1)
            task.advance(done - reported)
            reported = done
    if task is not None and reported < size:
        task.advance(size - reported)


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch | RowError]:
    """Yield slices of at most ``_ROW_BYTES`` and ``_BATCH`` rows, and an error for each row above it."""
    import numpy as np

    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        sizes += _value_sizes(column)
    start, total = 0, 0
    for end, size in enumerate(sizes.tolist()):
        if end > start and (total + size > _ROW_BYTES or end - start == _BATCH):
            yield _slice(batch, start, end)
            start, total = end, 0
        total += size
        if size > _ROW_BYTES:
            yield RowError("E108", f"the row takes {size:,} bytes (limit {_ROW_BYTES:,})")
            start, total = end + 1, 0
    if start < batch.num_rows:
        yield _slice(batch, start, batch.num_rows)


def _slice(batch: pa.RecordBatch, start: int, end: int) -> pa.RecordBatch:
    """Return a copy of some rows: a cast of a view would convert all values of the batch's lists."""
    import numpy as np

    return batch.take(np.arange(start, end))


def _value_sizes(array: pa.Array) -> NDArray[np.int64]:
    """Return the bytes of each value of an array, with every text counted where it is used."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = np.append(_value_sizes(array.dictionary), 0)
        return np.asarray(lengths[array.indices.cast(pa.int64()).fill_null(len(lengths) - 1).to_numpy()])
    sizes = np.full(len(array), _OBJECT_BYTES, np.int64)
    if pa.types.is_struct(kind):
        for field in array.flatten():
            sizes += _value_sizes(field)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        values = (
            _value_sizes(array.keys) + _value_sizes(array.items)
            if pa.types.is_map(kind)
            else _value_sizes(array.values)
        )
        before = np.concatenate(([0], np.cumsum(values)))
        offsets = array.offsets.to_numpy()
        sizes += before[offsets[1:]] - before[offsets[:-1]]
    elif pa.types.is_fixed_size_list(kind):
        values = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        sizes += _value_sizes(values).reshape(len(array), kind.list_size).sum(axis=1)
    elif pa.types.is_fixed_size_binary(kind):
        sizes += kind.byte_width
    elif (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    ):
        sizes += pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    return sizes


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of ``datasets.ClassLabel`` columns, whose values are numbers."""
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
    """Return the value with class names, and without the null keys that Arrow adds to objects."""
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if isinstance(value, dict):
        return {key: _plain(inner, None) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_plain(inner, None) for inner in value]
    return value


def source_size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
