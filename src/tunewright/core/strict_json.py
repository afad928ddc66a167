"""JSON with one meaning: duplicate keys, NaN and Infinity are errors (RFC 7493).

Python's own parser takes the last of equal keys, but others the first; here only :func:`standard_json` does so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

from tunewright.core.errors import UserError

_DEEPEST = 32
"""Nesting limit of an adapter's documents: a lineage has 7 levels."""


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


def standard_json(text: str) -> Any:
    """Return the value of a JSON text (RFC 8259): the last of equal keys counts, and NaN is refused."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None


def repeated_key(pairs: Iterable[tuple[str, Any]]) -> str:
    """Return the first key that a later pair repeats. One of them must repeat a key."""
    counts = Counter(key for key, _ in pairs)
    return next(key for key, count in counts.items() if count > 1)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise DuplicateKeyError(f'duplicate key "{repeated_key(pairs)}"')
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ConstantError(f"{name} is not JSON")


strict_decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
"""Raises the errors of :func:`parse_json`, and RecursionError for deep nesting."""


def strict_json(data: bytes, where: str) -> Any:
    """Parse the UTF-8 JSON of a file."""
    try:
        value = strict_decoder.decode(data.decode("utf-8"))
        require_shallow(value, _DEEPEST)
    except UnicodeDecodeError as error:
        raise UserError(f"Not UTF-8 at byte {error.start:,}", where=where) from None
    except RecursionError:
        raise UserError(f"Nested more than {_DEEPEST} levels deep", where=where) from None
    except ValueError as error:  # json's own errors are also ValueErrors, as are numbers of too many digits
        raise UserError(f"Not strict JSON: {error}", where=where) from None
    return value


def strict_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object."""
    value = strict_json(data, where)
    if not isinstance(value, dict):
        raise UserError(f"Expected a JSON object (got {type(value).__name__})", where=where)
    return value


def require_shallow(value: Any, deepest: int) -> None:
    """Check the nesting of a parsed value."""
    level = [value]
    for _ in range(deepest):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError
