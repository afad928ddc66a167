"""The rows of all dataset versions, as plain text that git can show: dataset/rows/AB.jsonl.

AB are the first two digits of the pair key. A line is ``{"key": ..., "messages": [...]}``, lines are sorted by key, and
a file only ever gains rows, so every version can be read at any time, after a crash too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from tunewright.data.checks import RowError, parse_json_row
from tunewright.data.examples import Example
from tunewright.disk import canonical_json, write_text
from tunewright.errors import UserError
from tunewright.progress import Reporter

_RESTORE = "Restore the file, from git for example."


def write_rows(folder: Path, examples: Mapping[str, Example], reporter: Reporter) -> None:
    """Add examples, by pair key; files that have them all are left alone."""
    shards: dict[str, dict[str, Example]] = defaultdict(dict)
    for key, example in examples.items():
        shards[key[:2]][key] = example
    with reporter.task("saving rows", len(shards), "files") as task:
        for prefix, rows in sorted(shards.items()):
            path = folder / f"{prefix}.jsonl"
            there = _read_shard(path) if path.exists() else {}
            if rows.keys() - there.keys():
                lines = [
                    canonical_json({"key": key, "messages": [m.as_dict() for m in example.messages]})
                    for key, example in sorted((rows | there).items())
                ]
                write_text(path, "\n".join(lines) + "\n")
            task.advance()


def read_rows(folder: Path, keys: Iterable[str]) -> dict[str, Example]:
    """The examples of these pair keys, each checked against its key.

    Raises:
        UserError: naming file and key: a row is missing, or is not what its key says.
    """
    wanted: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        wanted[key[:2]].add(key)
    found: dict[str, Example] = {}
    for prefix, mine in sorted(wanted.items()):
        path = folder / f"{prefix}.jsonl"
        if not path.is_file():
            raise UserError("rows of the dataset are missing: no such file", where=str(path), fix=_RESTORE)
        shard = _read_shard(path)
        lost = sorted(mine - shard.keys())
        if lost:
            raise UserError(f"the row {lost[0]} is missing", where=str(path), fix=_RESTORE)
        found |= {key: shard[key] for key in mine}
    return found


def _read_shard(path: Path) -> dict[str, Example]:
    rows: dict[str, Example] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            row = parse_json_row(line)
            key, example = row["key"], Example.from_dicts(row["messages"])
            actual = example.pair_key
        except (RowError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"not a row of a dataset ({error})", where=where, fix=_RESTORE) from None
        if actual != key:
            raise UserError(
                f"the row {json.dumps(key)} was changed: its text has the key {actual}",
                where=where,
                fix=f"{_RESTORE} To change an example, add the new pair as a row of a file.",
            )
        rows[key] = example
    return rows
