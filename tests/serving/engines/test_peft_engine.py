"""The embedded engine: failures, aborts, long prompts, and adapters that change."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch
from served_model import CONTEXT, build_base, build_model, running_engine, running_server
from tenant_server import store_adapters

from tunewright.adapters.lora_weights import load_lora_weights
from tunewright.adapters.registry import CONFIG, adapter_digest
from tunewright.core.errors import UserError
from tunewright.engines.peft import PeftEngine, Subscription, TokenDispatch
from tunewright.engines.protocol import (
    AdapterFailedError,
    Delta,
    Event,
    RequestFailedError,
    stream,
)
from tunewright.generation.decoding import PREFILL_CHUNK_CPU
from tunewright.generation.generate import generate
from tunewright.generation.requests import Request

ENDLESS = Request((1, 2, 3), None, CONTEXT)


async def _collect(engine: PeftEngine, request: Request) -> list[Delta]:
    return [delta async for delta in stream(engine, request)]


def test_waiting_request_is_dropped_when_aborted() -> None:
    async def run(engine: PeftEngine) -> None:
        first, second, third = (
            asyncio.create_task(_collect(engine, request)) for request in (ENDLESS, ENDLESS, Request((4, 5), "one", 5))
        )
        while engine.in_flight != (1, 2):
            await asyncio.sleep(0)
        second.cancel()
        first.cancel()
        assert (await third)[-1].finish
        while engine.in_flight != (0, 0):
            await asyncio.sleep(0)

    model = build_model()
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _model, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with running_engine(model, max_num_seqs=1, stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 300))
    assert set(rows) == {1}


LONG = Request(tuple(range(8, 48)) * 100, "two", 5)


def _passes(model: Any) -> list[tuple[int, int]]:
    """Rows and columns of each pass, from here on."""
    seen: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _model, _args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def test_long_prompt_is_prefilled_in_chunks_while_other_rows_decode() -> None:
    model = build_model()
    (expected,) = generate(build_model(), [LONG], stop_ids=(), pad_id=0, batch_size=1)
    passes, submitted, ended = _passes(model), threading.Event(), list[str]()

    def wait(_model: Any, _arguments: Any, named: Any) -> None:
        if named["input_ids"].shape[1] == PREFILL_CHUNK_CPU:
            assert submitted.wait(300)

    model.register_forward_pre_hook(wait, with_kwargs=True)

    async def run(engine: PeftEngine) -> list[Delta]:
        async def collect(name: str, request: Request) -> list[Delta]:
            deltas = await _collect(engine, request)
            ended.append(name)
            return deltas

        endless = stream(engine, ENDLESS)
        await anext(endless)
        long = asyncio.create_task(collect("long", LONG))
        while max(columns for _, columns in passes) < PREFILL_CHUNK_CPU:
            await asyncio.sleep(0.001)
        short = asyncio.create_task(collect("short", Request((4, 5), "one", 3)))
        while engine.in_flight[1] == 0:
            await asyncio.sleep(0)
        submitted.set()
        assert sum(len(delta.ids) for delta in await short) == 3
        answer = await long
        assert ended == ["short", "long"], "the long one came before and needs ten times as many passes"
        await endless.aclose()
        return answer

    with running_engine(model, stop_ids=frozenset()) as engine:
        answer = asyncio.run(asyncio.wait_for(run(engine), 300))
    assert tuple(token for delta in answer for token in delta.ids) == expected.ids
    pieces = [place for place, (rows, columns) in enumerate(passes) if columns > len(ENDLESS.prompt_ids)]
    assert sum(passes[place][1] for place in pieces) == len(LONG.prompt_ids)
    sizes = ((1, PREFILL_CHUNK_CPU), (1, len(LONG.prompt_ids) % PREFILL_CHUNK_CPU))
    assert all(passes[place] in sizes for place in pieces)
    assert all(later - earlier > 1 for earlier, later in pairwise(pieces))


def test_prefilling_request_is_dropped_when_aborted() -> None:
    model = build_model()
    passes = _passes(model)

    async def run(engine: PeftEngine) -> None:
        long = asyncio.create_task(_collect(engine, LONG))
        while not passes:
            await asyncio.sleep(0)
        long.cancel()
        while engine.in_flight != (0, 0):
            await asyncio.sleep(0)
        assert (await _collect(engine, Request((4, 5), "one", 5)))[-1].finish

    with running_engine(model, stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 300))
    assert sum(columns for _, columns in passes) < len(LONG.prompt_ids)


def test_free_rows_are_filled_in_the_order_of_submission() -> None:
    async def run(engine: PeftEngine) -> None:
        first_tokens: list[int] = []

        async def answer(number: int) -> None:
            async for _ in stream(engine, Request((4, 5 + number), None, 20)):
                if number not in first_tokens:
                    first_tokens.append(number)

        await asyncio.gather(*(answer(number) for number in range(6)))
        # Rows that start together are prefilled in one pass, and delivered in that order.
        assert first_tokens == list(range(6))

    with running_engine(build_model(), stop_ids=frozenset(), max_num_seqs=2) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 300))


def test_request_is_dropped_when_its_event_loop_is_closed() -> None:
    with running_engine(build_model(), stop_ids=frozenset()) as engine:
        loop = asyncio.new_event_loop()
        deltas = stream(engine, ENDLESS)
        loop.run_until_complete(anext(deltas))
        loop.close()
        answer = asyncio.run(asyncio.wait_for(_collect(engine, Request((4, 5), None, 5)), 60))
        assert answer[-1].finish
        while engine.in_flight != (0, 0):
            pass
        asyncio.run(deltas.aclose())


def test_model_failure_fails_running_and_later_requests() -> None:
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


def test_answers_continue_while_an_adapter_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = store_adapters(tmp_path)["one"]
    go_on = threading.Event()

    def slowly(*arguments: Any) -> Any:
        assert go_on.wait(60)
        return load_lora_weights(*arguments)

    async def run(engine: PeftEngine) -> None:
        async with aclosing(stream(engine, ENDLESS)) as answer:
            await anext(answer)
            loading = asyncio.create_task(engine.load(stored.digest, stored.folder))
            for _ in range(50):
                await anext(answer)
            assert not loading.done()
            go_on.set()
            await loading
            await anext(answer)
        assert await _collect(engine, Request((4, 5), stored.digest, 5))

    monkeypatch.setattr("tunewright.engines.peft.load_lora_weights", slowly)
    with running_engine(build_base(), stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 300))


def test_running_answers_do_not_change_when_adapters_are_loaded_and_unloaded(tmp_path: Path) -> None:
    one, two, three = store_adapters(tmp_path).values()
    asked = [Request((4, 5 + n), digest, 60) for n, digest in enumerate((None, one.digest, one.digest))]

    async def run(engine: PeftEngine) -> None:
        await engine.load(one.digest, one.folder)
        alone = [_ids(await _collect(engine, request)) for request in asked]
        changes = 0
        while changes <= 2:
            answering = [asyncio.create_task(_collect(engine, request)) for request in asked]
            while not all(task.done() for task in answering):
                for stored in (two, three):
                    await engine.load(stored.digest, stored.folder)
                    await engine.unload(stored.digest)
                    changes += 1
            assert [_ids(await task) for task in answering] == alone

    with running_engine(build_base(), stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 300))


def test_failed_load_changes_nothing_and_the_next_adapter_loads(tmp_path: Path) -> None:
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
        with pytest.raises(AdapterFailedError, match="Failed to read the adapter"):
            await engine.load(adapter_digest(two.folder), two.folder)
        assert _ids(await answering) == _ids(before)
        with pytest.raises(RequestFailedError, match="not loaded"):
            await _collect(engine, Request((4, 5), broken, 5))
        await engine.load(three.digest, three.folder)
        assert _ids(await _collect(engine, Request((4, 5), three.digest, 30))) != _ids(before)

    with running_engine(build_base(), stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 300))


def test_unload_refuses_an_adapter_that_a_decoding_or_prefilling_request_needs(tmp_path: Path) -> None:
    one = store_adapters(tmp_path)["one"]

    async def run(engine: PeftEngine) -> None:
        await engine.load(one.digest, one.folder)
        request = Request((4, 5), one.digest, 40)
        ids: list[int] = []
        async with aclosing(stream(engine, replace(request, max_new_tokens=CONTEXT))) as answer:
            ids += (await anext(answer)).ids
            with pytest.raises(AdapterFailedError, match="needs the adapter"):
                await engine.unload(one.digest)
            while len(ids) < 40:
                ids += (await anext(answer)).ids
        assert ids[:40] == _ids(await _collect(engine, request))
        reading = asyncio.create_task(_collect(engine, Request(LONG.prompt_ids, one.digest, CONTEXT)))
        while not engine._prefilling:
            await asyncio.sleep(0)
        with pytest.raises(AdapterFailedError, match="needs the adapter"):
            await engine.unload(one.digest)
        reading.cancel()
        while engine.in_flight != (0, 0):
            await asyncio.sleep(0)
        await engine.unload(one.digest)
        with pytest.raises(RequestFailedError, match="not loaded"):
            await _collect(engine, request)

    with running_engine(build_base(), stop_ids=frozenset()) as engine:
        asyncio.run(asyncio.wait_for(run(engine), 300))


NEIGHBOURS = [
    Request((4, 5), None, 40),
    Request((6, 7, 8), "one", 40, temperature=0.9, seed=1),
    Request((9, 10), "two", 40, temperature=0.7, top_p=0.9, seed=2),
    Request((4, 6, 8, 10), None, 40),
]


def _outcomes(engine: PeftEngine, requests: Sequence[Request]) -> list[list[int] | Exception]:
    """Each request's tokens, or the error that ended it; all are asked at once."""

    async def ask() -> list[list[Delta] | BaseException]:
        return await asyncio.gather(*(_collect(engine, request) for request in requests), return_exceptions=True)

    outcomes: list[list[int] | Exception] = []
    for outcome in asyncio.run(asyncio.wait_for(ask(), 60)):
        assert not isinstance(outcome, BaseException) or isinstance(outcome, Exception)
        outcomes.append(outcome if isinstance(outcome, Exception) else _ids(outcome))
    return outcomes


def _alone(model: Any) -> list[list[int]]:
    completions = [generate(model, [request], stop_ids=(), pad_id=0, batch_size=1)[0] for request in NEIGHBOURS]
    return [list(completion.ids) for completion in completions]


def _at_fault(kwargs: dict[str, Any]) -> list[int]:
    """The rows of a decode pass whose text is of the request at fault: its length is its own."""
    if kwargs["input_ids"].shape[1] != 1:
        return []
    return [row for row, place in enumerate(kwargs["position_ids"][:, 0].tolist()) if place >= FAULT_AT]


FAULT_AT = 260
FAULT = Request(tuple(range(8, 48)) * 6 + tuple(range(8, 18)), None, CONTEXT)
"""Its prompt is much longer than its neighbours' texts, which end before ``FAULT_AT``."""


@pytest.mark.parametrize("place", [0, 2, 4])
def test_row_for_which_the_model_raises_fails_alone(place: int) -> None:
    model, expected = build_model(), _alone(build_model())

    def fail(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if _at_fault(kwargs):
            raise RuntimeError("a kernel refuses this row")

    # In the last layer: the cache of the layers before it has the new column already.
    seen: dict[str, Any] = {}
    model.register_forward_pre_hook(lambda _model, _args, kwargs: seen.update(kwargs), with_kwargs=True)
    layers = model.get_base_model().model.layers
    layers[-1].register_forward_pre_hook(lambda layer, args, _: fail(layer, args, seen), with_kwargs=True)
    with running_engine(model, stop_ids=frozenset()) as engine:
        requests = [Request(r.prompt_ids, r.adapter, 120, r.temperature, r.top_p, r.seed) for r in NEIGHBOURS]
        outcomes = _outcomes(engine, [*requests[:place], FAULT, *requests[place:]])
        fault = outcomes.pop(place)
        assert isinstance(fault, RequestFailedError)
        assert "The model could not compute this request: a kernel refuses this row" in str(fault)
        assert [ids[:40] for ids in outcomes if isinstance(ids, list)] == expected
        assert [len(ids) for ids in outcomes if isinstance(ids, list)] == [120] * 4
        assert engine.stopped is None
        assert _outcomes(engine, NEIGHBOURS) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("together", [True, False])
def test_row_with_logits_that_are_not_finite_fails_alone(temperature: float, together: bool) -> None:
    model, expected = build_model(), _alone(build_model())

    def spoil(_model: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        for row in _at_fault(kwargs):
            output.logits[row] = torch.nan

    model.register_forward_hook(spoil, with_kwargs=True)
    fault = Request(FAULT.prompt_ids, None, CONTEXT, temperature=temperature, seed=3)
    with running_engine(model, stop_ids=frozenset()) as engine:
        *others, failed = _outcomes(engine, [*(NEIGHBOURS if together else []), fault])
        assert isinstance(failed, RequestFailedError)
        assert "logits are not finite" in str(failed)
        assert others == (expected if together else [])
        assert engine.stopped is None
        assert _outcomes(engine, NEIGHBOURS) == expected


class _FailingGuide:
    """A grammar that allows everything, until it raises."""

    def __init__(self) -> None:
        self.left = 5
        self.complete = False

    def start(self) -> _FailingGuide:
        return _FailingGuide()

    def allowed(self) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise UserError("The constraint failed while decoding: too complex")
        return bytes([255] * 200)

    def advance(self, token: int) -> None:
        pass


def test_row_whose_guide_raises_fails_alone() -> None:
    expected = _alone(build_model())
    fault = Request((4, 5, 6), "two", CONTEXT, temperature=1.0, seed=3, constraint=cast("Any", _FailingGuide()))
    with running_engine(build_model(), stop_ids=frozenset()) as engine:
        failed, *others = _outcomes(engine, [fault, *NEIGHBOURS])
        assert isinstance(failed, RequestFailedError)
        assert "too complex" in str(failed)
        assert others == expected
        assert engine.stopped is None


def test_newest_row_fails_when_only_the_whole_batch_cannot_be_computed() -> None:
    """As when memory suffices for fewer rows."""
    model, expected = build_model(), _alone(build_model())

    def fail(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1 and len(kwargs["input_ids"]) > 3:
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    with running_engine(model, stop_ids=frozenset()) as engine:
        outcomes = _outcomes(engine, NEIGHBOURS)
        (failed,) = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        assert isinstance(failed, RequestFailedError)
        assert all(ids == answer for ids, answer in zip(outcomes, expected, strict=True) if isinstance(ids, list))
        assert engine.stopped is None


class Sink(asyncio.Queue[Event]):
    """Keeps what is delivered."""

    def deliver(self, event: Event) -> None:
        self.put_nowait(event)


def test_no_event_reaches_a_cancelled_subscription() -> None:
    async def run() -> None:
        dispatch, sink, other = TokenDispatch(), Sink(), Sink()
        cancelled = Subscription(sink)
        dispatch.put(cancelled, Delta((1,), None))
        dispatch.put(Subscription(other), Delta((2,), None))
        dispatch.send()
        cancelled.cancelled = True
        async with asyncio.timeout(10):
            await other.get()
        assert sink.empty()

    asyncio.run(run())


def test_exception_in_one_sink_costs_the_others_no_token() -> None:
    class Broken:
        def deliver(self, event: Event) -> None:
            raise RuntimeError("broken")

    async def run() -> None:
        dispatch, sink, crashes = TokenDispatch(), Sink(), []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: crashes.append(context["exception"]))
        dispatch.put(Subscription(Broken()), Delta((1,), None))
        dispatch.put(Subscription(sink), Delta((2,), None))
        dispatch.send()
        async with asyncio.timeout(10):
            assert await sink.get() == Delta((2,), None)
        assert [type(crash) for crash in crashes] == [RuntimeError]

    asyncio.run(run())
