"""Requests without a system message get the one that the adapter was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from scripted_engine import TOKENIZATION, ScriptedEngine
from scripted_engine import render as as_bytes
from served_model import STOPS, TOKENIZER, decode, render
from tenant_server import SHIP, Running, Stored, tenant_server, until

from tunewright.config import GatewayConfig
from tunewright.data.examples import Message
from tunewright.generation.generate import generate
from tunewright.generation.requests import Request
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import AnonymousAuth
from tunewright.serving.gateway.server import serving
from tunewright.serving.tenants import Candidate, State

pytest_plugins = ["two_tenants"]

PROMPTS = {"one": "Give the court.", "two": "Give the config, please.", "three": "Name the ticket's owner."}
USER = [{"role": "user", "content": "hello"}]
OWN = [{"role": "system", "content": "Be brief."}, *USER]


@contextmanager
def open_server(engine: ScriptedEngine, **limits: int) -> Iterator[httpx.Client]:
    access = AnonymousAuth({"base": None, "courts": "one", "plain": "two"}, {"courts": PROMPTS["one"]})
    gateway = Gateway(engine, access, TOKENIZATION, GatewayConfig.model_validate(limits))
    with serving(gateway.app) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        yield client


def _chat(client: httpx.Client, model: str, messages: Sequence[dict[str, str]], **more: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": model, "messages": list(messages), **more})


def _said(messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    return as_bytes([Message(m["role"], m["content"]) for m in messages])


@pytest.mark.parametrize(
    ("model", "messages", "source", "rendered"),
    [
        ("courts", USER, "adapter", [{"role": "system", "content": PROMPTS["one"]}, *USER]),
        ("courts", OWN, "request", OWN),
        ("plain", USER, "none", USER),
        ("plain", OWN, "request", OWN),
        ("base", USER, "none", USER),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_header_names_the_origin_of_the_system_message_and_usage_counts_it(
    model: str, messages: Any, source: str, rendered: Any, stream: bool
) -> None:
    engine = ScriptedEngine()
    with open_server(engine) as client:
        reply = _chat(client, model, messages, stream=stream)
        assert (reply.status_code, reply.headers["x-tunewright-system"]) == (200, source)
        assert engine.asked[-1][0].prompt_ids == _said(rendered)
        if not stream:
            assert reply.json()["usage"]["prompt_tokens"] == len(_said(rendered))


def test_completion_gets_no_system_prompt() -> None:
    engine = ScriptedEngine()
    with open_server(engine) as client:
        reply = client.post("/v1/completions", json={"model": "courts", "prompt": "Once"})
        assert (reply.status_code, reply.headers["x-tunewright-system"]) == (200, "none")
        assert engine.asked[-1][0].prompt_ids == tuple(b"Once")


def test_prompt_limit_includes_the_added_system_prompt() -> None:
    alone, whole = len(_said(USER)), len(_said([{"role": "system", "content": PROMPTS["one"]}, *USER]))
    with open_server(ScriptedEngine(), max_prompt_tokens=whole) as client:
        assert _chat(client, "courts", USER).status_code == 200
    with open_server(ScriptedEngine(), max_prompt_tokens=alone) as client:
        assert _chat(client, "plain", USER).status_code == 200
        refused = _chat(client, "courts", USER)
        assert refused.status_code == 400
        expected = f"The prompt is too long: {whole} tokens including the adapter's system prompt"
        assert expected in refused.json()["error"]["message"]
    with open_server(ScriptedEngine(context=whole + 1)) as client:
        assert _chat(client, "courts", USER, max_tokens=4).status_code == 200
    with open_server(ScriptedEngine(context=whole)) as client:
        refused = _chat(client, "courts", USER, max_tokens=4)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert "including the adapter's system prompt" in refused.json()["error"]["message"]


def test_prompt_is_tokenized_again_when_a_release_changes_the_system_prompt() -> None:
    engine = ScriptedEngine()
    access = AnonymousAuth({"courts": "one"}, {"courts": "before"})

    def slow(messages: Sequence[Message]) -> tuple[int, ...]:
        ids = as_bytes(messages)
        access.system_prompts["courts"] = "after"  # the alias is switched while this prompt is rendered
        return ids

    gateway = Gateway(engine, access, replace(TOKENIZATION, render=slow), GatewayConfig())
    with serving(gateway.app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        _chat(client, "courts", USER)
    assert [request.prompt_ids for request, _ in engine.asked] == [
        _said([{"role": "system", "content": "after"}, *USER])
    ]


@pytest.fixture
def prompted(adapters: dict[str, Stored]) -> dict[str, Stored]:
    """The adapters, each trained with a system prompt of its own."""
    return {name: replace(stored, system_prompt=PROMPTS[name]) for name, stored in adapters.items()}


@pytest.fixture
def server(state_url: str, two_tenants: dict[str, str], prompted: dict[str, Stored]) -> Iterator[Running]:
    with tenant_server(state_url, prompted) as running:
        yield running


def _expected(model: Any, adapter: str, content: str, system: str | None) -> str:
    """Return the decoding loop's own answer."""
    system_turn = [] if system is None else [Message("system", system)]
    request = Request(render([*system_turn, Message("user", content)]), adapter, 9)
    (answer,) = generate(model, [request], stop_ids=STOPS, pad_id=TOKENIZER.pad_token_id, batch_size=1)
    return decode(answer.ids)


def _ask(server: Running, key: str, alias: str, content: str) -> tuple[str, str, str]:
    """The answer, the digest of what gave it, and where its system message came from."""
    reply = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": alias, "messages": [{"role": "user", "content": content}], "max_tokens": 9},
        headers={"Authorization": f"Bearer {key}"},
        trust_env=False,
        timeout=60,
    )
    assert reply.status_code == 200, reply.text
    headers = reply.headers
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text, headers["x-tunewright-adapter"], headers["x-tunewright-system"]


def _live(server: Running, number: int) -> None:
    until(lambda: any(f"courts: release {number} is live" in message for message in server.reported.messages))


def test_each_tenant_gets_its_adapters_system_prompt(
    server: Running, two_tenants: dict[str, str], prompted: dict[str, Stored], reference: Any
) -> None:
    for _ in range(2):  # the second time with the prompts in the cache
        for tenant, alias, name in (("acme", "courts", "one"), ("globex", "recipes", "two")):
            expected = _expected(reference, name, "same words", PROMPTS[name])
            found = _ask(server, two_tenants[tenant], alias, "same words")
            assert found == (expected, prompted[name].digest, "adapter")
    reported = "\n".join(server.reported.messages)
    for alias, name in (("courts", "one"), ("recipes", "two")):
        assert f"{alias}, {name}: requests without a system message get the trained system prompt" in reported
        assert PROMPTS[name] in reported


def test_canary_gets_its_own_system_prompt(
    server: Running, state: State, two_tenants: dict[str, str], prompted: dict[str, Stored], reference: Any
) -> None:
    state.releases.start_candidate("courts", Candidate("three", prompted["three"].digest, 0.5), SHIP)
    _live(server, 2)
    answered = set()
    for number in range(12):
        text, digest, source = _ask(server, two_tenants["acme"], "courts", f"case {number}")
        name = "three" if digest == prompted["three"].digest else "one"
        answered.add(name)
        assert (text, source) == (_expected(reference, name, f"case {number}", PROMPTS[name]), "adapter")
    assert answered == {"one", "three"}  # all but 1 in 2,000 draws


@pytest.mark.parametrize("added", [True, False])
def test_shadow_gets_its_own_system_prompt(
    server: Running, state: State, two_tenants: dict[str, str], prompted: dict[str, Stored], reference: Any, added: bool
) -> None:
    state.releases.start_candidate("courts", Candidate("three", prompted["three"].digest, None, added), SHIP)
    _live(server, 2)
    assert _ask(server, two_tenants["acme"], "courts", "case")[0] == _expected(reference, "one", "case", PROMPTS["one"])
    until(lambda: len(state.usage.shadow_lines("courts")) == 1)
    (line,) = state.usage.shadow_lines("courts")
    assert line.answer == _expected(reference, "one", "case", PROMPTS["one"])
    assert line.shadow_answer == _expected(reference, "three", "case", PROMPTS["three"] if added else None)


def test_release_may_omit_the_system_prompt_and_rollback_restores_it(
    server: Running, state: State, two_tenants: dict[str, str], prompted: dict[str, Stored], reference: Any
) -> None:
    one, key = prompted["one"], two_tenants["acme"]
    state.releases.deploy("courts", "one", one.digest, SHIP, system_prompt=False)
    _live(server, 2)
    without = _expected(reference, "one", "case", None)
    assert without != _expected(reference, "one", "case", PROMPTS["one"])
    assert _ask(server, key, "courts", "case") == (without, one.digest, "none")
    assert any("made without the adapter's system prompt" in message for message in server.reported.messages)
    state.releases.rollback("courts")
    _live(server, 3)
    expected = _expected(reference, "one", "case", PROMPTS["one"])
    assert _ask(server, key, "courts", "case") == (expected, one.digest, "adapter")
