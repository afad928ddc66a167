"""Tenants as OpenAI's own client sees them: keys, aliases, limits, releases."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served_model import CONTEXT, build_model, expected_answer
from states import raw
from tenant_server import ASKED, QUESTION, SHIP, Running, Stored, ask, deploy, store_adapters, tenant_server, until

from tunewright.serving.state import Candidate, Limits, State


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    return store_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def oracle() -> Any:
    """The model that says what each adapter answers alone."""
    return build_model()


@pytest.fixture
def state(state_url: str) -> Iterator[State]:
    with State(state_url, "ann") as opened:
        yield opened


@pytest.fixture
def two_tenants(state: State, adapters: dict[str, Stored]) -> dict[str, str]:
    """The keys of acme, which may call courts, and of globex, which may call recipes."""
    keys = {}
    for tenant, alias, adapter in (("acme", "courts", "one"), ("globex", "recipes", "two")):
        deploy(state, alias, adapters[adapter])
        state.tenants.add(tenant, [alias])
        keys[tenant], _ = state.tenants.add_key(tenant)
    return keys


@pytest.fixture
def server(state_url: str, two_tenants: dict[str, str], adapters: dict[str, Stored]) -> Iterator[Running]:
    with tenant_server(state_url, adapters) as running:
        yield running


def test_each_tenant_sees_and_is_answered_by_its_own_alone(
    server: Running, two_tenants: dict[str, str], adapters: dict[str, Stored], oracle: Any
) -> None:
    for tenant, alias, adapter, foreign in (
        ("acme", "courts", "one", "recipes"),
        ("globex", "recipes", "two", "courts"),
    ):
        client = server.client(two_tenants[tenant])
        assert [model.id for model in client.models.list()] == [alias]
        assert ask(client, alias) == (expected_answer(oracle, adapter, QUESTION, 12), adapters[adapter].digest)
        bodies = []
        for name in (foreign, "nowhere"):
            with pytest.raises(openai.NotFoundError) as caught:
                ask(client, name)
            assert caught.value.response.status_code == 404
            bodies.append(caught.value.response.text.replace(name, "NAME"))
        assert bodies[0] == bodies[1]


def test_without_a_valid_key_nothing_is_answered(server: Running, two_tenants: dict[str, str]) -> None:
    key = two_tenants["acme"]
    unknown = "Bearer tw_0000000000_" + "A" * 43
    for header in (
        None,
        "",
        "Bearer",
        f"Basic {key}",
        key,
        unknown,
        f"Bearer {key}x",
        f"Bearer {key[:-1]}",
        "Bearer x",
    ):
        headers = {} if header is None else {"Authorization": header}
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
            reply = httpx.request(method, server.url + path, headers=headers, content=b"{")
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (401, "invalid_api_key"), header
            assert error["type"] == "invalid_request_error"
            assert reply.headers["www-authenticate"] == "Bearer"
            assert "courts" not in reply.text


def test_health_says_without_a_key_that_it_is_well_and_no_more(server: Running) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_key_is_revoked_from_the_next_request_on(server: Running, state: State, two_tenants: dict[str, str]) -> None:
    client = server.client(two_tenants["acme"])
    ask(client, "courts")
    (key,) = state.tenants.keys_of("acme")
    state.tenants.revoke_key(key.prefix)
    with pytest.raises(openai.AuthenticationError, match="revoked"):
        ask(client, "courts")


def test_each_request_is_metered_with_what_openai_is_told(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    client = server.client(two_tenants["acme"])
    told = client.chat.completions.create(model="courts", messages=ASKED, max_tokens=12).usage
    assert told is not None
    options: Any = {"include_usage": True}
    *_, last = client.chat.completions.create(
        model="courts", messages=ASKED, max_tokens=7, stream=True, stream_options=options
    )
    assert last.usage is not None
    until(lambda: all(line.outcome for line in state.meter.lines()))
    whole, stream = state.meter.lines()
    assert (whole.tenant, whole.alias, whole.digest) == ("acme", "courts", adapters["one"].digest)
    assert (whole.prompt_tokens, whole.completion_tokens) == (told.prompt_tokens, told.completion_tokens)
    assert (stream.prompt_tokens, stream.completion_tokens) == (last.usage.prompt_tokens, last.usage.completion_tokens)
    for line in (whole, stream):
        assert line.queued_s is not None and line.first_token_s is not None and line.total_s is not None
        assert 0 <= line.queued_s <= line.first_token_s <= line.total_s
        assert line.outcome in ("stop", "length")


def test_over_a_limit_the_client_is_told_when_to_come_back(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    state.tenants.limit("acme", Limits(requests_per_minute=2))
    client = server.client(two_tenants["acme"])
    ask(client, "courts")
    ask(client, "courts")
    with pytest.raises(openai.RateLimitError, match=r"requests a minute \(2\) is reached") as caught:
        ask(client, "courts")
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    ask(server.client(two_tenants["globex"]), "recipes")  # another tenant's business
    state.tenants.limit("acme", Limits())
    ask(client, "courts")


def test_a_request_that_may_use_more_than_a_minute_allows_is_a_mistake(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    state.tenants.limit("acme", Limits(tokens_per_minute=1000))
    client = server.client(two_tenants["acme"])
    with pytest.raises(openai.BadRequestError, match="Ask for fewer") as caught:
        client.chat.completions.create(model="courts", messages=ASKED)
    assert (caught.value.code, caught.value.param) == ("request_over_limit", "max_tokens")
    for _ in range(3):  # each reserves far more than it uses
        ask(client, "courts", max_tokens=700, stop="e")
        until(lambda: all(line.outcome for line in state.meter.lines("acme")))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_no_longer_under_way(
    state_url: str, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], stream: bool
) -> None:
    state.tenants.limit("acme", Limits(concurrency=1))

    async def hang_up(url: str) -> None:
        headers = {"Authorization": f"Bearer {two_tenants['acme']}"}
        body = {"model": "courts", "messages": ASKED, "max_tokens": CONTEXT - 1000, "stream": stream}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while not await asyncio.to_thread(state.meter.lines):
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/chat/completions", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            await asyncio.sleep(0.2)  # some tokens
            asking.cancel()

    with tenant_server(state_url, adapters, stop_ids=frozenset()) as running:
        asyncio.run(hang_up(running.url))
        until(lambda: state.meter.lines()[0].outcome is not None)
        (line,) = state.meter.lines()
        assert line.outcome == "hung up"
        assert line.completion_tokens is not None
        assert line.completion_tokens < CONTEXT - 1000
        ask(running.client(two_tenants["acme"]), "courts")


def test_a_release_is_taken_without_dropping_a_request(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], oracle: Any
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
            known[content, name] = expected_answer(oracle, name, content, 8)
        assert text == known[content, name], (content, name)
    assert {by_digest[digest] for *_, digest in answers} == {"one", "two", "three"}
    # What nothing answers with any more is no longer in memory; recipes still answers with "two".
    until(lambda: server.loaded == {adapters["one"].digest, adapters["two"].digest})


def test_an_answer_under_way_ends_on_the_adapter_it_began_with(
    state_url: str, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], oracle: Any
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
        assert text == expected_answer_without_stop(oracle, "one", QUESTION, 700)
        until(lambda: adapters["one"].digest not in running.loaded)


def expected_answer_without_stop(oracle: Any, adapter: str, content: str, max_tokens: int) -> str:
    from served_model import TOKENIZER, decode, render

    from tunewright.data.examples import Message
    from tunewright.models.decoding import Request, generate

    request = Request(render([Message("user", content)]), adapter, max_tokens)
    (answer,) = generate(oracle, [request], stop_ids=(), pad_id=TOKENIZER.pad_token_id, batch_size=1)
    return decode(answer.ids)


def test_a_rollback_brings_the_former_answers_back(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    client = server.client(two_tenants["acme"])
    before = ask(client, "courts")
    deploy(state, "courts", adapters["three"])
    until(lambda: ask(client, "courts")[1] == adapters["three"].digest)
    state.releases.rollback("courts")
    until(lambda: ask(client, "courts") == before)


def test_a_release_that_cannot_be_loaded_is_not_taken(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    client = server.client(two_tenants["acme"])
    state.releases.deploy("courts", "elsewhere", "f" * 64, SHIP)
    until(lambda: any("release 2 cannot be taken, it goes on with release 1" in m for m in server.told.messages))
    assert ask(client, "courts")[1] == adapters["one"].digest
    state.releases.rollback("courts")
    until(lambda: any("courts: release 3 is live" in m for m in server.told.messages))
    assert ask(client, "courts")[1] == adapters["one"].digest


def test_a_canary_answers_its_share_and_sticks_to_conversations(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], oracle: Any
) -> None:
    client = server.client(two_tenants["acme"])
    state.releases.try_beside("courts", Candidate("three", adapters["three"].digest, 0.5), SHIP)
    until(lambda: any("release 2 is live" in message for message in server.told.messages))
    first = [ask(client, "courts", f"case {number}", 4) for number in range(24)]
    again = [ask(client, "courts", f"case {number}", 4) for number in range(24)]
    assert first == again
    share = [digest for _, digest in first].count(adapters["three"].digest) / 24
    assert 0.1 < share < 0.9  # all but 4 in 100,000 draws
    for number, (text, digest) in enumerate(first):
        name = "three" if digest == adapters["three"].digest else "one"
        assert text == expected_answer(oracle, name, f"case {number}", 4)
    state.releases.promote("courts")
    until(lambda: any("release 3 is live" in message for message in server.told.messages))
    assert {ask(client, "courts", f"case {number}", 4)[1] for number in range(10)} == {adapters["three"].digest}


@pytest.mark.parametrize("stream", [False, True])
def test_a_shadow_is_asked_and_recorded_and_never_heard(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], oracle: Any, stream: bool
) -> None:
    client = server.client(two_tenants["acme"])
    state.releases.try_beside("courts", Candidate("three", adapters["three"].digest, None), SHIP)
    until(lambda: any("release 2 is live" in message for message in server.told.messages))
    for number in range(3):
        expected = expected_answer(oracle, "one", f"case {number}", 9)
        if stream:
            messages: list[Any] = [{"role": "user", "content": f"case {number}"}]
            chunks = client.chat.completions.create(model="courts", messages=messages, max_tokens=9, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        else:
            assert ask(client, "courts", f"case {number}", 9) == (expected, adapters["one"].digest)
    until(lambda: len(state.meter.shadow_lines("courts")) == 3)
    for number, line in enumerate(state.meter.shadow_lines("courts")):
        assert line.answer == expected_answer(oracle, "one", f"case {number}", 9)
        assert line.shadow_answer == expected_answer(oracle, "three", f"case {number}", 9)
        assert (line.tenant, line.candidate, line.why_not) == ("acme", "three", None)
    assert [line.digest for line in state.meter.lines()] == [adapters["one"].digest] * 3  # not billed


def test_two_servers_on_one_state_agree_on_limits_and_releases(
    state_url: str, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    state.tenants.limit("acme", Limits(requests_per_minute=10))
    with tenant_server(state_url, adapters) as one, tenant_server(state_url, adapters) as two:
        until(lambda: len(state.meter.servers()) == 2)

        async def burst() -> list[int]:
            headers = {"Authorization": f"Bearer {two_tenants['acme']}"}
            body = {"model": "courts", "messages": ASKED, "max_tokens": 2}
            async with httpx.AsyncClient(headers=headers, timeout=60) as client:
                urls = [(one, two)[number % 2].url for number in range(30)]
                replies = await asyncio.gather(*(client.post(f"{u}/v1/chat/completions", json=body) for u in urls))
            return [reply.status_code for reply in replies]

        codes = asyncio.run(burst())
        assert (codes.count(200), codes.count(429)) == (10, 20)
        deploy(state, "recipes", adapters["three"])
        for server in (one, two):
            client = server.client(two_tenants["globex"])
            until(lambda client=client: ask(client, "recipes")[1] == adapters["three"].digest)  # type: ignore[misc]
        newest = state.releases.newest()
        until(lambda: [release for _, release in state.meter.servers()] == [newest, newest])
    assert state.meter.servers() == []


def test_when_the_state_does_not_answer_nobody_is_let_in(
    server: Running, state_url: str, two_tenants: dict[str, str]
) -> None:
    client = server.client(two_tenants["acme"])
    ask(client, "courts")
    with raw(state_url) as execute:
        execute("ALTER TABLE api_keys RENAME TO elsewhere")
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "courts")
    assert (caught.value.response.status_code, caught.value.code) == (503, "state_unavailable")
    assert "api_keys" not in caught.value.response.text
    with raw(state_url) as execute:
        execute("ALTER TABLE elsewhere RENAME TO api_keys")
    ask(client, "courts")


def test_who_comes_in_does_not_wait_for_another_process_that_writes(
    server: Running, state_url: str, two_tenants: dict[str, str]
) -> None:
    client = server.client(two_tenants["acme"])
    begun = client.chat.completions.create(model="courts", messages=ASKED, max_tokens=300, stream=True)
    with begun as chunks, ThreadPoolExecutor(1) as thread:
        next(chunks)
        with raw(state_url) as execute:
            execute("UPDATE tenants SET name = name")  # SQLite has one writer, PostgreSQL one for each line
            asked = thread.submit(ask, client, "courts")
            assert [model.id for model in client.models.list()] == ["courts"]
            assert list(chunks)[-1].choices[0].finish_reason
            assert not asked.done()
        assert asked.result()


def test_aliases_that_come_later_are_served_too(
    tmp_path: Path, state_url: str, state: State, adapters: dict[str, Stored]
) -> None:
    state.tenants.add("acme", ["courts"])
    key, _ = state.tenants.add_key("acme")
    with tenant_server(state_url, adapters) as running:
        client = running.client(key)
        assert list(client.models.list()) == []
        deploy(state, "courts", adapters["one"])
        until(lambda: [model.id for model in client.models.list()] == ["courts"])
        assert ask(client, "courts")[1] == adapters["one"].digest
