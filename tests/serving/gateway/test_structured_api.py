"""Structured answers through OpenAI's client and vLLM's fields."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest
from served_model import GRAMMARS, TOKENIZER, build_model, running_server

from tunewright.core.errors import UserError
from tunewright.generation.constraints import Constraint, Grammar
from tunewright.serving.gateway import structured
from tunewright.serving.gateway.errors import ApiError
from tunewright.serving.gateway.structured import GrammarCache

QUESTION: list[Any] = [{"role": "user", "content": "Which court is this?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"court": {"enum": ["Ala.", "Fla."]}, "number": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["court", "number"],
    "additionalProperties": False,
}
# Random weights prefer white space, which JSON allows without end.
BRACE = str(TOKENIZER.convert_tokens_to_ids("}"))
COMPACT = {str(TOKENIZER.convert_tokens_to_ids(space)): -100 for space in "ĠĊčĉ"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(build_model()) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with (
        openai.DefaultHttpxClient(trust_env=False) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as opened,
    ):
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


def test_json_object_answer_is_an_object_as_far_as_it_goes(url: str) -> None:
    reply = post(url, response_format={"type": "json_object"}, max_tokens=12, logit_bias={**COMPACT, BRACE: -100})
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "length", "cut, as OpenAI reports it"
    assert choice["message"]["content"].startswith("{")
    assert post(url, response_format={"type": "text"})["choices"][0]["message"] == post(url)["choices"][0]["message"]


def test_openai_client_parses_an_answer_into_a_pydantic_model(client: openai.OpenAI) -> None:
    class Court(pydantic.BaseModel):
        name: Literal["Ala.", "Fla."]
        appeal: bool

    how: Any = {"model": "courts", "messages": QUESTION, "max_tokens": 60, "logit_bias": COMPACT}
    parsed = client.chat.completions.parse(response_format=Court, **how)
    assert isinstance(parsed.choices[0].message.parsed, Court)
    with client.chat.completions.stream(response_format=Court, **how) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


def test_rows_of_one_batch_have_their_own_forms(url: str) -> None:
    forms: list[dict[str, Any]] = [*(fields for fields, _ in FORMS.values()), {}, {}]

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
            same: Any = {"model": "courts", "messages": QUESTION, "max_tokens": 60, "logit_bias": COMPACT}
            bodies = [{**same, **form} for form in forms]
            replies = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
            return [reply.json()["choices"] for reply in replies]

    assert asyncio.run(ask()) == [post(url, **form)["choices"] for form in forms]


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
        ({"$ref": "http://127.0.0.1/schema.json"}, "invalid_schema", "not present in a registry"),
        ({"enum": []}, "invalid_schema", "Unsatisfiable"),
        ({"$ref": "#/$defs/node", **RECURSIVE}, "recursive_schema", "recursive, at '#/[$]defs/node'"),
        ({"type": "array", "items": {"$ref": "#"}}, "recursive_schema", "recursive, at '#'"),
        (deep(40), "schema_too_large", "nested too deeply"),
        ({"enum": ["x" * 100 + str(n) for n in range(1000)]}, "schema_too_large", "too large"),
    ],
)
def test_fault_of_a_schema_names_its_field(client: openai.OpenAI, schema: Any, code: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(model="courts", messages=QUESTION, response_format=json_schema(schema))
    assert (caught.value.param, caught.value.code) == ("response_format.json_schema.schema", code)
    assert "answer:" not in caught.value.message, "our own rules are not the client's"


def test_shared_definition_is_not_recursive(url: str) -> None:
    schema: dict[str, Any] = {"$defs": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "type": "object"}
    schema["properties"] = {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#/$defs/n"}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    jsonschema.validate(json.loads(text_of(post(url, response_format=json_schema(schema)))), schema)


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


class Compilations:
    """Compiles, counts, and waits where the rule says so."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self.released = threading.Event()

    def __call__(self, grammar: Grammar) -> Constraint:
        self.rules.append(grammar.rule)
        if "slow" in grammar.rule:
            self.released.wait(60)
        return GRAMMARS.compile(grammar)


def test_grammar_is_compiled_once_for_a_tenant_and_the_oldest_is_dropped() -> None:
    compiled = Compilations()

    async def ask() -> None:
        cache = GrammarCache(compiled)
        form = ("guided_choice", Grammar.choices(["a"]))
        assert await cache.constraint(form, "acme") is await cache.constraint(form, "acme")
        await cache.constraint(form, "other")
        assert len(compiled.rules) == 2
        bad = ("guided_regex", Grammar.regex("("))
        for _ in range(2):
            with pytest.raises(ApiError, match="guided_regex is not supported"):
                await cache.constraint(bad, "acme")
        assert len(compiled.rules) == 3, "a refusal is kept, too"
        for number in range(structured.KEPT):
            await cache.constraint(("guided_choice", Grammar.choices([str(number)])), "acme")
        before = len(compiled.rules)
        await cache.constraint(form, "other")
        assert len(compiled.rules) == before
        await cache.constraint(form, "acme")
        assert len(compiled.rules) == before + 1

    asyncio.run(ask())


def test_grammar_that_takes_too_long_is_refused_and_the_event_loop_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 0.05)
    compiled = Compilations()

    async def ask() -> None:
        cache = GrammarCache(compiled)
        slow = asyncio.create_task(cache.constraint(("guided_choice", Grammar.choices(["slow"])), "hostile"))
        while not compiled.rules:
            await asyncio.sleep(0)  # the loop runs while the thread compiles
        with pytest.raises(ApiError, match="guided_choice is not supported: it takes over") as caught:
            await slow
        assert caught.value.status == 400
        compiled.released.set()
        monkeypatch.undo()  # a busy machine may take longer for a quick one
        assert await cache.constraint(("guided_choice", Grammar.choices(["quick"])), "acme")

    asyncio.run(ask())


def test_constraint_names_what_the_grammar_engine_refuses() -> None:
    with pytest.raises(UserError, match=r'Invalid constraint: Unimplemented keys: \["not"\]$'):
        GRAMMARS.compile(Grammar.json_schema({"not": {}}))
