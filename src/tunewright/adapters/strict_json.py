"""JSON from strangers: one meaning for each text, or a refusal that says why.

Python's reader takes the last of two equal keys where others take the first, and reads NaN; what was checked would then
not be what another program loads (RFC 8259, section 4, leaves equal keys open).
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from tunewright.core.errors import UserError

_DEEPEST = 32
"""Levels of brackets: a lineage has 7."""


def strict_json(data: bytes, where: str) -> Any:
    """Return the value that ``data`` spells in UTF-8.

    Raises:
        UserError: not UTF-8, not JSON, a key given twice, a number that is none, or too deep a nesting.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
        _require_shallow(value)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start:,}", where=where) from None
    except RecursionError:
        raise UserError(f"its brackets are nested over {_DEEPEST} deep", where=where) from None
    except ValueError as error:  # json's own errors are ValueErrors too, and so are numbers of too many digits
        raise UserError(f"not JSON that can be trusted: {error}", where=where) from None
    return value


def strict_object(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object that ``data`` spells.

    Raises:
        UserError: as for :func:`strict_json`, or another value than an object.
    """
    value = strict_json(data, where)
    if not isinstance(value, dict):
        raise UserError(f"a JSON object is expected, and it is {type(value).__name__}", where=where)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


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
