"""Functions that a conversation may call: declarations in OpenAI's form, arguments, and JSON Schemas that check both.

Declarations and arguments are canonical JSON. Nothing is fetched, and time and memory are bounded: references are
local, schemas are not recursive, and a pattern has a limit of processor time.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import regex

from tunewright.core.io import canonical_json
from tunewright.core.strict_json import parse_json
from tunewright.core.text import normalize

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

MAX_DEPTH = 32
"""Nesting limit of schemas, with references followed, and of arguments."""
MAX_VALUES = 10_000
"""Limit of the schemas and listed values of one function, with references followed."""
MAX_STEPS = 2_000_000
"""Limit of a schema's values times the arguments' values."""
MAX_PATTERN = 1_000
"""Maximum length of a regular expression in characters."""
_SECONDS = 1.0
"""Limit of the processor time of the patterns in one check."""

_Pointer = tuple[str, ...]
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


MAX_CHARACTERS = 1 << 18
"""Maximum length of all declarations of a conversation, as canonical JSON."""

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

    A declaration is ``{"type": "function", "function": {...}}`` or the inner object. Absent
    parameters become an empty set. ``strict`` is left out: it is for decoding, not for the model.
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

    The schema itself is not checked.
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
    """Return a call's arguments, an object or its text in JSON, as canonical JSON in NFC and as the object."""
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


def require_depth(value: Any) -> None:
    """Raise a SchemaLimitError for JSON values nested deeper than any schema in its limit needs."""
    if any(depth > 4 * MAX_DEPTH for _, depth in nested_values(value)):
        raise SchemaLimitError(f"nested more than {4 * MAX_DEPTH} levels deep")


def reference_path(reference: Any) -> tuple[str, ...]:
    """Return the steps of the local JSON Pointer (RFC 6901) in a schema's ``$ref``."""
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


@dataclass(frozen=True)
class CompiledSchema:
    """A schema that is within the limits."""

    validator: Any
    size: int

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise an ArgumentsError if they violate the schema, or a SchemaLimitError if that would take too long."""
        if self.size * sum(1 for _ in nested_values(arguments)) > MAX_STEPS:
            raise SchemaLimitError("schema and arguments are too large to be checked")
        token = _END.set(time.thread_time() + _SECONDS)
        try:
            error = next(self.validator.iter_errors(arguments), None)
        finally:
            _END.reset(token)
        if error is not None:
            # Most keywords' messages contain the value, which may be a secret; the messages of these name only keys.
            keys_only = error.validator in ("required", "additionalProperties", "dependentRequired")
            rule = f'not valid under "{error.validator}": '
            what = _cut(error.message) if keys_only else rule + _cut(canonical_json(error.validator_value))
            raise ArgumentsError(f"arguments{_place(error)}: {what}")


def _place(error: ValidationError) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99]}…"


@lru_cache(maxsize=4096)  # rows of a domain share their functions
def compiled_schema(text: str) -> CompiledSchema:
    """Return the JSON Schema (Draft 2020-12) in a text, ready to check arguments."""
    schema = json.loads(text)
    size = _measure_schema(schema)
    for key in ("$schema", "$id"):  # both keywords would make references that are not local
        schema.pop(key, None)
    metaschema, validator = _validators()
    error = next(metaschema.iter_errors(schema), None)
    if error is not None:
        raise DeclarationError(f"not JSON Schema (Draft 2020-12): parameters{_place(error)}: {_cut(error.message)}")
    return CompiledSchema(validator(schema), size)


_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else", "contentSchema")
_REFUSED = ("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$anchor", "unevaluatedItems", "unevaluatedProperties")
"""Refused keywords: their evaluation may not end without a special check, and no function's schema uses them."""


def _measure_schema(schema: Any) -> int:
    """Return the number of schemas and listed values, with references followed; refuse what is over a limit."""
    places: dict[_Pointer, Any] = {(): schema}
    left: list[_Pointer] = [()]
    while left:
        path = left.pop()
        _check_keywords(places[path], path)
        for inner, child in _subschemas(places[path]):
            places[*path, *inner] = child
            left.append((*path, *inner))
        if len(places) > MAX_VALUES:
            raise SchemaLimitError(f"more than {MAX_VALUES:,} values")
    # Schemas inside schemas with references followed, each as often as it is checked: the limits end a recursion.
    size = 0
    unmeasured: list[tuple[_Pointer, int]] = [((), 0)]
    while unmeasured:
        path, depth = unmeasured.pop()
        if depth > MAX_DEPTH:
            raise SchemaLimitError(f"recursive, or more than {MAX_DEPTH} schemas deep with references followed")
        inner = places[path]
        size += 1
        if isinstance(inner, dict):
            size += sum(1 for key in ("enum", "const", "required") if key in inner for _ in nested_values(inner[key]))
            paths = [(*path, *steps) for steps, _ in _subschemas(inner)]
            if "$ref" in inner:
                paths.append(reference_path(inner["$ref"]))
                if paths[-1] not in places:
                    raise DeclarationError(f'"$ref" {_cut(inner["$ref"])} names no schema of this document')
            unmeasured += [(each, depth + 1) for each in reversed(paths)]
        if size > MAX_VALUES:
            raise SchemaLimitError(f"more than {MAX_VALUES:,} values, with references followed")
    return size


def _subschemas(schema: Any) -> Iterator[tuple[_Pointer, Any]]:
    if not isinstance(schema, dict):
        return
    for key in _MAPS:
        inner = schema.get(key)
        if isinstance(inner, dict):
            yield from (((key, name), each) for name, each in inner.items())
    for key in _LISTS:
        inner = schema.get(key)
        if isinstance(inner, list):
            yield from (((key, str(place)), each) for place, each in enumerate(inner))
    yield from (((key,), schema[key]) for key in _SINGLE if isinstance(schema.get(key), dict | bool))


def _check_keywords(schema: Any, path: _Pointer) -> None:
    if not isinstance(schema, dict):
        return
    refused = [*_REFUSED, *(["$id", "$schema"] if path else [])]
    for key in refused:
        if key in schema:
            raise SchemaLimitError(f'the keyword "{key}" is not supported')
    required = schema.get("dependentRequired")
    lists = [schema.get("required"), schema.get("type"), *(required.values() if isinstance(required, dict) else ())]
    for names in lists:  # the metaschema compares their items with each other, which takes long for mixed types
        if isinstance(names, list) and not all(isinstance(name, str) for name in names):
            raise DeclarationError("not JSON Schema (Draft 2020-12): required and type list texts")
    patterns = schema.get("patternProperties")
    for pattern in (schema.get("pattern"), *(patterns if isinstance(patterns, dict) else ())):
        if isinstance(pattern, str) and len(pattern) > MAX_PATTERN:
            raise SchemaLimitError(f"a pattern of {len(pattern):,} characters (limit {MAX_PATTERN:,})")


_END: ContextVar[float] = ContextVar("the thread's time at which a check ends")


def _matches(pattern: str, text: str) -> bool:
    try:
        return regex.search(pattern, text, timeout=max(_END.get() - time.thread_time(), 0.001)) is not None
    except TimeoutError:
        raise SchemaLimitError(f"the pattern {_cut(canonical_json(pattern))} takes too long on the arguments") from None


@cache
def _validators() -> tuple[Any, Callable[[Any], Any]]:
    """Return validators of schemas and of arguments for a schema; jsonschema is imported on demand."""
    from jsonschema import Draft202012Validator, FormatChecker
    from jsonschema.exceptions import ValidationError
    from jsonschema.validators import extend
    from referencing import Registry

    formats = FormatChecker(formats=())

    @formats.checks("regex", raises=(regex.error, RecursionError))
    def is_regex(pattern: object) -> bool:
        return not isinstance(pattern, str) or bool(regex.compile(pattern))

    # jsonschema's own forms of these keywords search with Python's re, which has no limit, or compare all pairs of
    # items.
    def check_pattern(_validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[ValidationError]:
        if isinstance(value, str) and not _matches(pattern, value):
            yield ValidationError("does not match")

    def check_patterns(validator: Any, patterns: Any, value: Any, _schema: Any) -> Iterator[ValidationError]:
        for pattern, schema in patterns.items() if isinstance(value, dict) else ():
            for key, inner in value.items():
                if _matches(pattern, key):
                    yield from validator.descend(inner, schema, path=key, schema_path=pattern)

    def check_others(validator: Any, others: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
        patterns = schema.get("patternProperties", {})
        for key, inner in value.items() if isinstance(value, dict) else ():
            if key in schema.get("properties", {}) or any(_matches(pattern, key) for pattern in patterns):
                continue
            if others is False:
                yield ValidationError(f'unexpected key "{key}"')
            else:
                yield from validator.descend(inner, others, path=key)

    def check_unique(_validator: Any, unique: bool, value: Any, _schema: Any) -> Iterator[ValidationError]:
        if unique and isinstance(value, list) and len({canonical_json(_whole(each)) for each in value}) < len(value):
            yield ValidationError("has equal items")

    keywords = {
        "pattern": check_pattern,
        "patternProperties": check_patterns,
        "additionalProperties": check_others,
        "uniqueItems": check_unique,
    }
    validator = extend(Draft202012Validator, keywords)
    metaschema = Draft202012Validator(Draft202012Validator.META_SCHEMA, format_checker=formats)
    return metaschema, lambda schema: validator(schema, registry=Registry())


def _whole(value: Any) -> Any:
    """Return the value with numbers such as 1.0 as 1, to which they are equal in JSON Schema."""
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
