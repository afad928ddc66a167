"""Engines at addresses: which one answers, what happens when one stops or is another one, and who may ask it."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_kinds import COMPILER
from recorded_engine import ONE, ORIGIN, THREE, TWO, Recorded, answer, asked, at_address, pooled, run
from starlette.applications import Starlette

from making.vllm_child import StopAfter
from tunewright.core.errors import UserError
from tunewright.engines import pool as pools
from tunewright.engines.pool import LOST, UNAVAILABLE, EnginePool
from tunewright.engines.protocol import AdapterFailedError, EngineStoppedError, RequestFailedError, stream
from tunewright.engines.remote import FACTS, TOKEN, EngineFacts, RemoteEngine, choose, resolved
from tunewright.serving import engine_service
from tunewright.serving.engine_service import EngineApp
from tunewright.serving.gateway.server import serving

DIGESTS = (ONE, TWO, THREE)
LIMITS: Any = {"context_length": 2000, "prefill_tokens": 128, "unsupported": (), "stopped": None}


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "LOOK_S", 0.05)


async def load_all(pool: EnginePool) -> None:
    for digest in DIGESTS:
        await pool.load(digest, Path(f"adapter-{digest[0]}"))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


def remote(url: str, rows: int = 8, running: int = 0) -> RemoteEngine:
    engine = RemoteEngine(url, "gateway")
    engine.facts = EngineFacts(1, "a", "peft", **vars(ORIGIN), **LIMITS, max_num_seqs=rows)
    engine.running = running
    return engine


def test_each_adapter_is_loaded_everywhere_and_asked_at_one_engine_while_that_is_not_busy() -> None:
    engines = [Recorded(), Recorded()]

    async def ask(pool: EnginePool) -> None:
        await load_all(pool)
        for _ in range(4):
            for digest in DIGESTS:
                assert await answer(pool, asked(digest)) == (97, 97)

    with ExitStack() as held:
        pool = held.enter_context(pooled([held.enter_context(at_address(engine)) for engine in engines]))
        run(ask(pool))
        assert pool.resident == sorted(DIGESTS)
        assert pool.max_num_seqs == 16
        assert pool.in_flight == (0, 0)
        for engine in engines:
            assert sorted(engine.loaded) == sorted(DIGESTS)
    homes = Counter((request.adapter, at) for at, engine in enumerate(engines) for request, _ in engine.asked)
    assert sorted(homes.values()) == [4, 4, 4], "all requests for an adapter went to one engine"


def test_busy_engine_is_passed_over_and_the_base_goes_to_the_least_loaded_one() -> None:
    engines = [remote(f"http://10.0.0.{number}:8100") for number in range(1, 5)]
    home = choose(ONE, engines)
    home.running = 4
    assert choose(ONE, engines) is home, "half of its rows are in use"
    home.running = 5
    second = choose(ONE, engines)
    assert second is not home
    for engine in engines:
        engine.running = 8
    assert choose(ONE, engines) is home, "all are equally busy"
    engines[2].running = 1
    assert choose(None, engines) is engines[2]


def test_new_engine_takes_over_only_its_share_of_the_adapters() -> None:
    engines = [remote(f"http://10.0.0.{number}:8100") for number in range(1, 6)]
    digests = [f"{number:064x}" for number in range(400)]
    before = [choose(digest, engines[:4]).url for digest in digests]
    after = [choose(digest, engines).url for digest in digests]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {engines[4].url}
    assert 50 < len(moved) < 120, "a fifth of 400"


def test_request_moves_to_another_engine_if_its_own_stops_before_the_first_token() -> None:
    engines = [Recorded(waits=(0.05, 0.0)), Recorded(waits=(0.05, 0.0))]

    async def ask(pool: EnginePool) -> None:
        await load_all(pool)
        asking = asyncio.create_task(answer(pool, asked(ONE)))
        await until(lambda: any(engine.begun for engine in engines))
        (home,) = [engine for engine in engines if engine.begun]
        home.stopped = "It crashed."
        assert await asking == (97, 97)
        await until(lambda: len(pool.up) == 1)
        assert await answer(pool, asked(ONE)) == (97, 97)
        assert pool.max_num_seqs == 8
        home.stopped = None
        await until(lambda: len(pool.up) == 2)

    reporter = StopAfter()
    with ExitStack() as held:
        urls = [held.enter_context(at_address(engine)) for engine in engines]
        run(ask(held.enter_context(pooled(urls, reporter))))
    assert [warning for warning in reporter.warnings if "It crashed" in warning]


def test_answer_that_has_begun_gets_the_error_of_its_engine() -> None:
    engines = [Recorded(waits=(0.0, 0.3)), Recorded(waits=(0.0, 0.3))]

    async def ask(pool: EnginePool) -> None:
        await load_all(pool)
        deltas = stream(pool, asked(ONE))
        assert (await anext(deltas)).ids == (97,)
        for engine in engines:
            engine.stopped = "It crashed."
        with pytest.raises(EngineStoppedError, match=LOST):
            await anext(deltas)
        with pytest.raises(EngineStoppedError, match=UNAVAILABLE):
            await answer(pool, asked(ONE))

    with ExitStack() as held:
        run(ask(held.enter_context(pooled([held.enter_context(at_address(engine)) for engine in engines]))))


def test_abort_ends_the_request_at_its_engine() -> None:
    engine = Recorded(waits=(0.0, 60.0))

    async def ask(pool: EnginePool) -> None:
        deltas = stream(pool, asked(None))
        assert (await anext(deltas)).ids == (97,)
        await deltas.aclose()
        await until(lambda: engine.aborted == 1)
        assert pool.in_flight == (0, 0)

    with at_address(engine) as url, pooled([url]) as pool:
        run(ask(pool))


def test_engine_without_an_adapter_is_named_and_gets_no_requests_for_it() -> None:
    engines = [Recorded(), Recorded()]
    reporter = StopAfter()

    async def ask(pool: EnginePool) -> None:
        await load_all(pool)
        for digest in DIGESTS * 3:
            assert await answer(pool, asked(digest)) == (97, 97)

    with ExitStack() as held:
        urls = [held.enter_context(at_address(engines[0], missing=DIGESTS)), held.enter_context(at_address(engines[1]))]
        run(ask(held.enter_context(pooled(urls, reporter))))
    assert not engines[0].asked and len(engines[1].asked) == 9
    assert len([warning for warning in reporter.warnings if urls[0] in warning and "is missing" in warning]) == 3


def test_adapter_that_no_engine_has_is_refused() -> None:
    async def ask(pool: EnginePool) -> None:
        with pytest.raises(UserError, match=rf"{url}: .*is missing"):
            await pool.load(ONE, Path("adapter"))
        with pytest.raises(RequestFailedError, match="not loaded"):
            await answer(pool, asked(ONE))

    with at_address(Recorded(), missing=DIGESTS) as url, pooled([url]) as pool:
        run(ask(pool))


@pytest.mark.fault("engine", "serve")
def test_new_process_at_an_address_loads_the_adapters_before_it_gets_requests_for_them() -> None:
    first, second = Recorded(), Recorded()

    def locate(name: str, _digest: str) -> Path:
        return Path(name)

    async def ask(pool: EnginePool, held: ExitStack, port: int, before: ExitStack) -> None:
        await load_all(pool)
        before.close()
        await until(lambda: not pool.up)
        app = EngineApp(second, ORIGIN, locate, COMPILER).app
        held.enter_context(serving(app, port=port))
        await until(lambda: pool.engines[0].restarts == 1 and pool.resident == sorted(DIGESTS))
        assert await answer(pool, asked(ONE)) == (97, 97)
        assert pool.engines[0].restarts == 1

    with ExitStack() as held, ExitStack() as before:
        url = before.enter_context(at_address(first))
        pool = held.enter_context(pooled([url]))
        run(ask(pool, held, int(url.rpartition(":")[2]), before))
    assert not first.asked and len(second.asked) == 1


def test_engine_keeps_an_adapter_until_its_last_gateway_has_left() -> None:
    engine = Recorded()

    async def ask(first: EnginePool, second: EnginePool) -> None:
        for pool in (first, second):
            await pool.load(ONE, Path("adapter"))
        await first.unload(ONE)
        assert await answer(second, asked(ONE)) == (97, 97)
        await second.unload(ONE)

    with at_address(engine) as url, pooled([url]) as first:
        with pooled([url]) as second:
            run(ask(first, second))
            assert engine.changes == ["+1", "-1"]
            run(second.load(TWO, Path("adapter")))
        assert engine.loaded == [], "a gateway that ends says so"


def test_engine_frees_the_adapters_of_a_gateway_that_is_not_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Recorded()
    monkeypatch.setattr(engine_service, "LEASE_S", 0.3)

    async def ask(lost: EnginePool, pool: EnginePool) -> None:
        for each in (lost, pool):
            await each.load(ONE, Path("adapter"))
        await lost.load(TWO, Path("adapter"))
        lost._looking.cancel()
        await until(lambda: engine.changes[-1] == "-2")
        assert await answer(pool, asked(ONE)) == (97, 97)

    with at_address(engine) as url, pooled([url]) as lost, pooled([url]) as pool:
        run(ask(lost, pool))


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"base": "c" * 64}, "has the base cccccccccccc, this gateway bbbbbbbbbbbb"),
        ({"quantization": "nf4"}, "has the quantization nf4, this gateway none"),
        ({"protocol": 2}, "has protocol 2, this gateway 1"),
    ],
)
def test_another_engine_is_refused_by_its_address(facts: dict[str, Any], what: str) -> None:
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    own = remote("").facts
    assert own is not None

    async def answer_facts(_http: Any) -> JSONResponse:
        return JSONResponse({**vars(own), **facts})

    with serving(Starlette(routes=[Route(FACTS, answer_facts)])) as url:
        with pytest.raises(UserError) as raised, pooled([url]):
            pass
        assert f"The engine {url} {what}" in raised.value.what
        assert raised.value.where == "serve.engines"


def test_server_without_the_engines_routes_is_refused_by_its_address() -> None:
    with serving(Starlette()) as url:
        with pytest.raises(UserError) as raised, pooled([url]):
            pass
        assert raised.value.what.startswith(f"{url} is not an engine of tunewright")


def test_pool_without_any_engine_is_refused_and_names_the_addresses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"No engine answers:\n  The engine http://127.0.0.1:{port} does not answer"):
        pooled([f"http://127.0.0.1:{port}"]).__enter__()


def test_engine_with_a_token_answers_only_gateways_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "")
    with at_address(Recorded()) as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get(FACTS).status_code == 200, "an empty token has no effect"
    monkeypatch.setenv(TOKEN, "secret")
    with at_address(Recorded()) as url:
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert client.get("/health").status_code == 200
            for method, route in (("GET", FACTS), ("POST", f"{FACTS}/answer"), ("POST", f"{FACTS}/load")):
                assert client.request(method, route).status_code == 401
                wrong = {"Authorization": "Bearer secrets"}
                assert client.request(method, route, headers=wrong).status_code == 401
        with pooled([url]) as pool:
            assert run(answer(pool, asked(None))) == (97, 97)
        monkeypatch.setenv(TOKEN, "another")
        with pytest.raises(UserError, match=f"The engine {url} refuses this gateway's token"), pooled([url]):
            pass


def test_name_stands_for_an_engine_at_each_of_its_addresses() -> None:
    assert "http://127.0.0.1:8100" in resolved("http://localhost:8100")
    assert resolved("http://127.0.0.1") == ["http://127.0.0.1:80"]
    assert resolved("https://engines.example:8100") == ["https://engines.example:8100"]
    assert resolved("http://no-such-name.invalid:1") == []


def test_engines_stay_while_their_name_cannot_be_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, looks = Recorded(), 0

    def silent(*_: Any, **__: Any) -> Any:
        nonlocal looks
        looks += 1
        raise socket.gaierror("Temporary failure in name resolution")

    async def ask(pool: EnginePool) -> None:
        await pool.load(ONE, Path("adapter"))
        monkeypatch.setattr(socket, "getaddrinfo", silent)
        await until(lambda: looks >= 3)
        assert await answer(pool, asked(ONE)) == (97, 97)

    with at_address(engine) as url, pooled([url]) as pool:
        run(ask(pool))
    assert engine.changes == ["+1", "-1"], "loaded once, and freed at the end"


def test_engine_that_lacks_what_the_others_support_is_left_out() -> None:
    class Limited(Recorded):
        unsupported = frozenset({"logit_bias"})

    reporter = StopAfter()
    with ExitStack() as held:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        urls = [held.enter_context(at_address(Recorded())), f"http://127.0.0.1:{port}"]
        pool = held.enter_context(pooled(urls, reporter))
        app = EngineApp(Limited(), ORIGIN, lambda name, _digest: Path(name), COMPILER).app
        held.enter_context(serving(app, port=port))
        run(until(lambda: any("does not support logit_bias" in warning for warning in reporter.warnings)))
        assert [engine.url for engine in pool.up] == urls[:1]


def test_adapter_that_is_unloaded_while_it_loads_is_freed() -> None:
    engine = Recorded()

    async def ask(pool: EnginePool) -> None:
        engine.can_load.clear()
        loading = asyncio.create_task(pool.load(ONE, Path("adapter")))
        await until(lambda: ONE in pool.engines[0].loading)
        await pool.unload(ONE)
        engine.can_load.set()
        await loading
        await until(lambda: engine.changes == ["+1", "-1"])
        assert pool.resident == []

    with at_address(engine) as url, pooled([url]) as pool:
        run(ask(pool))


def test_unexpected_failure_of_a_change_or_a_request_leaves_the_engine_up() -> None:
    class Broken(Recorded):
        async def load(self, digest: str, folder: Path) -> None:
            if digest == TWO:
                raise OSError("still being copied")
            await super().load(digest, folder)

    async def ask(pool: EnginePool) -> None:
        await pool.load(ONE, Path("adapter"))
        with pytest.raises(AdapterFailedError, match="still being copied"):
            await pool.load(TWO, Path("adapter"))
        assert await answer(pool, asked(ONE)) == (97, 97)
        assert len(pool.up) == 1

    with at_address(Broken()) as url, pooled([url]) as pool:
        run(ask(pool))


def test_malformed_request_gets_an_error_and_no_traceback() -> None:
    with at_address(Recorded()) as url, httpx.Client(base_url=url, trust_env=False) as client:
        gateway = {"x-tunewright-gateway": "a"}
        assert client.post(f"{FACTS}/load", json={}).status_code == 400
        assert client.post(f"{FACTS}/load", content=b"{", headers=gateway).status_code == 400
        bodies: list[Any] = [{}, [], {"prompt_ids": "x", "tenant": ""}]
        for body in bodies:
            for method, kind in (("load", "AdapterFailedError"), ("answer", "RequestFailedError")):
                reply = client.post(f"{FACTS}/{method}", json=body, headers=gateway)
                assert (reply.status_code, reply.json()["error"]) == (200, kind)
