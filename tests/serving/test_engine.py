"""The engine when things go wrong: nobody waits for an answer that will not come."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import httpx
import pytest
from served_model import CONTEXT, build_model, running_engine, running_server

from tunewright.models.decoding import Request, generate
from tunewright.serving.engines.peft import PIECE_TOKENS, PeftEngine
from tunewright.serving.engines.protocol import Delta, EngineStoppedError

ENDLESS = Request((1, 2, 3), None, CONTEXT)


async def _collect(engine: PeftEngine, request: Request) -> list[Delta]:
    return [delta async for delta in engine.stream(request)]


def test_stopping_tells_who_runs_and_who_waits() -> None:
    async def run(engine: PeftEngine) -> None:
        asking = [asyncio.create_task(_collect(engine, ENDLESS)) for _ in range(3)]
        while engine.under_way != (1, 2):
            await asyncio.sleep(0)
        await asyncio.to_thread(engine.stop)
        for outcome in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(outcome, EngineStoppedError)
        with pytest.raises(EngineStoppedError, match="shutting down"):
            await _collect(engine, ENDLESS)

    with running_engine(build_model(), max_batch=1, stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 60))


def test_who_waits_and_gives_up_is_forgotten() -> None:
    async def run(engine: PeftEngine) -> None:
        first, second, third = (
            asyncio.create_task(_collect(engine, request)) for request in (ENDLESS, ENDLESS, Request((4, 5), "one", 5))
        )
        while engine.under_way != (1, 2):
            await asyncio.sleep(0)
        second.cancel()
        first.cancel()
        assert (await third)[-1].finish
        while engine.under_way != (0, 0):
            await asyncio.sleep(0)

    model = build_model()
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _model, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with running_engine(model, max_batch=1, stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 60))
    assert set(rows) == {1}


LONG = Request(tuple(range(8, 48)) * 100, "two", 5)


def _passes(model: Any) -> list[tuple[int, int]]:
    """Rows and columns of each pass, from here on."""
    seen: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _model, _args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def test_a_long_prompt_is_read_in_pieces_and_others_go_on_in_between() -> None:
    model = build_model()
    (expected,) = generate(build_model(), [LONG], stop_ids=(), pad_id=0, batch_size=1)
    passes = _passes(model)

    async def run(engine: PeftEngine) -> list[Delta]:
        endless = engine.stream(ENDLESS)
        await anext(endless)
        long = asyncio.create_task(_collect(engine, LONG))
        while max(passes)[1] < PIECE_TOKENS and not long.done():
            await anext(endless)
        short = await _collect(engine, Request((4, 5), "one", 3))
        assert sum(len(delta.ids) for delta in short) == 3
        assert not long.done()  # it came before and needs ten times as many passes
        answer = await long
        await endless.aclose()
        return answer

    with running_engine(model, stop_ids=frozenset()) as engine:
        answer = asyncio.run(asyncio.wait_for(run(engine), 60))
    assert tuple(token for delta in answer for token in delta.ids) == expected.ids
    pieces = [place for place, (rows, columns) in enumerate(passes) if columns > len(ENDLESS.prompt_ids)]
    assert sum(passes[place][1] for place in pieces) == len(LONG.prompt_ids)
    assert all(passes[place] in ((1, PIECE_TOKENS), (1, len(LONG.prompt_ids) % PIECE_TOKENS)) for place in pieces)
    assert all(later - earlier > 1 for earlier, later in pairwise(pieces))


def test_who_gives_up_while_its_prompt_is_read_is_forgotten() -> None:
    model = build_model()
    passes = _passes(model)

    async def run(engine: PeftEngine) -> None:
        long = asyncio.create_task(_collect(engine, LONG))
        while not passes:
            await asyncio.sleep(0)
        long.cancel()
        while engine.under_way != (0, 0):
            await asyncio.sleep(0)
        assert (await _collect(engine, Request((4, 5), "one", 5)))[-1].finish

    with running_engine(model, stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 60))
    assert sum(columns for _, columns in passes) < len(LONG.prompt_ids)


def test_a_listener_whose_event_loop_is_gone_is_dropped() -> None:
    with running_engine(build_model(), stop_ids=frozenset()) as engine:
        loop = asyncio.new_event_loop()
        stream = engine.stream(ENDLESS)
        loop.run_until_complete(anext(stream))
        loop.close()
        answer = asyncio.run(asyncio.wait_for(_collect(engine, Request((4, 5), None, 5)), 60))
        assert answer[-1].finish
        while engine.under_way != (0, 0):
            pass
        asyncio.run(stream.aclose())


def test_when_the_model_fails_answers_under_way_and_later_ones_say_so() -> None:
    model = build_model()
    broken = False

    def fail(*_: Any) -> None:
        if broken:
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    body: dict[str, Any] = {"model": "courts", "messages": [{"role": "user", "content": "x"}]}
    with (
        running_server(model, stop_ids=frozenset()) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
            lines = reply.iter_lines()
            while '"content": ""' in next(line for line in lines if line):
                pass  # the role comes before the model has done anything
            broken = True
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "stopped")
        assert "out of memory" in health.json()["reason"]
        later = client.post("/v1/chat/completions", json=body)
        assert (later.status_code, later.json()["error"]["type"]) == (503, "server_error")
