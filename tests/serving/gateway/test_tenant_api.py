"""Tenants through OpenAI's client: keys, aliases, limits and releases."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted_engine import ScriptedEngine
from served_model import CONTEXT, expected_answer
from states import raw, reservation, with_tenant
from tenant_server import ASKED, QUESTION, Running, Stored, ask, deploy, tenant_server, until

from tunewright.adapters.lineage import SystemPrompt
from tunewright.core.progress import LogReporter
from tunewright.serving.gateway.auth import ServedAdapter
from tunewright.serving.gateway.tenant_auth import POLL_SECONDS, TenantAuth
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import Limits, Quota, Reservation

pytest_plugins = ["tenant_server"]

on_sqlite = pytest.mark.parametrize("state_url", ["sqlite"], indirect=True)
"""For what does not depend on the database."""


def test_tenant_sees_only_its_own_models_and_answers(
    server: Running, two_tenants: dict[str, str], adapters: dict[str, Stored], reference: Any
) -> None:
    for tenant, alias, adapter, foreign in (
        ("acme", "courts", "one", "recipes"),
        ("globex", "recipes", "two", "courts"),
    ):
        client = server.client(two_tenants[tenant])
        assert [model.id for model in client.models.list()] == [alias]
        assert ask(client, alias) == (expected_answer(reference, adapter, QUESTION, 12), adapters[adapter].digest)
        bodies = []
        for name in (foreign, "nowhere"):
            with pytest.raises(openai.NotFoundError) as caught:
                ask(client, name)
            assert caught.value.response.status_code == 404
            bodies.append(caught.value.response.text.replace(name, "NAME"))
        assert bodies[0] == bodies[1]


@on_sqlite
def test_request_without_a_valid_key_is_refused(server: Running, two_tenants: dict[str, str]) -> None:
    key = two_tenants["acme"]
    unknown = "Bearer tw_0000000000_" + "A" * 43 + "0UYFdY"  # the checksum is right
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


@on_sqlite
def test_health_reveals_no_load_without_a_key(server: Running) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_revoked_key_is_refused_from_the_next_request(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    client = server.client(two_tenants["acme"])
    ask(client, "courts")
    (key,) = state.keys.list("acme")
    state.keys.revoke(key.prefix)
    with pytest.raises(openai.AuthenticationError, match="revoked"):
        ask(client, "courts")


def test_recorded_usage_equals_the_usage_in_the_response(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    client = server.client(two_tenants["acme"])
    message = client.chat.completions.create(model="courts", messages=ASKED, max_tokens=12).usage
    assert message is not None
    options: Any = {"include_usage": True}
    *_, last = client.chat.completions.create(
        model="courts", messages=ASKED, max_tokens=7, stream=True, stream_options=options
    )
    assert last.usage is not None
    until(lambda: all(line.outcome for line in state.usage.lines()))
    whole, stream = state.usage.lines()
    assert (whole.tenant, whole.alias, whole.digest) == ("acme", "courts", adapters["one"].digest)
    assert (whole.prompt_tokens, whole.completion_tokens) == (message.prompt_tokens, message.completion_tokens)
    assert (stream.prompt_tokens, stream.completion_tokens) == (last.usage.prompt_tokens, last.usage.completion_tokens)
    for line in (whole, stream):
        assert line.queued_s is not None and line.first_token_s is not None and line.total_s is not None
        assert 0 <= line.queued_s <= line.first_token_s <= line.total_s
        assert line.outcome in ("stop", "length")


@on_sqlite
def test_rate_limited_response_has_retry_after(server: Running, state: State, two_tenants: dict[str, str]) -> None:
    state.tenants.limit("acme", Limits(requests_per_minute=2))
    client = server.client(two_tenants["acme"])
    ask(client, "courts")
    ask(client, "courts")
    with pytest.raises(openai.RateLimitError, match=r"2 requests in the last 60 seconds \(limit 2\)") as caught:
        ask(client, "courts")
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    ask(server.client(two_tenants["globex"]), "recipes")  # another tenant's business
    state.tenants.limit("acme", Limits())
    ask(client, "courts")


def post(server: Running, key: str, **request: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/chat/completions", headers=headers, trust_env=False, timeout=60, **request)


@on_sqlite
def test_refused_requests_count_towards_requests_per_minute(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    state.tenants.limit("acme", Limits(requests_per_minute=7))
    key = two_tenants["acme"]
    client = server.client(key)
    client.models.list()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nowhere")
    long = [{"role": "user", "content": "x " * CONTEXT}]
    refused = [
        post(server, key, content=b"{"),
        post(server, key, json={"model": "nowhere", "messages": ASKED}),
        post(server, key, json={"model": "courts", "messages": long}),
        post(server, key, content=b"x" * 10_000_000),
    ]
    assert [reply.status_code for reply in refused] == [400, 404, 400, 413]
    ask(client, "courts")
    with pytest.raises(openai.RateLimitError):
        client.models.list()
    for _ in range(3):  # these are not counted, or a client that retries would never be answered
        reply = post(server, key, content=b"{")
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "7 requests in the last 60 seconds (limit 7)" in reply.json()["error"]["message"]
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert len(state.usage.lines("acme")) == 1
    ask(server.client(two_tenants["globex"]), "recipes")
    state.tenants.limit("acme", Limits(requests_per_minute=8))
    ask(client, "courts")


def test_two_servers_share_limits_and_releases(
    state_url: str, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    body = {"model": "courts", "messages": ASKED, "max_tokens": 2}

    async def burst(urls: list[str], **content: Any) -> Counter[int]:
        """The status codes; no request has been recorded when the last one arrives."""
        headers = {"Authorization": f"Bearer {two_tenants['acme']}"}
        async with httpx.AsyncClient(headers=headers, timeout=60) as client:
            asked = (client.post(f"{urls[n % len(urls)]}/v1/chat/completions", **content) for n in range(30))
            return Counter(reply.status_code for reply in await asyncio.gather(*asked))

    with tenant_server(state_url, adapters) as one, tenant_server(state_url, adapters) as two:
        until(lambda: len(state.quota.servers()) == 2)
        state.tenants.limit("acme", Limits(requests_per_minute=4))
        assert asyncio.run(burst([one.url], content=b"{")) == {400: 4, 429: 26}
        assert post(two, two_tenants["acme"], content=b"{").status_code == 429
        state.tenants.limit("acme", Limits(requests_per_minute=10))
        assert asyncio.run(burst([one.url, two.url], json=body)) == {200: 6, 429: 24}
        state.tenants.limit("acme", Limits(requests_per_minute=40))
        assert asyncio.run(burst([one.url], json=body)) == {200: 30}
        deploy(state, "recipes", adapters["three"])
        for server in (one, two):
            client = server.client(two_tenants["globex"])
            until(lambda client=client: ask(client, "recipes")[1] == adapters["three"].digest)  # type: ignore[misc]
        newest = state.releases.newest()
        until(lambda: [release for _, release in state.quota.servers()] == [newest, newest])
    assert state.quota.servers() == []


@on_sqlite
def test_requests_refused_by_another_limit_count_towards_requests_per_minute(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    state.tenants.limit("acme", Limits(requests_per_minute=3, tokens_per_minute=100))
    client = server.client(two_tenants["acme"])
    for _ in range(3):
        with pytest.raises(openai.BadRequestError, match="Lower max_tokens"):
            client.chat.completions.create(model="courts", messages=ASKED, max_tokens=101)
    with pytest.raises(openai.RateLimitError, match="3 requests"):
        ask(client, "courts")


@on_sqlite
def test_request_that_disconnects_within_its_body_counts_and_logs_nothing(
    server: Running, state: State, two_tenants: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    state.tenants.limit("acme", Limits(requests_per_minute=3))
    key = two_tenants["acme"]
    address = httpx.URL(server.url)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 100\r\n\r\n"
    )
    for _ in range(3):
        with socket.create_connection((address.host, address.port or 0)) as connection:
            connection.sendall(head.encode() + b"{")
    until(lambda: post(server, key, content=b"{").status_code == 429)
    assert not caplog.records


@on_sqlite
def test_two_authorization_headers_are_refused(server: Running, two_tenants: dict[str, str]) -> None:
    own, other = (f"Bearer {two_tenants[tenant]}" for tenant in ("acme", "globex"))
    for first, second in ((own, other), (own, own), ("", own)):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
            headers = [("Authorization", first), ("Authorization", second)]
            reply = httpx.request(method, server.url + path, headers=headers, content=b"{", trust_env=False)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "duplicate_authorization")


@on_sqlite
def test_request_over_the_token_limit_by_itself_is_a_bad_request(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    state.tenants.limit("acme", Limits(tokens_per_minute=1000))
    client = server.client(two_tenants["acme"])
    with pytest.raises(openai.BadRequestError, match="Lower max_tokens") as caught:
        client.chat.completions.create(model="courts", messages=ASKED, max_tokens=1000)
    assert (caught.value.code, caught.value.param) == ("request_over_limit", "max_tokens")
    # A request with an SDK's defaults is kept within the limit instead.
    answer = client.chat.completions.create(model="courts", messages=ASKED, stop="e")
    assert answer.choices[0].finish_reason == "stop"
    until(lambda: all(line.outcome for line in state.usage.lines("acme")))
    for _ in range(2):  # each reserves far more than it uses
        ask(client, "courts", max_tokens=700, stop="e")
        until(lambda: all(line.outcome for line in state.usage.lines("acme")))


@on_sqlite
@pytest.mark.parametrize("stream", [False, True])
def test_disconnected_request_no_longer_counts_as_concurrent(
    state_url: str, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored], stream: bool
) -> None:
    state.tenants.limit("acme", Limits(concurrency=1))

    async def hang_up(url: str) -> None:
        headers = {"Authorization": f"Bearer {two_tenants['acme']}"}
        body = {"model": "courts", "messages": ASKED, "max_tokens": CONTEXT - 1000, "stream": stream}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while not await asyncio.to_thread(state.usage.lines):
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/chat/completions", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            await asyncio.sleep(0.2)  # some tokens
            asking.cancel()

    with tenant_server(state_url, adapters, stop_ids=frozenset()) as running:
        asyncio.run(hang_up(running.url))
        until(lambda: state.usage.lines()[0].outcome is not None)
        (line,) = state.usage.lines()
        assert line.outcome == "disconnected"
        assert line.completion_tokens is not None
        assert line.completion_tokens < CONTEXT - 1000
        ask(running.client(two_tenants["acme"]), "courts")


@pytest.mark.slow
@pytest.mark.parametrize("table", ["api_keys", "requests"])
def test_server_is_not_ready_while_the_state_refuses_requests(
    server: Running, state_url: str, two_tenants: dict[str, str], table: str
) -> None:
    def ready() -> tuple[int, str]:
        reply = httpx.get(f"{server.url}/ready", trust_env=False)
        return reply.status_code, reply.json()["status"]

    client = server.client(two_tenants["acme"])
    ask(client, "courts")
    assert ready() == (200, "ready")
    with raw(state_url) as execute:
        execute(f"ALTER TABLE {table} RENAME TO elsewhere")
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "courts")
    assert "api_keys" not in caught.value.response.text
    looked = len(server.reported.messages)
    for _ in range(3 * int(1 / POLL_SECONDS)):
        assert ready() == (503, "unavailable")
        time.sleep(POLL_SECONDS)
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
    assert len(server.reported.messages) <= looked + 1
    with raw(state_url) as execute:
        execute(f"ALTER TABLE elsewhere RENAME TO {table}")
    until(lambda: ready() == (200, "ready"))
    ask(client, "courts")


def test_authentication_does_not_wait_for_a_writer(
    server: Running, state_url: str, two_tenants: dict[str, str]
) -> None:
    client = server.client(two_tenants["acme"])
    begun = client.chat.completions.create(model="courts", messages=ASKED, max_tokens=40, stream=True)
    with begun as chunks, ThreadPoolExecutor(1) as thread:
        next(chunks)
        with raw(state_url) as execute:
            execute("UPDATE tenants SET name = name")  # SQLite has one writer, PostgreSQL one for each line
            assert list(chunks)[-1].choices[0].finish_reason
            asked = thread.submit(ask, client, "courts")  # fails after 4 s, so nothing slow may follow
            assert [model.id for model in client.models.list()] == ["courts"]
            assert not asked.done()
        assert asked.result()


def test_reservation_does_not_wait_for_all_of_another_tenants_reservations(
    state_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve_in_state, begun, answered = Quota.reserve, Counter[int](), threading.Event()

    def reserve_in_turn(quota: Quota, one: Reservation, gateway: str) -> int:
        begun[one.tenant_id] += 1
        if begun[one.tenant_id] == 2:  # only the busy tenant has a second one
            answered.wait(30)
        number = reserve_in_state(quota, one, gateway)
        if one.tenant_id == quiet.tenant_id:
            answered.set()
        return number

    monkeypatch.setattr(Quota, "reserve", reserve_in_turn)
    monkeypatch.setattr("tunewright.serving.tenants.database.ANSWER_SECONDS", 60.0)
    served = ServedAdapter(tmp_path, SystemPrompt(None))
    with State(state_url) as state:
        busy, quiet = (reservation(*with_tenant(state, name)) for name in ("acme", "globex"))
        access = TenantAuth(State(state_url), ScriptedEngine(), lambda _name, _digest: served, LogReporter())

        async def reserve() -> list[int]:
            async with access.running(lambda _callers: None):
                # All of them at once, the quiet one last: the numbers are in the order of the reservations.
                return await asyncio.gather(*(access.reserve(one) for one in (*[busy] * 20, quiet)))

        *others, number = asyncio.run(reserve())
        assert number < others[1]
        assert others == sorted(others)
        assert not access._reserving
