"""Structured answers: the forms that a request may ask for, their limits, and the cache of compiled grammars.

``response_format`` is OpenAI's (https://platform.openai.com/docs/guides/structured-outputs); ``structured_outputs`` and
its earlier names ``guided_json``, ``guided_regex`` and ``guided_choice`` are vLLM's.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from tunewright.core.errors import UserError
from tunewright.data.tool_limits import nested_values
from tunewright.generation.constraints import Constraint, Grammar
from tunewright.serving.gateway.admission import AdmissionQueue
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.parsing import Part

MAX_BYTES = 64 << 10
"""Size of a schema, grammar, regular expression or list of choices, as JSON."""
MAX_DEPTH = 32
"""Nesting of a schema; OpenAI's limit of 10 levels of objects takes about 20."""
COMPILE_SECONDS = 5.0
KEPT = 32
"""Compiled grammars that are kept for each tenant."""
KEPT_TENANTS = 64


def _parsed(schema: Any) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        raise PydanticCustomError("schema", "not a JSON schema: it must be a JSON object") from None


Schema = Annotated[dict[str, Any], BeforeValidator(_parsed)]
"""A JSON schema, or its text."""

Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class JsonSchemaFormat(Part):
    """A named schema. It is enforced with and without ``strict``."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class AnswerFormat(Part):
    """The form of an answer in OpenAI's API: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Part):
    """The form of an answer in vLLM's API: exactly one of the fields."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Annotated[str | None, Field(min_length=1)] = None
    choice: Choices | None = None
    grammar: Annotated[str | None, Field(min_length=1)] = None


Form = tuple[str, Grammar]
"""A form with the body's field that asks for it."""


def one_form(
    response_format: AnswerFormat | None,
    structured: StructuredOutputs | None,
    guided: Mapping[str, Any],
) -> Form | None:
    """Return the form of an answer; None if any text will do.

    Args:
        guided: vLLM's earlier fields, by the name that they have in ``structured_outputs``.

    Raises:
        ApiError: 400, there are several forms, or one is not valid or over a limit.
    """
    forms = [*_openai(response_format), *_vllm(structured), *_guided(guided)]
    if len(forms) > 1:
        fields = " and ".join(param for param, _ in forms)
        raise ApiError(f"{fields} each set the form of the answer: set one.", param=forms[1][0], code="invalid_value")
    return forms[0] if forms else None


def _openai(asked: AnswerFormat | None) -> Iterator[Form]:
    if asked is None:
        return
    if (asked.type == "json_schema") is (asked.json_schema is None):
        message = "response_format.json_schema goes with the type json_schema, and with no other."
        raise ApiError(message, param="response_format.json_schema", code="invalid_value")
    if asked.json_schema is not None:
        param = "response_format.json_schema.schema"
        yield param, _schema(asked.json_schema.schema_, param)
    elif asked.type == "json_object":
        yield "response_format", Grammar.json_schema({"type": "object"})


def _vllm(asked: StructuredOutputs | None) -> Iterator[Form]:
    if asked is None:
        return
    for name in ("json", "regex", "choice", "grammar"):
        value = getattr(asked, "json_" if name == "json" else name)
        if value is not None:
            yield _form(name, value, f"structured_outputs.{name}")
    if asked.json_object:
        yield "structured_outputs.json_object", Grammar.json_schema({"type": "object"})


def _guided(asked: Mapping[str, Any]) -> Iterator[Form]:
    for name, value in asked.items():
        if value is not None:
            yield _form(name, value, f"guided_{name}")


def _form(name: str, value: Any, param: str) -> Form:
    if name == "json":
        return param, _schema(value, param)
    _require_size(value, param)
    if name == "choice":
        return param, Grammar.choices(value)
    return param, Grammar.regex(value) if name == "regex" else Grammar.lark(value)


def _schema(schema: dict[str, Any], param: str) -> Grammar:
    require_schema(schema, param)
    return Grammar.json_schema(schema)


def require_schema(schema: dict[str, Any], param: str) -> None:
    """Check a schema's size, and that it is not recursive.

    Raises:
        ApiError: 400, naming the field.
    """
    _require_size(schema, param)
    if (cycle := _recursion(schema)) is not None:
        message = f"{param}: the schema is recursive, at {cycle!r}. Write the levels out that answers may have."
        raise ApiError(message, param=param, code="recursive_schema")


def _require_size(value: Any, param: str) -> None:
    if any(depth > MAX_DEPTH for _, depth in nested_values(value)):
        message = f"{param} is nested too deeply (limit {MAX_DEPTH} levels)."
        raise ApiError(message, param=param, code="schema_too_large")
    size = len(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    if size > MAX_BYTES:
        message = f"{param} is too large: {size:,} bytes (limit {MAX_BYTES:,})."
        raise ApiError(message, param=param, code="schema_too_large")


def _recursion(schema: dict[str, Any]) -> str | None:
    """Return a reference of the schema that leads back to itself; None if there is none."""
    found: dict[str, set[str]] = {}
    unread = ["#"]
    while unread:
        reference = unread.pop()
        if reference not in found:
            found[reference] = _references(_at(schema, reference))
            unread += found[reference]
    # What no reference leaves leads nowhere; what is left in the end leads in a circle.
    while ends := [reference for reference, targets in found.items() if not targets & found.keys()]:
        for reference in ends:
            del found[reference]
    return min(set.union(*found.values()) & found.keys(), default=None) if found else None


def _references(node: Any) -> set[str]:
    references = {each.get("$ref") for each, _ in nested_values(node) if isinstance(each, dict)}
    return {reference for reference in references if isinstance(reference, str)}


def _at(schema: Any, reference: str) -> Any:
    """Return what a reference inside the schema (a JSON pointer) refers to; None for any other."""
    node = schema
    for key in reference.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            node = node.get(key) if isinstance(node, dict) else None
    return node if reference.startswith("#") else None


class GrammarCache:
    """Compiles grammars in a thread of their own, where they delay no token, and keeps them.

    Tenants take turns at the thread, and each has its own part of the cache: nobody can push another's grammars out, or
    tell by the time to the first token what another has asked for.
    """

    def __init__(self, compile_grammar: Callable[[Grammar], Constraint]) -> None:
        self._compile = compile_grammar
        self._kept: OrderedDict[str, OrderedDict[Grammar, Constraint | str]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tunewright-grammars")
        self._queue = AdmissionQueue(1)

    async def constraint(self, form: Form, tenant: str) -> Constraint:
        """Return the compiled grammar of a form.

        Raises:
            ApiError: 400, the grammar is not valid, not supported, or too complex.
        """
        param, grammar = form
        kept = self._kept.setdefault(tenant, OrderedDict())
        self._kept.move_to_end(tenant)
        if len(self._kept) > KEPT_TENANTS:
            self._kept.popitem(last=False)
        outcome = kept.get(grammar)
        if outcome is None:
            async with self._queue.slot(tenant, len(grammar.rule)):
                compiling = asyncio.get_running_loop().run_in_executor(self._thread, self._outcome, grammar)
                await asyncio.wait({compiling}, timeout=COMPILE_SECONDS)
            late = f"it takes over {COMPILE_SECONDS:g} s to compile"
            outcome = compiling.result() if compiling.done() else late
            kept[grammar] = outcome
            if len(kept) > KEPT:
                kept.popitem(last=False)
        kept.move_to_end(grammar)
        if isinstance(outcome, str):
            raise ApiError(f"{param} is not supported: {outcome}.", param=param, code="invalid_schema")
        return outcome

    def _outcome(self, grammar: Grammar) -> Constraint | str:
        try:
            return self._compile(grammar)
        except UserError as error:
            return error.what.removeprefix("Invalid constraint: ").rstrip(".")
