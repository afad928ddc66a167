"""JSON with one meaning: duplicate keys, NaN and Infinity are errors (RFC 7493).

Python's own parser takes the last of equal keys, where others take the first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn


class DuplicateKeyError(ValueError):
    """An object has a key twice."""


class ConstantError(ValueError):
    """NaN or Infinity is in the place of a number."""


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        DuplicateKeyError: a key is repeated.
        ConstantError: NaN or Infinity.
        ValueError: not JSON, a number of too many digits, or nested too deep.
    """
    try:
        return strict_decoder.decode(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def repeated_key(pairs: Iterable[tuple[str, Any]]) -> str:
    """Return the first key that a later pair repeats. One of them must."""
    counts = Counter(key for key, _ in pairs)
    return next(key for key, count in counts.items() if count > 1)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DuplicateKeyError(f'duplicate key "{repeated_key(pairs)}"')
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ConstantError(f"{name} is not JSON")


strict_decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
"""Raises the errors of :func:`parse_json`, and RecursionError for deep nesting."""
