"""Rows whose answer a model wrote, as ``data generate`` and ``data from-documents`` write them.

Such a row is a chat with its provenance under the key ``generated``, and its passage under ``passage``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunewright.config import DataConfig
from tunewright.core.text import normalize

GENERATED = "generated"
"""The key of a row's provenance: an object that names the ``teacher``."""
PASSAGE = "passage"
"""The key of the passage that a row's answer is grounded in: an object with the ``document``'s digest."""
DOCUMENT_GROUP = "source_document"
"""The group of rows from one document, whatever data.group_by names."""

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
    """Return the settings for generated rows, which are chats whatever form the project's own files have."""
    return data.model_copy(update={"rows": None, "sheet": None, "input": None, "output": None, "group_by": ()})


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
