"""The objects above a row in a JSON document, and groups that are named by what stands in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import jmespath
from jmespath.exceptions import JMESPathError

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.readers.row_errors import RowError

PARENT = "parent"
Parent = Mapping[str, Any]
"""The nearest object above a row, with the next one above it under the key ``parent``."""

_MOST_KEYS = 8


def compiled(expression: str, where: str, fix: str) -> jmespath.parser.ParsedResult:
    """Return the compiled JMESPath expression.

    Raises:
        UserError: it is not one.
    """
    try:
        return jmespath.compile(expression)
    except (JMESPathError, RecursionError) as error:
        what = f"not a JMESPath expression: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise UserError(what, where=where, fix=fix) from None


def names_parent(group: str, data: DataConfig) -> bool:
    """Whether a group of ``data.group_by`` is a JMESPath from the object above the row, such as ``parent.id``."""
    return data.rows is not None and group.startswith((f"{PARENT}.", f"{PARENT}["))


def check_groups(data: DataConfig) -> None:
    """Refuse a group above the rows that is not a JMESPath.

    Raises:
        UserError: as it says.
    """
    for group in data.group_by:
        if names_parent(group, data):
            _expression(group)


@lru_cache(maxsize=16)
def _expression(group: str) -> jmespath.parser.ParsedResult:
    return compiled(group, "data.group_by", "Such as parent.id, parent.sql[0] or parent.parent.title: docs/formats.md.")


def value_above(group: str, parent: Parent | None) -> Any:
    """Return a group's value for the rows below an object.

    Raises:
        RowError: nothing is found there, or the expression fails.
    """
    try:
        value = _expression(group).search({PARENT: parent})
    except (JMESPathError, RecursionError) as error:
        raise RowError("E205", f"data.group_by: {group!r} fails above the row: {error}") from None
    if value is None:
        raise RowError("E205", f"data.group_by: {group!r} finds nothing above the row")
    return value


def refuse_unfound(groups: Iterable[str], parents: Iterable[Parent | None], path: object) -> None:
    """Refuse a group that is not found above any row of a document.

    Args:
        groups: names of groups above the rows.
        parents: the object above each row; None where there is none.
        path: the document's.

    Raises:
        UserError: as it says, with the keys that are there.
    """
    different = list({id(parent): parent for parent in parents}.values())
    for group in groups:
        if not any(_found(group, parent) for parent in different):
            keys = list(dict.fromkeys(key for parent in different[:1] if parent for key in parent if key != PARENT))
            named = ", ".join(keys[:_MOST_KEYS]) + (f" and {len(keys) - _MOST_KEYS} more" * (len(keys) > _MOST_KEYS))
            fix = f"Keys of the object above a row: {named}." if keys else "data.rows finds rows below no object."
            raise UserError(f"{group!r} finds nothing above any row of {path}", where="data.group_by", fix=fix)


def _found(group: str, parent: Parent | None) -> bool:
    try:
        value_above(group, parent)
    except RowError:
        return False
    return True
