"""Files of pairs: JSON Lines, JSON arrays, CSV, Parquet and saved datasets, in the kinds of rows that people have."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.core.io import file_digest
from tunewright.core.progress import Task
from tunewright.core.wording import count_of
from tunewright.data.examples import Example
from tunewright.data.readers.metadata import MOST_CHARACTERS, counted, metadata_of
from tunewright.data.readers.row_errors import json_path
from tunewright.data.readers.schemas import conversation_of
from tunewright.data.readers.sources import check_mapping, open_source, require_columns
from tunewright.data.readers.tables import source_size
from tunewright.data.readers.validate import RowError, example_from_turns, groups_of

__all__ = [
    "Fault",
    "Reading",
    "SourceRow",
    "check_mapping",
    "fault_of",
    "read_pairs",
    "require_columns",
    "scan_pairs",
    "source_digest",
    "source_size",
]


@dataclass(frozen=True)
class SourceRow:
    """An example and where it was read.

    ``source`` is the file as the user named it, ``line`` the line (from 1) that the row starts at, in Parquet and saved
    datasets the number of the row (from 1), as it is for rows that data.rows makes and where several rows of a JSON
    document start on one line. ``groups`` has the row's
    values of the config's data.group_by, ``metadata`` those of keys that nothing uses.
    """

    example: Example
    source: str
    line: int
    groups: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """A row that is no example: why, as a stable code too (docs/formats.md), where in the row, and what to do."""

    source: str
    line: int
    reason: str
    code: str
    path: str
    """JSONPath from the row: ``$.messages[2].content``."""
    fix: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Reading:
    """All that one file holds: examples, faulty rows, and what the user should know besides."""

    rows: list[SourceRow]
    faults: list[Fault]
    notes: list[str]


def read_pairs(path: Path, data: DataConfig, task: Task | None = None) -> Reading:
    """Read a file of pairs, all of it into memory; arguments and errors are those of ``scan_pairs``."""
    reading = Reading([], [], [])
    for row in scan_pairs(path, data, reading.notes, task):
        if isinstance(row, Fault):
            reading.faults.append(row)
        else:
            reading.rows.append(row)
    return reading


def scan_pairs(path: Path, data: DataConfig, notes: list[str], task: Task | None = None) -> Iterator[SourceRow | Fault]:
    """The rows of a file of pairs one by one, faulty ones as such; a file of any length is read in little memory.

    Args:
        data: the config's names of columns and keys, its system turn and its limit of characters.
        notes: gets what the user should know: what kind of rows were found and why, encoding, keys that are not kept.
        task: advanced by the bytes that are read, ``source_size(path)`` in all.

    Raises:
        UserError: the file as a whole cannot be read: missing, empty, of another kind or encoding, a column that is
            not there, JSON or CSV that breaks off, a config's template or JMESPath that is none.
    """
    source = open_source(path, data, notes, task)
    kinds: Counter[tuple[str, str]] = Counter()
    left_out: Counter[str] = Counter()
    ignored: set[str] = set()
    count = 0
    for line, row, above, parent in source.rows:
        count += 1
        try:
            if isinstance(row, RowError):
                raise row
            ignored.update(row.keys() & data.drop_columns)
            conversation = conversation_of(row, data, above, parent)
            kinds[conversation.kind, conversation.reason] += 1
            example = example_from_turns(conversation.turns, data)
            metadata, too_long = metadata_of(row, conversation, data)
            left_out.update(too_long)
            yield SourceRow(example, str(path), line, groups_of(row, data, parent), metadata)
        except RowError as fault:
            yield fault_of(fault, path, line)
    if not count:
        raise UserError("the file is empty: there is no row in it", where=str(path))
    notes.extend(_told(path, source.kind, kinds))
    if left_out:
        what = f"no text or number, or longer than {MOST_CHARACTERS:,} characters"
        notes.append(f"{path}: not kept as metadata, because a value is {what}: {counted(left_out)}")
    if ignored:
        names = ", ".join(name for name in data.drop_columns if name in ignored)
        notes.append(f"{path}: left out, as data.drop_columns says: {names}")


def _told(path: Path, container: str, kinds: Counter[tuple[str, str]]) -> Iterator[str]:
    for (kind, reason), count in kinds.most_common():
        of = f"{count_of(count, 'row')} of " if len(kinds) > 1 else ""
        yield f"{path}: {container}: {of}{kind}, since {reason}"


def fault_of(error: RowError, path: Path, line: int) -> Fault:
    """Return the fault that an error makes of a file's row."""
    return Fault(str(path), line, str(error), error.code, json_path(error.path), error.fix)


def source_digest(path: Path) -> str:
    """SHA-256 (64 hex digits) of a file, or of the names and digests of all files below a folder."""
    if path.is_file():
        return file_digest(path)
    whole: Any = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            whole.update(f"{file.relative_to(path).as_posix()}\0{file_digest(file)}\n".encode())
    return str(whole.hexdigest())
