"""The gateway's limits of size and time, by the responses of clients."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine, render, scripted_server, until

from tunewright.core.text import normalize
from tunewright.data.examples import Message
from tunewright.serving.gateway import schemas
from tunewright.serving.gateway.responses import EventStreamResponse

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
MARKS = "\u0300\u0316" * 16
MARK_PARTS = [{"type": "text", "text": MARKS[:16]}, {"type": "text", "text": MARKS[16:]}]
"""Parts whose text has too many marks in a row when joined."""
PROMPT = len(render([Message("user", "hello")]))


def ask(client: httpx.Client, url: str = CHAT_URL, **body: Any) -> httpx.Response:
    subject = {"messages": HELLO} if url == CHAT_URL else {"prompt": "hello"}
    return client.post(url, json={"model": "base", **subject, **body})


def reported(reply: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and the field at fault."""
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if reply.status_code >= 500 else "invalid_request_error")
    return reply.status_code, error["code"], error["param"]


NOT_A_CLIENTS = [
    "cache_salt",
    "priority",
    "lora_request",
    "lora_name",
    "lora",
    "adapter_id",
    "kv_transfer_params",
    "vllm_xargs",
    "prompt_token_ids",
    "prompt_embeds",
    "add_special_tokens",
    "chat_template",
    "guided_grammar",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "logits_processors",
    "echo",
]
"""What vLLM, SGLang, llama.cpp and LoRAX take in a body."""


@pytest.mark.parametrize("url", [CHAT_URL, TEXT_URL])
def test_server_side_fields_are_refused_by_name_and_never_reach_the_engine(url: str) -> None:
    engine = ScriptedEngine()
    with scripted_server(engine) as client:
        for field in NOT_A_CLIENTS:
            fields: Any = {field: 2}
            reply = ask(client, url, **fields)
            assert reported(reply) == (400, "unsupported_parameter", field)
            assert f"{field} is not supported: remove it" in reply.json()["error"]["message"]
    assert not engine.asked


def test_error_message_is_bounded_however_many_faults_a_request_has() -> None:
    with scripted_server(ScriptedEngine()) as client:
        fields: Any = {"x" * 5000: 1} | {f"unknown{number}": 1 for number in range(500)}
        reply = ask(client, **fields)
    assert reported(reply)[:2] == (400, "unsupported_parameter")
    assert "491 more errors." in reply.json()["error"]["message"]
    assert len(reply.content) < 2000


@pytest.mark.parametrize(
    ("limits", "body", "expected"),
    [
        ({"max_messages": 2}, {"messages": HELLO * 3}, (400, "too_many_messages", "messages")),
        ({"max_prompt_tokens": PROMPT - 1}, {}, (400, "prompt_too_long", "messages")),
        ({}, {"messages": [{"role": "user", "content": "x" * 2000}]}, (400, "context_length_exceeded", "messages")),
        ({"max_n": 2}, {"n": 3}, (400, "too_many_choices", "n")),
        ({}, {"stop": ["x"] * 5}, (400, "invalid_value", "stop")),
        ({}, {"stop": "x" * 1001}, (400, "invalid_value", "stop.0")),
        ({}, {"messages": [{"role": "user", "content": MARKS}]}, (400, "invalid_value", "messages.0")),
        ({}, {"messages": [{"role": "user", "content": MARK_PARTS}]}, (400, "invalid_value", "messages.0")),
        ({"max_body_bytes": 2000}, {"user": "x" * 2000}, (413, "body_too_large", None)),
    ],
)
def test_request_over_a_limit_is_refused_by_name(limits: Any, body: Any, expected: Any) -> None:
    engine = ScriptedEngine()
    with scripted_server(engine, **limits) as client:
        assert reported(ask(client, **body)) == expected
    assert not engine.asked


def test_prompt_with_too_many_combining_marks_in_a_row_is_refused() -> None:
    engine = ScriptedEngine()
    with scripted_server(engine) as client:
        reply = ask(client, TEXT_URL, prompt=["hello", f"hello {MARKS}"])
        assert reported(reply) == (400, "invalid_value", "prompt.1")
        reason = "more than 30 combining marks in a row, from character 7: remove the marks."
        assert reply.json()["error"]["message"] == f"prompt.1: {reason}"
        assert ask(client, TEXT_URL, prompt="e" + MARKS[:30]).status_code == 200
    assert len(engine.asked) == 1


@pytest.mark.parametrize("url", [CHAT_URL, TEXT_URL])
def test_prompt_of_too_many_characters_is_refused_before_it_is_normalised_or_tokenized(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    longest, normalised = 16 * ScriptedEngine().context_length, []

    def counted(text: str) -> str:
        normalised.append(len(text))
        return normalize(text)

    monkeypatch.setattr(schemas, "normalize", counted)
    with scripted_server(ScriptedEngine()) as client:
        for characters, expected in ((longest, "context length is"), (longest + 1, "(limit 32,000 characters for")):
            text = "x" * characters
            reply = (
                ask(client, url, messages=[{"role": "user", "content": text}])
                if url == CHAT_URL
                else ask(client, url, prompt=text)
            )
            assert reported(reply)[:2] == (400, "context_length_exceeded")
            assert expected in reply.json()["error"]["message"]
    assert normalised == [longest]


def test_max_tokens_is_capped_by_the_context_and_the_configured_limit() -> None:
    engine = ScriptedEngine()
    limited: list[dict[str, Any]] = [{"max_tokens": 5, "stop": ["x" * 1000] * 4}, {"max_tokens": 6}]
    with scripted_server(engine, max_messages=1, max_prompt_tokens=PROMPT, max_completion_tokens=5) as client:
        for body in (*limited, {"max_completion_tokens": 10**9}, {}):
            assert ask(client, **body).status_code == 200
        assert ask(client, TEXT_URL, max_tokens=6).status_code == 200
    with scripted_server(engine) as client:
        free: list[dict[str, Any]] = [{"max_tokens": 2000 - PROMPT}, {"max_tokens": 2001 - PROMPT}, {}]
        for body in free:
            assert ask(client, **body).status_code == 200
        for body in ({"max_tokens": 10**9}, {}):
            assert ask(client, TEXT_URL, **body).status_code == 200
    given = [request.max_new_tokens for request, _ in engine.asked]
    assert given == [5] * 5 + [2000 - PROMPT] * 3 + [2000 - len("hello"), 16]


@contextmanager
def half_sent(client: httpx.Client, length: int, sent: int) -> Iterator[Callable[[], tuple[int, str]]]:
    """A request whose body is not sent whole; gives what reads the answer to the end of the connection."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as connection:
        head = f"POST {CHAT_URL} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + b"x" * sent)
        connection.settimeout(60)

        def read() -> tuple[int, str]:
            said = b""
            while chunk := connection.recv(4096):
                said += chunk
            error = json.loads(said.partition(b"\r\n\r\n")[2])["error"]
            return int(said.split()[1]), f"{error['code']}: {error['message']}"

        yield read


def test_body_limit_follows_the_context_and_reading_stops_there() -> None:
    most = 16 * 100 + (64 << 10)
    with scripted_server(ScriptedEngine(context=100)) as client, half_sent(client, 1 << 30, most + 1) as read:
        assert read() == (413, f"body_too_large: Request body too large (limit {most} bytes).")


def test_request_times_out_when_its_body_does_not_arrive() -> None:
    with scripted_server(ScriptedEngine(), body_timeout_s=0.2) as client, half_sent(client, 100, 1) as read:
        assert read() == (408, "body_timeout: Timed out after 0.2 s waiting for the request body.")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("waits", "limits", "status", "code"),
    [
        ((60,), {"first_token_timeout_s": 0.2}, 504, "first_token_timeout"),
        ((60,), {"total_timeout_s": 0.2}, 504, "total_timeout"),
    ],
)
def test_request_fails_with_a_status_when_it_times_out_before_the_first_token(
    waits: Any, limits: Any, status: int, code: str, stream: bool
) -> None:
    engine = ScriptedEngine(waits)
    with scripted_server(engine, **limits) as client:
        assert reported(ask(client, stream=stream)) == (status, code, None)
        until(lambda: engine.aborted == 1)


@pytest.mark.slow
@pytest.mark.parametrize("url", [CHAT_URL, TEXT_URL])
@pytest.mark.parametrize(
    ("waits", "limits", "code"),
    [
        ((0, 0, 60), {"inter_token_timeout_s": 0.3}, "idle_timeout"),
        ((0.05,) * 1000, {"total_timeout_s": 1.5}, "total_timeout"),
    ],
)
def test_stream_ends_with_an_error_event_when_it_times_out(url: str, waits: Any, limits: Any, code: str) -> None:
    engine = ScriptedEngine(waits)
    with scripted_server(engine, **limits) as client:
        reply = ask(client, url, stream=True)
        assert reply.status_code == 200
        *pieces, last = [json.loads(line[6:]) for line in reply.text.splitlines() if line]
        assert pieces and all("choices" in piece for piece in pieces)
        assert (last["error"]["code"], last["error"]["type"]) == (code, "server_error")
        assert "[DONE]" not in reply.text
        until(lambda: engine.aborted == 1)
        assert reported(ask(client, url))[:2] == (504, code)


def test_queued_request_times_out_as_retryable_and_never_reaches_the_engine() -> None:
    engine = ScriptedEngine((0, 60), max_num_seqs=1)
    with scripted_server(engine, queue_timeout_s=0.3) as client:
        with client.stream("POST", CHAT_URL, json={"model": "base", "messages": HELLO, "stream": True}) as busy:
            lines = busy.iter_lines()  # once it is gone, the connection is
            next(lines)
            for stream in (False, True):
                reply = ask(client, stream=stream)
                assert reported(reply) == (503, "queue_timeout", None)
                assert reply.headers["retry-after"] == "1"
        assert len(engine.asked) == 1
        until(lambda: engine.begun == 0)
        engine.waits = [0]
        assert ask(client).status_code == 200


def test_slow_reader_is_disconnected_without_the_end_of_its_answer() -> None:
    sent: list[Any] = []
    ended: list[bool] = []

    async def events() -> AsyncGenerator[str, None]:
        while True:
            yield "data: {}\n\n"

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 3:
            await asyncio.Event().wait()  # what was sent is not read

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def on_end() -> None:
        ended.append(True)

    async def run() -> None:
        until = asyncio.get_running_loop().time() + 0.2
        await EventStreamResponse(events(), {}, until=until, on_end=on_end)({"type": "http"}, receive, send)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert ended == [True]
    assert all(message.get("more_body", True) for message in sent)


@pytest.mark.parametrize(
    ("stopped", "permanently_stopped", "health", "ready"),
    [
        (None, False, 200, 200),
        ("it is started again", False, 200, 503),
        ("it is broken", True, 503, 503),
    ],
)
def test_health_and_readiness_differ(stopped: str | None, permanently_stopped: bool, health: int, ready: int) -> None:
    engine = ScriptedEngine()
    with scripted_server(engine) as client:
        engine.stopped, engine.permanently_stopped = stopped, permanently_stopped
        assert client.get("/health").status_code == health
        reply = client.get("/ready")
        assert reply.status_code == ready
        if stopped:
            assert reply.json() == {"status": "stopped", "reason": stopped}
            for stream in (False, True):
                assert reported(ask(client, stream=stream)) == (503, "engine_stopped", None)
