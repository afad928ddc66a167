"""Where a version's rows came from: the file and line of each, and the metadata that its file had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunewright.core.io import text_lines
from tunewright.data.review.edits import replaced
from tunewright.data.versions import Manifest, import_files

_PRESENT = ("added", "known", "mixed", "replaced")
"""What imports.jsonl says of rows that are in the version; a duplicate's file and metadata are those of another row."""


def places_by_key(dataset: Path, manifest: Manifest) -> dict[str, str]:
    """Return ``FILE:LINE`` of the row that first brought each pair key in; an edited row has that of the row it was."""
    places: dict[str, str] = {}
    for key, record in _records(dataset, manifest):
        places[key] = f"{record['source']}:{record['line']}"  # the newest first: the oldest stays
    return places


def metadata_by_key(dataset: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return the newest metadata of each pair key whose file had any."""
    found: dict[str, dict[str, Any]] = {}
    for key, record in _records(dataset, manifest):
        if "metadata" in record:
            found.setdefault(key, record["metadata"])
    return found


def read_metadata(dataset: Path, manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    """Return the metadata of each pair key, by the newest record of each place; exact repeats of the row included."""
    found: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
    edits = replaced(dataset, manifest)
    for path in import_files(dataset, manifest):
        for line in text_lines(path.read_text(encoding="utf-8")):
            record: dict[str, Any] = json.loads(line)
            there = record["fate"] in _PRESENT or (record["fate"] == "duplicate" and record["of"] == record["key"])
            if there and "metadata" in record:
                key = edits.get(record["key"], record["key"])
                found.setdefault((record["source"], record["line"]), (key, record["metadata"]))
    by_key: dict[str, list[dict[str, Any]]] = {}
    for key, metadata in found.values():
        by_key.setdefault(key, []).append(metadata)
    return by_key


def _records(dataset: Path, manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    edits = replaced(dataset, manifest)
    for path in import_files(dataset, manifest):
        for line in text_lines(path.read_text(encoding="utf-8")):
            record: dict[str, Any] = json.loads(line)
            if record["fate"] in _PRESENT and "key" in record:
                yield edits.get(record["key"], record["key"]), record
