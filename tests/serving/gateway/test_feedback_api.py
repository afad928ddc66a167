"""Feedback on answers, by the id that a client received."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import pytest
from served_model import build_model, running_server
from states import raw
from tenant_server import ASKED, Running, until

from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import Limits

pytest_plugins = ["tenant_server"]

on_sqlite = pytest.mark.parametrize("state_url", ["sqlite"], indirect=True)
"""For what does not depend on the database."""


def send(url: str, key: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        f"{url}/v1/feedback", headers={"Authorization": f"Bearer {key}"}, content=content, trust_env=False
    )


def answer_id(client: openai.OpenAI) -> str:
    return client.chat.completions.create(model="courts", messages=ASKED, max_tokens=3).id


def test_feedback_is_stored_with_the_request_of_every_format(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    key = two_tenants["acme"]
    client = server.client(key)
    answered: dict[str, list[str]] = {"chatcmpl-": [], "cmpl-": [], "resp_": [], "msg_": []}
    how: Any = {"model": "courts", "messages": ASKED, "max_tokens": 3}
    answered["chatcmpl-"].append(client.chat.completions.create(**how).id)
    (streamed,) = {chunk.id for chunk in client.chat.completions.create(**how, stream=True)}
    answered["chatcmpl-"].append(streamed)
    text: Any = {"model": "courts", "prompt": ["District", "Court"], "max_tokens": 3}
    answered["cmpl-"].append(client.completions.create(**text).id)
    (streamed,) = {chunk.id for chunk in client.completions.create(**text, stream=True)}
    answered["cmpl-"].append(streamed)
    asked: Any = {"model": "courts", "input": "District", "max_output_tokens": 3}
    answered["resp_"].append(client.responses.create(**asked).id)
    *_, last = client.responses.create(**asked, stream=True)
    answered["resp_"].append(last.response.id)
    with (
        anthropic.DefaultHttpxClient(trust_env=False) as http,
        anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, http_client=http) as other,
    ):
        answered["msg_"].append(other.messages.create(**how).id)
        first, *_ = other.messages.create(**how, stream=True)
        answered["msg_"].append(first.message.id)
    ids = [response_id for each in answered.values() for response_id in each]
    assert all(response_id.startswith(prefix) for prefix, each in answered.items() for response_id in each)
    for response_id in ids:
        reply: Any = client.post("/feedback", body={"id": response_id, "thumb": "up"}, cast_to=object)
        assert reply == {"id": response_id, "object": "feedback", "status": "recorded", "redacted": {}}
    lines = state.feedback.lines()
    assert [line.response_id for line in lines] == ids
    assert [line.request for line in lines] == [line.id for line in state.usage.lines()]
    assert {(line.tenant, line.alias, line.thumb) for line in lines} == {("acme", "courts", "up")}


def test_newest_feedback_counts_and_the_same_changes_nothing(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    key = two_tenants["acme"]
    up = {"id": answer_id(server.client(key)), "thumb": "up", "score": 1, "reason": "short"}
    down = {"id": up["id"], "thumb": "down", "correction": "D. Minn."}
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda body: send(server.url, key, body).json()["status"], [up] * 8))
    assert sorted(replies) == ["recorded", *["unchanged"] * 7]
    before = state.feedback.lines()
    assert send(server.url, key, up).json()["status"] == "unchanged"
    assert state.feedback.lines() == before
    assert send(server.url, key, down).json()["status"] == "replaced"
    (line,) = state.feedback.lines()
    assert (line.thumb, line.score, line.correction, line.reason) == ("down", None, "D. Minn.", None)
    assert send(server.url, key, down).json()["status"] == "unchanged"


def test_another_tenants_request_and_a_forged_id_are_equally_unknown(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    response_id = answer_id(server.client(two_tenants["acme"]))
    forged = ("chatcmpl-" + "0" * 32, response_id.replace("chatcmpl-", "msg_"), response_id.removeprefix("chatcmpl-"))
    refused = set()
    for key, name in ((two_tenants["globex"], response_id), *((two_tenants["acme"], name) for name in forged)):
        reply = send(server.url, key, {"id": name, "thumb": "up"})
        assert reply.status_code == 404
        refused.add(reply.text.replace(name, "ID"))
    (text,) = refused
    assert json.loads(text)["error"]["code"] == "request_not_found"
    assert send(server.url, "none", {"id": response_id, "thumb": "up"}).status_code == 401
    assert state.feedback.lines() == []


def test_secrets_and_personal_data_are_replaced_before_feedback_is_stored(
    server: Running, state: State, state_url: str, two_tenants: dict[str, str]
) -> None:
    key = two_tenants["acme"]
    texts = {"correction": f"Ask maria@uni-bonn.de, key {key}.", "reason": "maria@uni-bonn.de said so"}
    reply = send(server.url, key, {"id": answer_id(server.client(key)), **texts})
    assert reply.json()["redacted"] == {"email": 2, "tunewright_key": 1}
    (line,) = state.feedback.lines()
    assert (line.correction, line.reason) == ("Ask <EMAIL_1>, key <TUNEWRIGHT_KEY_1>.", "<EMAIL_1> said so")
    with raw(state_url) as execute:
        stored = str(execute("SELECT * FROM feedback").all())
    assert "maria" not in stored and key not in stored


@on_sqlite
def test_invalid_feedback_is_refused_by_name_and_keeps_the_stored(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    key = two_tenants["acme"]
    good = {"id": answer_id(server.client(key)), "thumb": "up"}
    send(server.url, key, good)
    before = state.feedback.lines()
    for wrong, status, code, param in (
        ({"id": good["id"]}, 400, "missing_required_parameter", None),
        ({"id": good["id"], "thumb": None}, 400, "missing_required_parameter", None),
        ({"thumb": "up"}, 400, "missing_required_parameter", "id"),
        (good | {"thumb": "sideways"}, 400, "invalid_value", "thumb"),
        (good | {"score": 1.5}, 400, "invalid_value", "score"),
        (good | {"score": float("nan")}, 400, "invalid_value", "score"),
        (good | {"score": True}, 400, "invalid_value", "score"),
        (good | {"reason": ""}, 400, "invalid_value", "reason"),
        (good | {"correction": "a\0b"}, 400, "invalid_value", "correction"),
        (good | {"correction": "x" * 16_385}, 400, "invalid_value", "correction"),
        (good | {"id": "a\0b"}, 400, "invalid_value", "id"),
        (good | {"tenant": "globex"}, 400, "unsupported_parameter", "tenant"),
        (b"{", 400, "invalid_json", None),
        (b" " * 131_073, 413, "body_too_large", None),
    ):
        reply = send(server.url, key, wrong)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (status, code, param), wrong
    assert state.feedback.lines() == before


@on_sqlite
def test_feedback_counts_towards_requests_per_minute(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    key = two_tenants["acme"]
    response_id = answer_id(server.client(key))
    state.tenants.limit("acme", Limits(requests_per_minute=4))
    statuses = [send(server.url, key, {"id": name, "thumb": "up"}).status_code for name in (response_id, "x", "x", "x")]
    assert statuses == [200, 404, 404, 429]


def test_feedback_on_an_answer_in_progress_is_recorded(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    key = two_tenants["acme"]
    stream = server.client(key).chat.completions.create(model="courts", messages=ASKED, max_tokens=50_000, stream=True)
    with stream as chunks:
        response_id = next(chunks).id
        assert send(server.url, key, {"id": response_id, "thumb": "down"}).json()["status"] == "recorded"
        (line,) = state.usage.lines()
        assert line.outcome is None
    until(lambda: state.usage.lines()[0].outcome == "disconnected")
    assert [line.thumb for line in state.feedback.lines()] == ["down"]


def test_feedback_needs_a_server_with_tenants() -> None:
    with running_server(build_model()) as url:
        reply = send(url, "none", {"id": "chatcmpl-0", "thumb": "up"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "feedback_not_supported")
    assert "tunewright tenant add" in reply.json()["error"]["message"]
