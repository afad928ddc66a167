"""Keys of a row that no turn or group uses: kept with the row, alike from every kind of file."""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from tunewright.config import DataConfig
from tunewright.data.readers.schemas import Conversation

MOST_CHARACTERS = 1_000
"""Of a value as JSON: a longer one is a text of its own, and would make a version's files heavy in git."""

_MOST_KEYS = 12  # named in one line
_ABSENT = (None, "")  # a table has an empty cell or null where JSON has no key


def metadata_of(
    row: Mapping[str, Any], conversation: Conversation, data: DataConfig
) -> tuple[dict[str, Any], list[str]]:
    """Return the row's other keys with values that JSON holds, and the keys whose value cannot be kept.

    Null and empty values are absent. A value is not kept if it is longer than ``MOST_CHARACTERS``, binary, or no text.
    """
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    if row.keys() <= conversation.keys:
        return kept, left_out
    for key, given in row.items():
        if key in conversation.keys or key in data.group_by or key in data.drop_columns:
            continue
        try:
            value = _plain(given)
            text = json.dumps({key: value}, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (ValueError, TypeError, RecursionError):
            left_out.append(key)
            continue
        if value in _ABSENT:
            continue
        if len(text) > MOST_CHARACTERS:
            left_out.append(key)
        else:
            kept[key] = value
    return kept, left_out


def _plain(value: Any) -> Any:
    """Return the value as JSON has it; what JSON has no form for raises TypeError or ValueError when it is written."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, float) and math.isnan(value):
        return None  # what tables write where a number is missing
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def counted(keys: Counter[str]) -> str:
    """Keys with how many rows have each: ``id (8,776 rows), source (12)``."""
    unit = " rows"
    parts = []
    for key, count in keys.most_common(_MOST_KEYS):
        parts.append(f"{key} ({count:,}{unit if count != 1 else ' row'})")
        unit = ""
    more = f" and {len(keys) - _MOST_KEYS:,} more keys" if len(keys) > _MOST_KEYS else ""
    return ", ".join(parts) + more


def texts_of(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Yield all texts and numbers in a value of metadata, and the keys of its objects, for a scan for secrets.

    Each comes after the nearest key above it, or ``name``: a password often looks like one only after its key.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield "", str(key)
            yield from texts_of(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner, name)
    elif not isinstance(value, bool):
        yield name, str(value)
