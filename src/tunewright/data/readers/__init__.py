"""Files of pairs: JSON Lines, JSON arrays, CSV, Parquet and saved datasets, with rows of several formats."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunewright.config import DataConfig, Split
from tunewright.core.errors import UserError
from tunewright.core.io import file_digest
from tunewright.core.progress import LogTask, Task
from tunewright.core.text import count_of, normalize
from tunewright.core.workers import THIS_PROCESS, Workers
from tunewright.data.examples import Example, RowFile
from tunewright.data.readers.json_rows import RawRow
from tunewright.data.readers.row_errors import RowError, json_path
from tunewright.data.readers.schemas import parse_conversation
from tunewright.data.readers.sources import check_mapping as check_mapping
from tunewright.data.readers.sources import first_values, open_source, shown_columns
from tunewright.data.readers.sources import require_columns as require_columns
from tunewright.data.readers.tables import ColumnsError
from tunewright.data.readers.tables import source_size as source_size
from tunewright.data.readers.validate import (
    MOST_CHARACTERS,
    counted,
    example_from_turns,
    groups_of,
    metadata_of,
    split_of,
)

_ROWS = 2_000  # rows that a worker checks at once
_UNMAPPED = {"E103", "E201", "E207"}  # faults of rows whose keys or places do not say which are the pair's


NO_VALUES: Mapping[str, Any] = {}
"""The groups or metadata of rows that have none: one object, because an empty dict for each row takes 64 bytes."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """An example with its place in a file.

    ``source`` is the file as the user named it, in a workbook with ``:SHEET``. ``line`` (from 1) is the line
    where the row starts; it is the number of the row if there are no lines (Parquet, workbooks, saved
    datasets, rows created by data.rows), or if rows share a line. ``groups`` has the row's values of
    data.group_by, ``metadata`` the values of unused keys. ``generated`` is true if a model wrote the answer. ``split``
    is the split that its column or its file gives it.
    """

    example: Example
    source: str
    line: int
    groups: Mapping[str, str] = field(default_factory=lambda: NO_VALUES)
    metadata: Mapping[str, Any] = field(default_factory=lambda: NO_VALUES)
    generated: bool = False
    split: Split | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return SourceRow, (self.example, self.source, self.line, self.groups, self.metadata, self.generated, self.split)

    def stored(self, file: RowFile) -> SourceRow:
        """Return the row with its turns in a file."""
        return replace(self, example=file.stored(self.example))


@dataclass(frozen=True)
class Fault:
    """An invalid row: reason, stable code (the reference, "Row errors"), place in the row, and fix."""

    source: str
    line: int
    reason: str
    code: str
    path: str
    """JSONPath from the row: ``$.messages[2].content``."""
    fix: str
    column: str | None = None
    """The column, if the row is one of a table."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class ReadResult:
    """Content of one file: examples, faults, and notes for the user."""

    rows: list[SourceRow]
    faults: list[Fault]
    notes: list[str]

    @property
    def source(self) -> str:
        """The ``source`` of every row and fault."""
        return self.rows[0].source if self.rows else self.faults[0].source


def read_pairs(
    path: Path,
    data: DataConfig,
    task: Task | None = None,
    workers: Workers = THIS_PROCESS,
    split: Split | None = None,
) -> ReadResult:
    """Read a file of pairs as ``scan_pairs`` does. The rows' turns are in a ``RowFile``."""
    reading, file = ReadResult([], [], []), RowFile()
    for row in scan_pairs(path, data, reading.notes, task, workers, split):
        if isinstance(row, Fault):
            reading.faults.append(row)
        else:
            reading.rows.append(row.stored(file))
    return reading


def scan_pairs(
    path: Path,
    data: DataConfig,
    notes: list[str],
    task: Task | None = None,
    workers: Workers = THIS_PROCESS,
    split: Split | None = None,
) -> Iterator[SourceRow | Fault]:
    """Yield the rows of a file of pairs, faulty ones as ``Fault``, with memory independent of the file's length.

    ``notes`` receives notes for the user: the format of the rows and the reason, encoding, dropped keys. ``task`` is
    advanced by the bytes read, ``source_size(path)`` in total. ``workers`` check the rows; the file is read here.
    ``split`` is the split that the file is given to.
    """
    chats = unmapped(data)
    source = open_source(path, chats if has_generated_rows(path) else data, notes, task)
    kinds: Counter[tuple[str, str]] = Counter()
    left_out: Counter[str] = Counter()
    ignored: set[str] = set()
    count = 0
    settings = _Settings(source.name, data, chats, split, source.table)
    try:
        for parsed in workers.map(_check_row, settings, source.rows, LogTask(), _ROWS):
            count += 1
            ignored.update(parsed.ignored)
            left_out.update(parsed.too_long)
            if parsed.kind is not None:
                kinds[parsed.kind] += 1
            row = parsed.row
            # The fix of the first of many equal faults is shown. A misspelled key needs no columns.
            if count == 1 and isinstance(row, Fault) and row.code in _UNMAPPED and "did you mean" not in row.reason:
                columns = _columns(path, data)
                row = replace(row, fix=f"{row.fix} Columns: {columns}" if columns else row.fix)
            yield row
    except ColumnsError as error:
        columns = _columns(path, data)
        raise ColumnsError(error.what, where=error.where, do=error.do, columns=columns) if columns else error from None
    if not count:
        fix = f"data.header_row is {data.header_row}." if source.table and data.header_row else None
        raise UserError("The file has no rows", where=str(path), fix=fix)
    for (kind, reason), number in kinds.most_common():
        of = f"{count_of(number, 'row')} of " if len(kinds) > 1 else ""
        notes.append(f"{path}: {source.kind}: {of}{kind}, because {reason}")
    if left_out:
        what = f"not text or a number, or longer than {MOST_CHARACTERS:,} characters"
        notes.append(f"{path}: not kept as metadata, because values are {what}: {counted(left_out)}")
    if ignored:
        names = ", ".join(name for name in data.drop_columns if name in ignored)
        notes.append(f"{path}: dropped by data.drop_columns: {names}")


def _columns(path: Path, data: DataConfig) -> str:
    """Return the columns of a file with their first values; empty if they cannot be read, as with repeated names."""
    try:
        return shown_columns(first_values(path, data))
    except UserError:
        return ""


@dataclass(frozen=True)
class _Settings:
    """Settings for a file's rows: its name, the settings for most rows and for generated rows, and the split.

    Rows of a ``table`` have columns.
    """

    name: str
    data: DataConfig
    chats: DataConfig
    split: Split | None
    table: bool


@dataclass
class _CheckedRow:
    """A row or its fault; its format with the reason, and keys ignored or too long for metadata, for the notes."""

    row: SourceRow | Fault
    kind: tuple[str, str] | None = None
    ignored: frozenset[str] = frozenset()
    too_long: Sequence[str] = ()


def _check_row(settings: _Settings, raw: RawRow, _task: Task) -> _CheckedRow:
    """Check one row."""
    line, row, above, parent = raw
    data = settings.data
    ignored: frozenset[str] = frozenset()
    kind, too_long = None, list[str]()
    try:
        if isinstance(row, RowError):
            raise row
        generated = is_generated(row)
        own = settings.chats if generated else data
        split = split_of(row, own, settings.split)
        if generated and split in ("dev", "test"):
            raise RowError("E210", f"a model wrote the answer, so the row cannot be given to {split}")
        if data.split_column in row:
            row = {key: value for key, value in row.items() if key != data.split_column}
        ignored = frozenset(row.keys() & data.drop_columns)
        conversation = parse_conversation(row, own, above, parent)
        kind = (conversation.kind, conversation.reason)
        example = example_from_turns(conversation.turns, own, conversation.tools)
        metadata, too_long = metadata_of(row, conversation, data)
        groups = generated_groups(row, data) if generated else groups_of(row, data, parent)
        row_read = SourceRow(
            example, settings.name, line, groups or NO_VALUES, metadata or NO_VALUES, generated=generated, split=split
        )
        return _CheckedRow(row_read, kind, ignored, too_long)
    except RowError as fault:
        column = str(fault.path[0]) if settings.table and fault.path else None
        return _CheckedRow(replace(fault_of(fault, settings.name, line), column=column), kind, ignored, too_long)


def fault_of(error: RowError, source: str, line: int) -> Fault:
    """Return an error of a row as a fault of its file."""
    return Fault(source, line, str(error), error.code, json_path(error.path), error.fix)


def source_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and digests of all files below a folder."""
    if path.is_file():
        return file_digest(path)
    whole: Any = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            whole.update(f"{file.relative_to(path).as_posix()}\0{file_digest(file)}\n".encode())
    return str(whole.hexdigest())


GENERATED = "generated"
"""The key of a row's provenance: an object that names the ``teacher``."""
PASSAGE = "passage"
"""The key of the passage that a row's answer is grounded in: an object with the ``document``'s digest."""
DOCUMENT_GROUP = "source_document"
"""The group of rows from one document, regardless of data.group_by."""

_HEAD = 1 << 20  # characters


def is_generated(row: object) -> bool:
    """Return whether a row has the provenance of a generated one."""
    return isinstance(row, Mapping) and isinstance(row.get(GENERATED), Mapping) and "teacher" in row[GENERATED]


def has_generated_rows(path: Path) -> bool:
    """Return whether a file's first line is a generated row."""
    if not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8") as file:
            # A JSON array of all rows may be one line.
            if file.read(1) != "{":
                return False
            file.seek(0)
            return is_generated(json.loads(file.readline(_HEAD)))
    except (OSError, ValueError, RecursionError):
        return False


def unmapped(data: DataConfig) -> DataConfig:
    """Return the settings for generated rows, which are chats regardless of the form of the project's own files."""
    own = {"rows": None, "sheet": None, "input": None, "output": None, "group_by": (), "split_column": None}
    return data.model_copy(update=own)


def generated_groups(row: Mapping[str, Any], data: DataConfig) -> dict[str, str]:
    """Return a generated row's values of data.group_by, as far as it has them, and its document."""
    groups = {
        name: normalize(str(row[name]))
        for name in data.group_by
        if isinstance(row.get(name), str | int) and not isinstance(row[name], bool) and row[name] != ""
    }
    passage = row.get(PASSAGE)
    if isinstance(passage, Mapping) and isinstance(passage.get("document"), str):
        groups[DOCUMENT_GROUP] = normalize(passage["document"])
    return groups
