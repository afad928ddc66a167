"""Suffixes of files of pairs, which decide where nothing else does: in a folder, in a dataset of the hub."""

from __future__ import annotations

from pathlib import PurePath

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".tab", ".psv")
OTHER_SUFFIXES = (".parquet", ".xlsx")
_COMPRESSED = (".gz", ".zst")


def plain_suffix(path: PurePath) -> str:
    """Return the last suffix in lower case, without that of a compression."""
    name = path.name.lower()
    for compressed in _COMPRESSED:
        name = name.removesuffix(compressed)
    return PurePath(name).suffix


def has_known_suffix(path: PurePath) -> bool:
    """Return whether a file of a folder is read; one that is named directly may have any suffix."""
    return plain_suffix(path) in TEXT_SUFFIXES or path.suffix.lower() in OTHER_SUFFIXES
