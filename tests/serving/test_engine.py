"""The engine when things go wrong: nobody waits for an answer that will not come."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from served_model import CONTEXT, build_base, build_model, running_engine, running_server
from tenant_server import store_adapters

from tunewright.adapters.lora_weights import read_matrices
from tunewright.adapters.registry import CONFIG, adapter_digest
from tunewright.core.errors import UserError
from tunewright.engines.protocol import AdapterFailedError, Delta, EngineStoppedError, RequestFailedError
from tunewright.generation.decoding import Request, generate
from tunewright.serving.engines.peft import HELD_PASSES, PIECE_TOKENS, PeftEngine

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


def test_newcomers_to_a_nearly_full_batch_go_together_and_nobody_waits_for_long() -> None:
    with stopped_engine() as come_in:
        assert [come_in("a" * 15, "a" * 5) for _ in range(HELD_PASSES + 1)] == [0] * HELD_PASSES + [1]
        assert [come_in("a" * 15, "a" * 5), come_in("a" * 14, "a" * 5), come_in("a" * 15, "a" * 5)] == [0, 2, 0]
        assert [come_in("a" * 15, "a"), come_in("", "a")] == [1, 1]
        assert [come_in("a" * 16, "aaa"), come_in("a" * 13, "")] == [0, 0]


def test_who_has_more_than_an_even_part_of_a_nearly_full_batch_waits_for_others_and_who_has_less_does_not() -> None:
    with stopped_engine() as come_in:
        much, little = "a" * 12 + "b", "a" * 7 + "b" * 6
        assert [come_in(much, "a") for _ in range(HELD_PASSES + 1)] == [0] * HELD_PASSES + [1]
        assert [come_in(much, "a"), come_in(much, "ab")] == [0, 2]
        assert [come_in(much, "b"), come_in(much, "c"), come_in(little, "b")] == [1, 1, 1]
        assert come_in("a" * 11 + "b", "a") == 1  # a quarter of the batch is free


@contextmanager
def stopped_engine() -> Iterator[Callable[[str, str], int]]:
    """How many come in, beside whose requests are under way and of whose that wait: a letter for each request."""
    with running_engine(build_model(), max_batch=16) as engine:
        engine.stop()

        def tickets(whose: str) -> list[Any]:
            return [SimpleNamespace(whose=tenant) for tenant in whose]

        def come_in(under_way: str, waiting: str) -> int:
            engine._running, engine._waiting = tickets(under_way), deque(tickets(waiting))
            return len(engine._come_in())

        yield come_in
        engine._running, engine._waiting = [], deque()


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


def _ids(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.ids]


def test_answers_go_on_while_an_adapter_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = store_adapters(tmp_path)["one"]
    go_on = threading.Event()

    def slowly(*arguments: Any) -> Any:
        assert go_on.wait(60)
        return read_matrices(*arguments)

    async def run(engine: PeftEngine) -> None:
        async with aclosing(engine.stream(ENDLESS)) as stream:
            await anext(stream)
            loading = asyncio.create_task(engine.load(stored.digest, stored.folder))
            for _ in range(50):
                await anext(stream)
            assert not loading.done()
            go_on.set()
            await loading
            await anext(stream)
        assert await _collect(engine, Request((4, 5), stored.digest, 5))

    monkeypatch.setattr("tunewright.serving.engines.peft.read_matrices", slowly)
    with running_engine(build_base(), stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 120))


def test_answers_under_way_are_the_same_whatever_is_loaded_and_let_go_meanwhile(tmp_path: Path) -> None:
    one, two, three = store_adapters(tmp_path).values()
    asked = [Request((4, 5 + n), digest, 60) for n, digest in enumerate((None, one.digest, one.digest))]

    async def run(engine: PeftEngine) -> None:
        await engine.load(one.digest, one.folder)
        alone = [_ids(await _collect(engine, request)) for request in asked]
        answering = [asyncio.create_task(_collect(engine, request)) for request in asked]
        changes = 0
        while not all(task.done() for task in answering):
            for stored in (two, three):
                await engine.load(stored.digest, stored.folder)
                await engine.unload(stored.digest)
                changes += 1
        assert [_ids(await task) for task in answering] == alone
        assert changes > 2

    with running_engine(build_base(), stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 120))


def test_an_adapter_that_cannot_be_loaded_leaves_all_as_it_was_and_the_next_one_can_be(tmp_path: Path) -> None:
    one, two, three = store_adapters(tmp_path).values()
    dora = json.loads((two.folder / CONFIG).read_text()) | {"use_dora": True}
    (two.folder / CONFIG).write_text(json.dumps(dora))
    broken = adapter_digest(two.folder)
    request = Request((4, 5), one.digest, 30)

    async def run(engine: PeftEngine) -> None:
        await engine.load(one.digest, one.folder)
        before = await _collect(engine, request)
        answering = asyncio.create_task(_collect(engine, request))
        with pytest.raises(UserError, match="use_dora"):
            await engine.load(broken, two.folder)
        (two.folder / CONFIG).write_text("[]")
        with pytest.raises(AdapterFailedError, match="could not be read"):
            await engine.load(adapter_digest(two.folder), two.folder)
        assert _ids(await answering) == _ids(before)
        with pytest.raises(RequestFailedError, match="not loaded"):
            await _collect(engine, Request((4, 5), broken, 5))
        await engine.load(three.digest, three.folder)
        assert _ids(await _collect(engine, Request((4, 5), three.digest, 30))) != _ids(before)

    with running_engine(build_base(), stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 120))


def test_an_adapter_that_an_answer_under_way_needs_stays_also_while_its_prompt_is_read(tmp_path: Path) -> None:
    one = store_adapters(tmp_path)["one"]

    async def run(engine: PeftEngine) -> None:
        await engine.load(one.digest, one.folder)
        request = Request((4, 5), one.digest, 40)
        async with aclosing(engine.stream(request)) as stream:
            deltas = [await anext(stream)]
            with pytest.raises(AdapterFailedError, match="needs the adapter"):
                await engine.unload(one.digest)
            deltas += [delta async for delta in stream]
        assert _ids(deltas) == _ids(await _collect(engine, request))
        reading = asyncio.create_task(_collect(engine, Request(LONG.prompt_ids, one.digest, 2)))
        while not engine._unread:
            await asyncio.sleep(0)
        with pytest.raises(AdapterFailedError, match="needs the adapter"):
            await engine.unload(one.digest)
        assert len(_ids(await reading)) == 2
        await engine.unload(one.digest)
        with pytest.raises(RequestFailedError, match="not loaded"):
            await _collect(engine, request)

    with running_engine(build_base(), stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 120))
