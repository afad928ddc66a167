"""Structured answers through OpenAI's client and vLLM's fields."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from served_model import STOPS, TOKENIZER, build_model, openai_client, running_server

from tunewright.generation.constraints import Constraint, Grammar, GrammarCompiler
from tunewright.serving.gateway import structured
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.structured import Form, GrammarCache, check_schema

QUESTION: list[Any] = [{"role": "user", "content": "Which court is this?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"court": {"enum": ["Ala.", "Fla."]}, "number": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["court", "number"],
    "additionalProperties": False,
}
COMPACT = {str(TOKENIZER.convert_tokens_to_ids(space)): -100 for space in "ĠĊčĉ"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(build_model()) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai_client(url) as opened:
        yield opened


def post(url: str, route: str = "chat/completions", **body: Any) -> Any:
    subject = {"messages": QUESTION} if route == "chat/completions" else {"prompt": "Which court?"}
    body = {"model": "courts", "max_tokens": 60, "logit_bias": COMPACT, **subject, **body}
    return httpx.post(f"{url}/v1/{route}", json=body, trust_env=False, timeout=60).json()


def text_of(reply: Any) -> str:
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def json_schema(schema: Any, **more: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "json_schema": ({"response_format": json_schema(SCHEMA)}, "json"),
    "strict": ({"response_format": json_schema(SCHEMA, strict=True, description="A court")}, "json"),
    "structured json": ({"structured_outputs": {"json": SCHEMA}}, "json"),
    "structured json text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json"),
    "guided_json": ({"guided_json": SCHEMA}, "json"),
    "structured regex": ({"structured_outputs": {"regex": "[A-Z]{2}[0-9]{3}"}}, "[A-Z]{2}[0-9]{3}"),
    "guided_regex": ({"guided_regex": "[A-Z]{2}[0-9]{3}"}, "[A-Z]{2}[0-9]{3}"),
    "structured choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, "yes|no"),
    "grammar": ({"structured_outputs": {"grammar": 'start: "x" number\nnumber: /[0-9]{4}/'}}, "x[0-9]{4}"),
}


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
@pytest.mark.parametrize("name", FORMS)
def test_answer_has_the_form_that_the_request_asks_for(url: str, route: str, name: str) -> None:
    fields, expected = FORMS[name]
    for how in ({}, {"temperature": 1.0, "seed": 4}):
        text = text_of(post(url, route, **fields, **how))
        if expected == "json":
            jsonschema.validate(json.loads(text), SCHEMA)
        else:
            assert re.fullmatch(expected, text)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


RECURSIVE = {"$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}}


@pytest.mark.parametrize(
    ("schema", "code", "message"),
    [
        ({"type": "strin"}, "invalid_schema", "Invalid type: strin"),
        ({"type": "object", "properties": []}, "invalid_schema", "properties must be an object"),
        ({"type": "string", "pattern": "("}, "invalid_schema", "unclosed group"),
        ({"not": {"type": "string"}}, "invalid_schema", r'Unimplemented keys: \["not"\]'),
        ({"$ref": "#/$defs/none"}, "invalid_schema", "does not exist"),
        ({"$ref": "http://127.0.0.1/schema.json"}, "invalid_schema", "must be local"),
        ({"enum": []}, "invalid_schema", "Unsatisfiable"),
        ({"$ref": "#/$defs/node", **RECURSIVE}, "recursive_schema", "recursive, at '#/[$]defs/node'"),
        ({"type": "array", "items": {"$ref": "#"}}, "recursive_schema", "recursive, at '#'"),
        ({"$ref": "#0/a", "a": {"type": "string"}}, "invalid_schema", "must be local"),
        ({str(n): {"$ref": f"#/{n + 1}"} for n in range(1001)}, "schema_too_large", "too many references .limit 1,000"),
        ({"type": "integer", "multipleOf": 1001}, "schema_too_large", "multipleOf is too large .limit 1,000"),
        (
            {"anyOf": [{"multipleOf": 0.07}, {"allOf": [{"multipleOf": 11}, {"multipleOf": 13}]}]},
            "schema_too_large",
            "1,000",
        ),
        (deep(40), "schema_too_large", "nested too deeply"),
        ({"enum": ["x" * 100 + str(n) for n in range(1000)]}, "schema_too_large", "too large"),
    ],
)
def test_fault_of_a_schema_names_its_field(client: openai.OpenAI, schema: Any, code: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(model="courts", messages=QUESTION, response_format=json_schema(schema))
    assert (caught.value.param, caught.value.code) == ("response_format.json_schema.schema", code)
    assert "answer:" not in caught.value.message, "our own rules are not the client's"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(?!a)b"}, "guided_regex"),
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex"),
    ],
)
def test_fault_of_a_form_of_vllm_names_its_field(url: str, fields: Any, param: str) -> None:
    error = post(url, **fields)["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_form_that_becomes_too_complex_fails_its_own_request_alone(url: str) -> None:
    hostile: dict[str, Any] = {"structured_outputs": {"regex": "((a{1,100}){1,100}){1,100}"}, "max_tokens": 3000}
    hostile["logit_bias"] = {str(TOKENIZER.convert_tokens_to_ids("a")): 100}

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
            bodies = [{"model": "courts", "messages": QUESTION, "max_tokens": 40, **more} for more in (hostile, {})]
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

    failed, answered = asyncio.run(ask())
    assert (failed.status_code, failed.json()["error"]["code"]) == (400, "constraint_too_complex")
    assert failed.json()["error"]["param"] == "structured_outputs.regex"
    assert answered.json()["choices"] == post(url, max_tokens=40, logit_bias={})["choices"]


class Counted(GrammarCompiler):
    """Counts what it compiles."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER, STOPS)
        self.compiled: list[str] = []

    def compile(self, grammar: Grammar) -> Constraint:
        self.compiled.append(grammar.rule)
        return super().compile(grammar)


def with_cache(use: Callable[[GrammarCache, Counted], Awaitable[None]]) -> None:
    async def run() -> None:
        compiler = Counted()
        cache = GrammarCache(compiler)
        try:
            await use(cache, compiler)
        finally:
            await cache.close()

    asyncio.run(run())


def one_of(*texts: str) -> Form:
    return Form("guided_choice", Grammar.choices(texts))


def test_grammar_is_compiled_once_for_a_tenant_and_the_oldest_is_dropped() -> None:
    async def ask(cache: GrammarCache, compiler: Counted) -> None:
        first, again = await asyncio.gather(*(cache.constraint(one_of("a"), "acme") for _ in range(2)))
        assert first is again is await cache.constraint(one_of("a"), "acme")
        await cache.constraint(one_of("a"), "other")
        assert len(compiler.compiled) == 2
        for _ in range(2):
            with pytest.raises(ApiError, match="guided_regex is not supported"):
                await cache.constraint(Form("guided_regex", Grammar.regex("(")), "acme")
        assert len(compiler.compiled) == 3, "a refusal is kept, too"
        for number in range(structured.KEPT):
            await cache.constraint(one_of(str(number)), "acme")
        before = len(compiler.compiled)
        await cache.constraint(one_of("a"), "other")
        assert len(compiler.compiled) == before
        await cache.constraint(one_of("a"), "acme")
        assert len(compiler.compiled) == before + 1

    with_cache(ask)


def multiples(*factors: float) -> dict[str, Any]:
    """Each factor takes half a second or more."""
    return {"properties": {f"p{factor}": {"type": "integer", "multipleOf": factor} for factor in factors}}


# In a grammar, where the limit of schemas does not apply.
SLOW = {"grammar": f"start: %json {json.dumps(multiples(*range(99_971, 99_991)))}"}


def test_slow_grammar_of_one_client_is_refused_and_quick_ones_are_answered(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 1.5)

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=120) as client:
            same: Any = {"model": "courts", "messages": QUESTION, "max_tokens": 60, "logit_bias": COMPACT}
            forms = [SLOW, *({"choice": [text, "quick"]} for text in "abc")]
            bodies = [{**same, "structured_outputs": form} for form in forms]
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

    slow, *quick = asyncio.run(ask())
    assert (slow.status_code, slow.json()["error"]["param"]) == (400, "structured_outputs.grammar")
    assert [reply.status_code for reply in quick] == [200, 200, 200]


def test_refusal_of_a_slow_grammar_is_not_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form: dict[str, Any] = {"structured_outputs": {"regex": "(b{100}){100}"}}
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 0.001)
    assert post(url, max_tokens=1, **form)["error"]["param"] == "structured_outputs.regex"
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 300)
    assert post(url, max_tokens=1, **form)["choices"]


def test_compile_ends_for_its_tenant_when_the_client_disconnects() -> None:
    async def ask(cache: GrammarCache, compiler: Counted) -> None:
        request = asyncio.create_task(cache.constraint(one_of("a"), "acme"))
        await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await cache.constraint(one_of("a"), "acme")
        assert len(compiler.compiled) == 1

    with_cache(ask)


ROUTES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "chat/completions": lambda schema: {"messages": QUESTION, "response_format": json_schema(schema)},
    "completions": lambda schema: {"prompt": "a", "guided_json": schema},
    "responses": lambda schema: {
        "input": "a",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": schema}},
    },
    "messages": lambda schema: {
        "messages": QUESTION,
        "max_tokens": 5,
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
    },
}


@pytest.mark.parametrize("route", ROUTES)
def test_schema_is_checked_in_the_thread_of_grammars(url: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def noted(schema: Any, param: str) -> None:
        threads.append(threading.current_thread().name)
        check_schema(schema, param)

    monkeypatch.setattr(structured, "check_schema", noted)
    schema = {"a": [{"$ref": f"#{number}/a"} for number in range(9)], "$ref": "#/a"}
    reply = httpx.post(f"{url}/v1/{route}", json={"model": "courts", **ROUTES[route](schema)}, trust_env=False)
    assert (reply.status_code, [name.rpartition("_")[0] for name in threads]) == (400, ["tunewright-grammars"])
    assert '"$ref" must be local' in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "schema",
    [
        {"a": {"$ref": "#/%61"}},
        {"a": {"b": {"$ref": "#/c"}}, "c": [{"$ref": "#/c~1/0"}], "c/": [{"$ref": "#/a"}]},
        {"a": [{"$ref": "#/a/00"}]},
        {"properties": {"x": {"items": {"$ref": "#/properties"}}}},
    ],
)
def test_recursion_is_found_however_references_spell_it(schema: Any) -> None:
    with pytest.raises(ApiError) as caught:
        check_schema(schema, "schema")
    assert caught.value.code == "recursive_schema"


def chain(length: int) -> dict[str, Any]:
    return {str(number): {"$ref": f"#/{number + 1}"} for number in range(length)}


def test_schema_at_the_limits_of_references_and_multiples_is_accepted() -> None:
    check_schema(chain(structured.MAX_REFERENCES), "schema")
    check_schema({"$ref": "#/" + "9" * 5000, "a": {"$ref": "#/none"}, "b": {"const": [[], [], {}, {}]}}, "schema")
    check_schema(multiples(0.01, 2.5, 8, 100, 125, 1000), "schema")
    check_schema(multiples(True, -7, 0, float("nan"), 1e-300, math.inf), "schema")
