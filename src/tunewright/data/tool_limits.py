"""Errors of declarations and arguments, and the limit on the depth of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_DEPTH = 32
"""Of a schema inside schemas, with references followed, and of arguments."""

Path = tuple[str | int, ...]


class DeclarationError(ValueError):
    """Declarations that are not functions with a JSON Schema; ``path`` is the place in them."""

    def __init__(self, reason: str, path: Path = ()) -> None:
        super().__init__(reason)
        self.path = path


class SchemaLimitError(DeclarationError):
    """A schema that is recursive, too large or too slow, or that needs a document from elsewhere."""


class ArgumentsError(ValueError):
    """Arguments that violate a function's schema."""


def require_depth(value: Any) -> None:
    """Raise a SchemaLimitError for JSON values nested deeper than any schema in its limit needs."""
    layer, depth = [value], 0
    while layer:
        depth += 1
        if depth > 4 * MAX_DEPTH:
            raise SchemaLimitError(f"nested more than {4 * MAX_DEPTH} levels deep")
        layer = [inner for each in layer for inner in inner_values(each)]


def inner_values(value: Any) -> Sequence[Any]:
    """Return the values of a JSON object or list."""
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else ()
