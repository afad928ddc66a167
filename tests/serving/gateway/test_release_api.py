"""Releases at a running server: adapter, system prompt and constraint of an alias, before and after."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served_model import STOPS, TOKENIZER, decode, expected_answer, render
from tenant_server import ASKED, QUESTION, SHIP, Running, Stored, ask, deploy, tenant_server, until

from tunewright.chat.call_grammar import CallGrammars
from tunewright.data.examples import Message
from tunewright.generation.constraints import Grammar
from tunewright.generation.generate import generate
from tunewright.generation.requests import Request
from tunewright.serving.tenants import State
from tunewright.serving.tenants.releases import Candidate

pytest_plugins = ["tenant_server"]

# PostgreSQL has its turn where the state itself is tested, and in test_tenant_api.py.
pytestmark = pytest.mark.parametrize("state_url", ["sqlite"], indirect=True)

PROMPTS = {"one": "Give the court.", "two": "Give the config, please.", "three": "Name the ticket's owner."}
COURTS, STATES = {"Ala.", "Fla."}, {"Ohio", "Utah"}


@pytest.fixture
def prompted(adapters: dict[str, Stored]) -> dict[str, Stored]:
    """The adapters, each trained with a system prompt of its own."""
    return {name: replace(stored, system_prompt=PROMPTS[name]) for name, stored in adapters.items()}


@pytest.fixture
def server(state_url: str, two_tenants: dict[str, str], prompted: dict[str, Stored]) -> Iterator[Running]:
    with tenant_server(state_url, prompted) as running:
        yield running


def _rule(texts: set[str]) -> str:
    return Grammar.choices(sorted(texts)).rule


def _expected(model: Any, adapter: str, content: str, system: str | None) -> str:
    """Return the decoding loop's own answer."""
    system_turn = [] if system is None else [Message("system", system)]
    request = Request(render([*system_turn, Message("user", content)]), adapter, 9)
    (answer,) = generate(model, [request], stop_ids=STOPS, pad_id=TOKENIZER.pad_token_id, batch_size=1)
    return decode(answer.ids)


def _ask(server: Running, key: str, alias: str, content: str, *, stream: bool = False) -> tuple[str, str, str]:
    """The answer, the digest of what gave it, and where its system message came from."""
    body = {"model": alias, "messages": [{"role": "user", "content": content}], "max_tokens": 9, "stream": stream}
    headers = {"Authorization": f"Bearer {key}"}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, trust_env=False, timeout=60)
    assert reply.status_code == 200, reply.text
    if stream:
        chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    else:
        text = reply.json()["choices"][0]["message"]["content"]
    return text, reply.headers["x-tunewright-adapter"], reply.headers["x-tunewright-system"]


def _live(server: Running, number: int) -> None:
    until(lambda: any(f"courts: release {number} is live" in message for message in server.reported.messages))


@pytest.mark.slow
def test_release_drops_no_request(
    state_url: str, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], reference: Any
) -> None:
    with tenant_server(state_url, adapters) as server:
        _release_while_asking(server, state, two_tenants, adapters, reference)


def _release_while_asking(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], reference: Any
) -> None:
    answers: list[tuple[str, str, str]] = []
    over = threading.Event()

    def keep_asking(worker: int) -> None:
        client = server.client(two_tenants["acme"])
        for number in range(10_000):
            if over.is_set():
                return
            content = f"{worker} {number % 3}"
            answers.append((content, *ask(client, "courts", content, 8)))

    threads = [threading.Thread(target=keep_asking, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    try:
        for name in ("two", "three", "one"):
            deploy(state, "courts", adapters[name])
            digest = adapters[name].digest
            until(lambda digest=digest: any(by == digest for *_, by in answers[-4:]))  # type: ignore[misc]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    by_digest = {stored.digest: name for name, stored in adapters.items()}
    known: dict[tuple[str, str], str] = {}
    for content, text, digest in answers:
        name = by_digest[digest]
        if (content, name) not in known:
            known[content, name] = expected_answer(reference, name, content, 8)
        assert text == known[content, name], (content, name)
    assert {by_digest[digest] for *_, digest in answers} == {"one", "two", "three"}
    # What nothing answers with any more is no longer in memory; recipes still answers with "two".
    until(lambda: server.loaded == {adapters["one"].digest, adapters["two"].digest})


@pytest.mark.slow
def test_running_answer_keeps_its_adapter_during_a_release(
    state_url: str, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], reference: Any
) -> None:
    with tenant_server(state_url, adapters, stop_ids=frozenset()) as running:
        client = running.client(two_tenants["acme"])
        begun = client.chat.completions.with_raw_response.create(
            model="courts", messages=ASKED, max_tokens=700, stream=True
        )
        with begun.parse() as chunks:
            text = "".join(next(chunks).choices[0].delta.content or "" for _ in range(3))
            deploy(state, "courts", adapters["three"])
            until(lambda: ask(client, "courts", max_tokens=4)[1] == adapters["three"].digest)
            assert adapters["one"].digest in running.loaded
            text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert begun.headers["x-tunewright-adapter"] == adapters["one"].digest
        assert text == expected_answer_without_stop(reference, "one", QUESTION, 700)
        until(lambda: adapters["one"].digest not in running.loaded)


def expected_answer_without_stop(reference: Any, adapter: str, content: str, max_tokens: int) -> str:
    request = Request(render([Message("user", content)]), adapter, max_tokens)
    (answer,) = generate(reference, [request], stop_ids=(), pad_id=TOKENIZER.pad_token_id, batch_size=1)
    return decode(answer.ids)


def test_release_sets_system_prompt_and_constraint_until_it_is_rolled_back(
    server: Running, state: State, two_tenants: dict[str, str], prompted: dict[str, Stored], reference: Any
) -> None:
    digest, key = prompted["one"].digest, two_tenants["acme"]
    before = _ask(server, key, "courts", "case")
    assert before == (_expected(reference, "one", "case", PROMPTS["one"]), digest, "adapter")
    without = _expected(reference, "one", "case", None), digest, "none"
    assert without[0] != before[0]
    state.releases.deploy("courts", "one", digest, SHIP, system_prompt=False)
    _live(server, 2)
    assert _ask(server, key, "courts", "case") == without
    assert any("made without the adapter's system prompt" in message for message in server.reported.messages)

    state.releases.deploy("courts", "one", digest, SHIP, grammar=_rule(COURTS))
    _live(server, 3)
    client = server.client(key)
    assert ask(client, "courts")[0] in COURTS
    assert ask(client, "courts", response_format={"type": "text"})[0] in COURTS
    assert client.completions.create(model="courts", prompt="Which court?", max_tokens=12).choices[0].text in COURTS
    assert ask(client, "courts", extra_body={"guided_choice": sorted(STATES)})[0] in STATES, "the request's own form"
    assert any("requests that set no form get constrained answers" in each for each in server.reported.messages)
    assert ask(server.client(two_tenants["globex"]), "recipes")[0] not in COURTS, "another alias is free"

    state.releases.deploy("courts", "one", digest, SHIP, grammar=CallGrammars("required").rule)
    _live(server, 4)
    assert _ask(server, key, "courts", "case") == before, "calls are constrained where functions are declared"
    said = "calls are constrained to the functions of each request (required)"
    assert any(said in each for each in server.reported.messages)

    state.releases.rollback("courts", 2)
    _live(server, 5)
    assert _ask(server, key, "courts", "case") == without
    state.releases.rollback("courts", 1)
    _live(server, 6)
    assert _ask(server, key, "courts", "case") == before
    assert state.verify().faults == ()


@pytest.mark.parametrize("share", [None, 0.5])
def test_candidate_has_its_own_adapter_system_prompt_and_constraint(
    server: Running,
    state: State,
    two_tenants: dict[str, str],
    prompted: dict[str, Stored],
    reference: Any,
    share: float | None,
) -> None:
    key, one, three = two_tenants["acme"], prompted["one"].digest, prompted["three"].digest
    names = {one: "one", three: "three"}
    state.releases.start_candidate("courts", Candidate("three", three, share), SHIP)
    _live(server, 2)
    cases = [f"case {number}" for number in range(3 if share is None else 12)]
    answered = [_ask(server, key, "courts", case, stream=bool(place % 2)) for place, case in enumerate(cases)]
    for case, (text, digest, source) in zip(cases, answered, strict=True):
        name = names[digest]
        assert (text, source) == (_expected(reference, name, case, PROMPTS[name]), "adapter")
    if share is None:
        assert {digest for _, digest, _ in answered} == {one}
        until(lambda: len(state.usage.shadow_lines("courts")) == 3)
        for case, line in zip(cases, state.usage.shadow_lines("courts"), strict=True):
            assert line.answer == _expected(reference, "one", case, PROMPTS["one"])
            assert line.shadow_answer == _expected(reference, "three", case, PROMPTS["three"])
            assert (line.tenant, line.candidate, line.why_not) == ("acme", "three", None)
        assert [line.digest for line in state.usage.lines()] == [one] * 3, "the shadow is not billed"
    else:
        assert {digest for _, digest, _ in answered} == {one, three}  # all but 1 in 2,000 draws
        assert [_ask(server, key, "courts", case) for case in cases] == answered, "conversations keep their adapter"

    tried = Candidate("three", three, share, system_prompt=False, grammar=_rule(STATES))
    state.releases.start_candidate("courts", tried, SHIP)
    _live(server, 3)
    for case in cases:
        text, digest, source = _ask(server, key, "courts", case)
        assert (text in STATES, source) == ((True, "none") if digest == three else (False, "adapter"))
    if share is None:
        until(lambda: len(state.usage.shadow_lines("courts")) == 6)
        assert {line.shadow_answer for line in state.usage.shadow_lines("courts")[3:]} <= STATES
    promoted = state.releases.promote("courts")
    assert (promoted.adapter, promoted.grammar) == ("three", _rule(STATES))
    _live(server, 4)
    text, digest, source = _ask(server, key, "courts", cases[0])
    assert (text in STATES, digest, source) == (True, three, "none")
    assert state.verify().faults == ()


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


def test_withdrawn_alias_looks_unknown_and_its_adapter_is_unloaded(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    client = server.client(two_tenants["acme"])
    ask(client, "courts")
    state.releases.undeploy("courts")
    until(lambda: "courts" not in [model.id for model in client.models.list()])
    with pytest.raises(openai.NotFoundError) as undeployed:
        ask(client, "courts")
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, "nothing")
    assert undeployed.value.message == unknown.value.message.replace("nothing", "courts")
    until(lambda: adapters["one"].digest not in server.loaded)
    state.releases.rollback("courts")
    until(lambda: "courts" in [model.id for model in client.models.list()])
    assert ask(client, "courts")[1] == adapters["one"].digest


def test_release_that_fails_to_load_keeps_the_one_before_it_live(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    client = server.client(two_tenants["acme"])
    state.releases.deploy("courts", "elsewhere", "f" * 64, SHIP)
    until(lambda: any("failed to load release 2; release 1 stays live" in m for m in server.reported.messages))
    assert ask(client, "courts")[1] == adapters["one"].digest
    state.releases.rollback("courts")
    until(lambda: any("courts: release 3 is live" in m for m in server.reported.messages))
    assert ask(client, "courts")[1] == adapters["one"].digest


def test_alias_released_later_is_served(
    tmp_path: Path, state_url: str, state: State, adapters: dict[str, Stored]
) -> None:
    state.tenants.add("acme", ["courts"])
    key, _ = state.keys.create("acme")
    with tenant_server(state_url, adapters) as running:
        client = running.client(key)
        assert list(client.models.list()) == []
        deploy(state, "courts", adapters["one"])
        until(lambda: [model.id for model in client.models.list()] == ["courts"])
        assert ask(client, "courts")[1] == adapters["one"].digest
