"""Errors of declarations and arguments, and the limit on the depth of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

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
    if any(depth > 4 * MAX_DEPTH for _, depth in nested_values(value)):
        raise SchemaLimitError(f"nested more than {4 * MAX_DEPTH} levels deep")


def reference_path(reference: Any) -> tuple[str, ...]:
    """Return the steps of the JSON Pointer (RFC 6901) in a schema's ``$ref``.

    Raises:
        SchemaLimitError: it leads to another document, or is no pointer.
    """
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise SchemaLimitError('"$ref" must be local, such as "#/$defs/address"')
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in unquote(reference[1:]).split("/")[1:])


def nested_values(value: Any) -> Iterator[tuple[Any, int]]:
    """Yield a JSON value and all values in it, each with its depth, from 1."""
    left = [(value, 1)]
    while left:
        each, depth = left.pop()
        yield each, depth
        inner = each.values() if isinstance(each, Mapping) else each if isinstance(each, list) else ()
        left += [(one, depth + 1) for one in inner]
