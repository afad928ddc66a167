"""Structured answers: the forms that a request may ask for, their limits, and the cache of compiled grammars.

``response_format`` is OpenAI's (https://platform.openai.com/docs/guides/structured-outputs); ``structured_outputs`` and
its earlier names ``guided_json``, ``guided_regex`` and ``guided_choice`` are vLLM's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from fractions import Fraction
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from tunewright.core.errors import UserError
from tunewright.data.tools import SchemaLimitError, nested_values, reference_path
from tunewright.generation.constraints import Constraint, Grammar, GrammarCompiler
from tunewright.generation.grammar_process import GrammarProcess
from tunewright.serving.gateway.errors import ApiError, Part
from tunewright.serving.gateway.fair_scheduler import AdmissionQueue

log = logging.getLogger("tunewright")

MAX_BYTES = 64 << 10
"""Size of a schema, grammar, regular expression or list of choices, as JSON."""
MAX_DEPTH = 32
"""Nesting of a schema; OpenAI's limit of 10 levels of objects takes about 20."""
MAX_REFERENCES = 1_000
MAX_MULTIPLE = 1_000
"""The least common multiple of a schema's ``multipleOf``: compiling takes time and memory by its size."""
COMPILE_SECONDS = 5.0
KEPT = 32
"""Number of compiled grammars kept for each tenant."""
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


class Form(NamedTuple):
    """The form of an answer, and the body's field that asks for it.

    Args:
        schemas: the JSON schemas in the grammar, by their fields, to check before it is compiled.
    """

    param: str
    grammar: Grammar
    schemas: Mapping[str, dict[str, Any]] = {}


_ANY_OBJECT = Grammar.json_schema({"type": "object"})


def one_form(
    response_format: AnswerFormat | None,
    structured: StructuredOutputs | None,
    guided: Mapping[str, Any],
    param: str | None = None,
) -> Form | None:
    """Return the form of an answer; None if any text will do.

    Args:
        guided: vLLM's earlier fields, by the name that they have in ``structured_outputs``.
        param: the field that sets the form, if it is not ``response_format``.
    """
    forms: list[Form] = []
    if response_format is not None:
        schema, kind = response_format.json_schema, response_format.type
        if (kind == "json_schema") is (schema is None):
            message = "response_format.json_schema goes with the type json_schema, and with no other."
            raise ApiError(message, param="response_format.json_schema", code="invalid_value")
        if schema is not None:
            forms.append(_form("json", schema.schema_, param or "response_format.json_schema.schema"))
        elif kind == "json_object":
            forms.append(Form(param or "response_format", _ANY_OBJECT))
    if structured is not None:
        own = structured.model_dump(by_alias=True, exclude={"json_object"}, exclude_none=True)
        forms += (_form(name, value, f"structured_outputs.{name}") for name, value in own.items())
        if structured.json_object:
            forms.append(Form("structured_outputs.json_object", _ANY_OBJECT))
    forms += (_form(name, value, f"guided_{name}") for name, value in guided.items() if value is not None)
    if len(forms) > 1:
        fields = " and ".join(form.param for form in forms)
        raise ApiError(
            f"{fields} each set the form of the answer: set one.", param=forms[1].param, code="invalid_value"
        )
    return forms[0] if forms else None


def _form(name: str, value: Any, param: str) -> Form:
    require_size(value, param)
    if name == "json":
        return Form(param, Grammar.json_schema(value), {param: value})
    if name == "choice":
        return Form(param, Grammar.choices(value))
    return Form(param, Grammar.regex(value) if name == "regex" else Grammar.lark(value))


def require_size(value: Any, param: str) -> None:
    """Check the size and nesting of a schema, or of another form."""
    # A value takes at least a byte: of more values than the limit has bytes, the size is reported.
    if any(depth > MAX_DEPTH for _, depth in islice(nested_values(value), MAX_BYTES)):
        message = f"{param} is nested too deeply (limit {MAX_DEPTH} levels)."
        raise ApiError(message, param=param, code="schema_too_large")
    size = len(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    if size > MAX_BYTES:
        message = f"{param} is too large: {size:,} bytes (limit {MAX_BYTES:,})."
        raise ApiError(message, param=param, code="schema_too_large")


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Check a schema's references and multiples, in a time that grows with its size only."""
    ended: dict[int, bool] = {}  # values by identity, since references can spell a place in many ways
    left: list[tuple[Any, str, bool]] = [(schema, "#", False)]  # a value, the last reference to it, True at its end
    references, multiple = 0, Fraction(1)
    while left:
        value, reference, end = left.pop()
        if end:
            ended[id(value)] = True
        elif not ended.get(id(value), True):
            message = (
                f"{param}: the schema is recursive, at {reference[:80]!r}. Write the levels out that answers may have."
            )
            raise ApiError(message, param=param, code="recursive_schema")
        elif isinstance(value, dict | list) and id(value) not in ended:
            ended[id(value)] = False
            left.append((value, reference, True))
            left += ((inner, reference, False) for inner in (value.values() if isinstance(value, dict) else value))
            if isinstance(value, dict):
                if isinstance(target := value.get("$ref"), str):
                    references += 1
                    left.append((_referred(schema, target, param), target, False))
                multiple = _common_multiple(multiple, value.get("multipleOf"))
        if references > MAX_REFERENCES:
            message = f"{param} has too many references (limit {MAX_REFERENCES:,})."
            raise ApiError(message, param=param, code="schema_too_large")
        if multiple > MAX_MULTIPLE:
            message = f"{param}: the least common multiple of all multipleOf is too large (limit {MAX_MULTIPLE:,})."
            raise ApiError(message, param=param, code="schema_too_large")


def _common_multiple(multiple: Fraction, factor: Any) -> Fraction:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        return multiple  # llguidance refuses it
    other = Fraction(factor if isinstance(factor, int) else str(factor))  # 0.1 is a tenth
    return Fraction(math.lcm(multiple.numerator, other.numerator), math.gcd(multiple.denominator, other.denominator))


def _referred(schema: Any, reference: str, param: str) -> Any:
    """Return the schema that a reference points to; None if there is nothing, which llguidance reports."""
    try:
        path = reference_path(reference)
    except SchemaLimitError as error:
        raise _unsupported(param, str(error)) from None
    for key in path:
        if isinstance(schema, list):  # int() raises an error for a longer number
            schema = schema[int(key)] if key.isdecimal() and len(key) < 9 and int(key) < len(schema) else None
        else:
            schema = schema.get(key) if isinstance(schema, dict) else None
    return schema


class GrammarCache:
    """Compiles grammars in a separate thread, where they delay no token, and keeps them.

    A child process compiles each grammar first, and is killed if that takes too long: the thread
    would continue. Tenants take turns at the thread, and each has its own part of the cache: no
    tenant can evict another's grammars, or infer another's requests from the time to the first token.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._process = GrammarProcess(compiler.tokenizer_arguments)
        self._kept: OrderedDict[str, OrderedDict[Grammar, Constraint | str]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tunewright-grammars")
        self._queue = AdmissionQueue(1)

    async def constraint(self, form: Form, tenant: str) -> Constraint:
        """Return the compiled grammar of a form."""
        kept = self._kept.setdefault(tenant, OrderedDict())
        self._kept.move_to_end(tenant)
        if len(self._kept) > KEPT_TENANTS:
            self._kept.popitem(last=False)
        if form.grammar in kept:
            kept.move_to_end(form.grammar)
            outcome = kept[form.grammar]
        else:
            async with AsyncExitStack() as waiting:
                await waiting.enter_async_context(self._queue.slot(tenant, len(form.grammar.rule)))
                # In a task, since the thread continues when the client disconnects, and nobody else can have the slot.
                compiling = asyncio.create_task(self._compiled(form, kept, waiting.pop_all()))
            outcome = await asyncio.shield(compiling)
        if isinstance(outcome, str):
            raise _unsupported(form.param, outcome)
        return outcome

    async def close(self) -> None:
        """End the child process. A compile in progress ends first."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._process.end)

    async def _compiled(
        self, form: Form, kept: OrderedDict[Grammar, Constraint | str], slot: AsyncExitStack
    ) -> Constraint | str:
        async with slot:
            outcome = kept.get(form.grammar)  # compiled for an equal request that also waited
            if outcome is None:
                outcome = await asyncio.get_running_loop().run_in_executor(self._thread, self._outcome, form)
                kept[form.grammar] = outcome
                if len(kept) > KEPT:
                    kept.popitem(last=False)
            return outcome

    def _outcome(self, form: Form) -> Constraint | str:
        """Compile; raise outcomes that depend on the machine's load or on the field, so that they are not kept."""
        for param, schema in form.schemas.items():
            check_schema(schema, param)
        try:
            fault = self._process.fault(self._compiler.rules(form.grammar), COMPILE_SECONDS)
        except OSError as error:
            log.error("grammars cannot be compiled: %s", error)
            message, headers = "Structured answers are temporarily unavailable.", {"Retry-After": "5"}
            raise ApiError(message, status=503, code="grammars_unavailable", headers=headers) from error
        if fault is not None:
            raise _unsupported(form.param, fault)
        try:
            return self._compiler.compile(form.grammar)
        except UserError as error:
            return error.what.removeprefix("Invalid constraint: ").rstrip(".")


def _unsupported(param: str, reason: str) -> ApiError:
    return ApiError(f"{param} is not supported: {reason}.", param=param, code="invalid_schema")
