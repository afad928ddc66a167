"""Replies that would take memory, the budget or the command itself: each is an error of its endpoint."""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from making.scripted_judge import Server, honest, scripted
from tunewright.config import EndpointConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.model_io import client
from tunewright.model_io.client import MAX_REPLY, MAX_TOKENS, Endpoint
from tunewright.model_io.replies import Budget, Reply

CONVERSATION = ({"role": "user", "content": "a question"},)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    with scripted(honest) as server:
        yield server


def endpoint(server: Server, folder: Path, purse: Budget | None = None) -> Endpoint:
    settings = {"base_url": server.url, "model": "scripted", "max_retries": 1, "price_input": 1, "price_output": 1}
    config = EndpointConfig.model_validate(settings)
    return Endpoint(config, "judge", folder, purse or Budget(None, "judge.budget"), LogReporter())


def _document(**changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "an answer"}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2}, **changes}


def _refusal(server: Server, folder: Path, response: Response) -> str:
    server.misbehave = lambda _count: response
    asking = endpoint(server, folder)
    with pytest.raises(UserError) as caught:
        asking.ask("t", [CONVERSATION])
    assert caught.value.where == "judge.base_url" and "scripted at" in caught.value.what
    assert not asking.journal.answers
    return caught.value.what


def _gzip_of_zeros(size: int) -> bytes:
    deflate = zlib.compressobj(wbits=31)
    pieces = [deflate.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join(pieces) + deflate.flush()


def test_reply_without_end_is_refused_at_its_limit(served: Server, tmp_path: Path) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 20 * MAX_REPLY:
            sent += 1 << 20
            yield b"x" * (1 << 20)
            await asyncio.sleep(0)

    assert "larger than 16,777,216 bytes" in _refusal(served, tmp_path, StreamingResponse(endless()))
    assert sent < 3 * MAX_REPLY


@pytest.mark.parametrize("status", [200, 400])
def test_gzip_bomb_is_refused_with_little_memory(served: Server, tmp_path: Path, status: int) -> None:
    bomb = Response(_gzip_of_zeros(128 << 20), status, headers={"content-encoding": "gzip"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "larger than 16,777,216 bytes" in _refusal(served, tmp_path, bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_compressed_reply_is_read(served: Server, tmp_path: Path) -> None:
    body = gzip.compress(json.dumps(_document()).encode())
    served.misbehave = lambda _count: Response(body, headers={"content-encoding": "gzip"})
    (reply,) = endpoint(served, tmp_path).ask("t", [CONVERSATION])
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("an answer", 5, 2)


@pytest.mark.parametrize(
    ("encoding", "body", "words"), [("br", b"x", "content encoding 'br'"), ("gzip", b"no gzip", "the reply is damaged")]
)
def test_reply_that_cannot_be_decompressed_is_refused(
    served: Server, tmp_path: Path, encoding: str, body: bytes, words: str
) -> None:
    assert words in _refusal(served, tmp_path, Response(body, headers={"content-encoding": encoding}))


@pytest.mark.parametrize("depth", [65, 300, 900, 200_000])
def test_reply_of_deep_json_is_refused(served: Server, tmp_path: Path, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    body = f'{{"choices": [{{"message": {{"content": "", "tool_calls": {nested}}}}}]}}'
    assert "not a chat completion" in _refusal(served, tmp_path, PlainTextResponse(body))


def test_error_of_deep_json_is_an_error_of_the_endpoint(served: Server, tmp_path: Path) -> None:
    assert "status 403: [[[[" in _refusal(served, tmp_path, PlainTextResponse("[" * 200_000, 403))


@pytest.mark.parametrize("counts", [(-100_000_000_000, 2), (5, -1), (MAX_TOKENS + 1, 2), (5, 10**400)])
def test_reply_with_impossible_token_counts_is_refused(served: Server, tmp_path: Path, counts: tuple[int, int]) -> None:
    usage = {"prompt_tokens": counts[0], "completion_tokens": counts[1]}
    what = _refusal(served, tmp_path, JSONResponse(_document(usage=usage)))
    assert f"counts {str(counts[0])[:40]}, {str(counts[1])[:40]} tokens" in what


def test_budget_does_not_grow_by_a_journal_with_negative_counts(served: Server, tmp_path: Path) -> None:
    asking = endpoint(served, tmp_path)
    with asking.journal.keeping() as keep:
        keep(asking.journal.key(CONVERSATION), Reply("an answer", "stop", -(10**9), 0))
    purse = Budget(0.5, "judge.budget")
    endpoint(served, tmp_path, purse).ask("t", [CONVERSATION])
    assert purse.spent == 0
