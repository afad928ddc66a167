"""Function declarations in OpenAI's form, and the arguments of calls, both as canonical JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunewright.core.io import canonical_json
from tunewright.core.strict_json import parse_json
from tunewright.core.text import normalize
from tunewright.data.tool_schemas import (
    ArgumentsError,
    DeclarationError,
    Path,
    SchemaLimitError,
    compiled_schema,
    require_depth,
)

MAX_CHARACTERS = 1 << 18
"""Of all declarations of a conversation, as canonical JSON."""

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Toolset:
    """A conversation's functions."""

    text: str
    """The canonical JSON array of declarations: the content of a message of role ``tools``."""
    schemas: Mapping[str, str]
    """Canonical JSON of each function's parameters, by name."""

    def check(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Check a call's arguments against the schema of a declared function, as :class:`CompiledSchema` does."""
        compiled_schema(self.schemas[name]).check(arguments)


def read_tools(value: Any) -> Toolset:
    """Return the functions that a list declares, or its text in JSON.

    A declaration is ``{"type": "function", "function": {...}}`` or the inner object. Absent parameters become those of
    a function without any. ``strict`` is left out: it is an instruction for decoding, not for the model.

    Raises:
        DeclarationError: a list of anything else, a name that is declared twice, an invalid schema.
        SchemaLimitError: a schema over a limit.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DeclarationError(f"not JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise DeclarationError("not a list of functions")
    require_depth(value)
    declared, schemas = [], {}
    for place, each in enumerate(value):
        function = canonical_function(each, (place,))
        if function["name"] in schemas:
            raise DeclarationError(f'function "{function["name"]}" is declared twice', (place,))
        declared.append({"type": "function", "function": function})
        schemas[function["name"]] = canonical_json(function["parameters"])
    text = canonical_json(declared)
    if len(text) > MAX_CHARACTERS:
        raise SchemaLimitError(f"declarations of {len(text):,} characters (limit {MAX_CHARACTERS:,})")
    for place, (name, schema) in enumerate(schemas.items()):
        try:
            compiled_schema(schema)
        except DeclarationError as error:
            kind = type(error)
            raise kind(f'parameters of "{name}": {error}', (place, *error.path)) from None
    return Toolset(text, schemas)


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def canonical_function(declared: Any, path: Path = ()) -> dict[str, Any]:
    """Return name, description and parameters of one declaration, in NFC: the same for rows and for requests.

    Raises:
        DeclarationError: it is no declaration; the schema itself is not checked.
    """
    inner = declared
    if isinstance(declared, dict) and "function" in declared:
        inner, path = declared["function"], (*path, "function")
        if declared.get("type", "function") != "function" or declared.keys() - {"type", "function"}:
            raise DeclarationError('a declaration is {"type": "function", "function": {...}}', path[:-1])
    if not isinstance(inner, dict):
        raise DeclarationError("a function is an object with name, description and parameters", path)
    if unknown := sorted(inner.keys() - {"name", "description", "parameters", "strict", "type"}):
        raise DeclarationError(
            f'unknown key "{unknown[0]}" of a function (expected name, description, parameters)', path
        )
    if inner.get("type", "function") != "function":
        raise DeclarationError("only tools of the type function are supported", path)
    name, description, parameters = (inner.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise DeclarationError(
            "a function's name must have 1 to 128 letters, digits, dots, dashes and underscores", (*path, "name")
        )
    if not isinstance(description, str | None):
        raise DeclarationError(f'the description of "{name}" is not text', (*path, "description"))
    if parameters in (None, {}):
        parameters = NO_PARAMETERS
    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        raise DeclarationError(
            f'the parameters of "{name}" are not a JSON Schema of the type object', (*path, "parameters")
        )
    function = {"name": name, "parameters": parameters} | ({"description": description} if description else {})
    try:
        return dict(_in_nfc(function))
    except (ValueError, TypeError) as error:
        raise DeclarationError(f'function "{name}": {error}', path) from None


def canonical_arguments(value: Any) -> tuple[str, dict[str, Any]]:
    """Return a call's arguments as canonical JSON in NFC, and as the object that it spells.

    Args:
        value: an object, or its text in JSON.

    Raises:
        ArgumentsError: it is anything else.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ArgumentsError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise ArgumentsError(f"{kind}, not a JSON object")
    try:
        require_depth(value)
        found = _in_nfc(value)
        return canonical_json(found), found
    except (ValueError, TypeError) as error:  # an infinite number, or a table's value without a JSON form
        raise ArgumentsError(str(error)) from None


def _in_nfc(value: Any) -> Any:
    text = canonical_json(value)
    return parse_json(text if text.isascii() else normalize(text))
