"""Strict parsing of untrusted JSON: one meaning for each text, or a refusal with the reason.

Python's parser takes the last of two equal keys where others take the first, and accepts NaN. The checked document
would then differ from what another program loads (RFC 8259, section 4, leaves equal keys open).
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from tunewright.core.errors import UserError

_DEEPEST = 32
"""Nesting limit: a lineage has 7 levels."""


def strict_json(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        UserError: not UTF-8, not JSON, a repeated key, an invalid number, or too deep a nesting.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is repeated")
        found[key] = value
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


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
