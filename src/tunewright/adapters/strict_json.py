"""Untrusted JSON documents of adapters: a checked one has the same meaning in every program that loads it."""

from __future__ import annotations

from typing import Any

from tunewright.core.errors import UserError
from tunewright.core.strict_json import strict_decoder

_DEEPEST = 32
"""Nesting limit: a lineage has 7 levels."""


def strict_json(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        UserError: not UTF-8, not JSON, a repeated key, an invalid number, or too deep a nesting.
    """
    try:
        value = strict_decoder.decode(data.decode("utf-8"))
        _require_shallow(value)
    except UnicodeDecodeError as error:
        raise UserError(f"Not UTF-8 at byte {error.start:,}", where=where) from None
    except RecursionError:
        raise UserError(f"Nested more than {_DEEPEST} levels deep", where=where) from None
    except ValueError as error:  # json's own errors are ValueErrors too, and so are numbers of too many digits
        raise UserError(f"Not strict JSON: {error}", where=where) from None
    return value


def strict_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        UserError: as for :func:`strict_json`, or a value that is not an object.
    """
    value = strict_json(data, where)
    if not isinstance(value, dict):
        raise UserError(f"Expected a JSON object (got {type(value).__name__})", where=where)
    return value


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError
