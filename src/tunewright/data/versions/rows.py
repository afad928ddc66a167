"""The rows of all dataset versions, as plain text that git can show: dataset/rows/AB.jsonl.

AB are the first two digits of the pair key. A line is ``{"key": ..., "messages": [...]}`` and lines are sorted by key.
Except for purges, files only gain rows, so that every version can be read at any time, also after a crash.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, write_text
from tunewright.core.progress import Reporter
from tunewright.data.examples import Example
from tunewright.data.readers.json_rows import parse_json_row
from tunewright.data.readers.row_errors import RowError

_RESTORE = "Restore the file, from git for example."
_KEY = re.compile(rb'"key":"([0-9a-f]{64})"')


@dataclass(frozen=True)
class Row:
    """A valid line of a file of rows; ``line`` counts from 1."""

    line: int
    key: str
    example: Example


@dataclass(frozen=True)
class BadRow:
    """An invalid line: the reason, and the keys that it states or that its text has."""

    line: int
    keys: tuple[str, ...]
    reason: str
    fix: str = _RESTORE


def row_line(key: str, example: Example) -> str:
    """Return the line of a row, without the line break."""
    return canonical_json({"key": key, "messages": [m.as_dict() for m in example.messages]})


def rows_text(examples: Mapping[str, Example]) -> str:
    """Return the content of a file of rows, sorted by pair key."""
    return "".join(row_line(key, example) + "\n" for key, example in sorted(examples.items()))


def scan_rows(data: bytes) -> Iterator[Row | BadRow]:
    """Yield every line of a file of rows, each checked against its key and its spelling."""
    for number, line in enumerate(data.splitlines(), start=1):
        claimed = tuple(key.decode() for key in _KEY.findall(line))
        try:
            row = parse_json_row(line)
            key, example = row["key"], Example.from_dicts(row["messages"])
            actual = example.pair_key
            spelled = row_line(key, example).encode()
        # ValueError: half a surrogate pair, which no encoding represents
        except (RowError, KeyError, TypeError, AttributeError, ValueError) as error:
            yield BadRow(number, claimed, f"Not a row of a dataset ({error})")
            continue
        if actual != key:
            keys = tuple(sorted({*claimed, actual}))
            reason = f"The row {json.dumps(key)} was changed: its text has the key {actual}"
            yield BadRow(number, keys, reason, f"{_RESTORE} To change an example, add the new pair as a row of a file.")
        elif spelled != line:
            yield BadRow(number, (key,), f"The row {json.dumps(key)} was changed: it was written in another spelling")
        else:
            yield Row(number, key, example)


def parse_rows(data: bytes, where: str) -> dict[str, Example]:
    """Return the examples in a file of rows, by pair key; ``where`` names the file in errors."""
    rows: dict[str, Example] = {}
    for row in scan_rows(data):
        if isinstance(row, BadRow):
            raise UserError(row.reason, where=f"{where}:{row.line}", fix=row.fix)
        rows[row.key] = row.example
    return rows


def _shards(folder: Path, keys: Iterable[str]) -> list[tuple[Path, set[str]]]:
    """Return the files that have, or would have, the rows of these pair keys, in order."""
    found: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        found[key[:2]].add(key)
    return [(folder / f"{prefix}.jsonl", mine) for prefix, mine in sorted(found.items())]


def write_rows(folder: Path, examples: Mapping[str, Example], reporter: Reporter) -> None:
    """Add examples by pair key; files that have them all are not rewritten."""
    shards = _shards(folder, examples)
    with reporter.task("saving rows", len(shards), "files") as task:
        for path, keys in shards:
            rows = {key: examples[key] for key in keys}
            there = parse_rows(path.read_bytes(), str(path)) if path.exists() else {}
            if rows.keys() - there.keys():
                write_text(path, rows_text(rows | there))
            task.advance()


def has_rows(folder: Path, keys: Iterable[str]) -> set[str]:
    """Return the pair keys that have a row in the files."""
    found: set[str] = set()
    for path, wanted in _shards(folder, keys):
        if path.is_file():
            found |= wanted & {key.decode() for key in _KEY.findall(path.read_bytes())}
    return found


def remove_rows(folder: Path, keys: Iterable[str]) -> None:
    """Remove rows that no version needs; missing ones are ignored."""
    for path, gone in _shards(folder, keys):
        there = parse_rows(path.read_bytes(), str(path)) if path.exists() else {}
        if gone & there.keys():
            kept = {key: example for key, example in there.items() if key not in gone}
            if kept:
                write_text(path, rows_text(kept))
            else:
                path.unlink()


def read_rows(folder: Path, keys: Iterable[str]) -> dict[str, Example]:
    """Return the examples of these pair keys, each checked against its key."""
    found: dict[str, Example] = {}
    for path, mine in _shards(folder, keys):
        if not path.is_file():
            raise UserError("Rows of the dataset are missing: the file does not exist", where=str(path), fix=_RESTORE)
        shard = parse_rows(path.read_bytes(), str(path))
        lost = sorted(mine - shard.keys())
        if lost:
            raise UserError(f"The row {lost[0]} is missing", where=str(path), fix=_RESTORE)
        found |= {key: shard[key] for key in mine}
    return found
