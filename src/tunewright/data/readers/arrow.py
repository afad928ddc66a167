"""Rows in Arrow's tables: Parquet files, and datasets that ``Dataset.save_to_disk`` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import Task
from tunewright.data.readers.json_rows import RawRow
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.tables import columns, source_size

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
