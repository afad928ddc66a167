"""Replicas that stop, drain and run out of room, with several adapters under load."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_kinds import STOPS, TOKENIZER, peft_child, peft_engine
from peft import PeftModel
from recorded_engine import NAMES, ONE, PROMPTS, THREE, TWO, Recorded, answer, asked, first, run, running
from transformers import LlamaForCausalLM

from tiny import chat_of
from tunewright.config import Config, ServeConfig, TrainConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.engines.protocol import EngineStoppedError, RequestFailedError, stream
from tunewright.generation.generate import generate
from tunewright.generation.requests import Request
from tunewright.models.bases import Base
from tunewright.serving.engines.autoscaler import Autoscaler
from tunewright.serving.engines.replicas import Replicas, Starter
from tunewright.serving.engines.scaling import Demand, Pace, ScalingPolicy
from tunewright.serving.engines.start import EngineSpec
from tunewright.serving.engines.start_replicas import start_engines


def test_each_adapter_is_loaded_on_one_replica_and_asked_there() -> None:
    engines = {name: Recorded() for name in NAMES}

    async def ask(replicas: Replicas) -> None:
        for digest in (ONE, TWO, THREE):
            await replicas.load(digest, Path())
        for digest in (ONE, TWO, THREE, ONE):
            await answer(replicas, asked(digest))

    with running(engines) as replicas:
        run(ask(replicas))
        for digest in (ONE, TWO, THREE):
            assert [name for name in NAMES if digest in engines[name].loaded] == [first(digest)]
        assert sum(state.loads for state in replicas.states()) == 3
    for name, engine in engines.items():
        assert {first(str(request.adapter)) for request, _ in engine.asked} <= {name}


def test_least_recently_used_adapter_makes_room_and_is_loaded_again_for_its_next_request() -> None:
    engine = Recorded()

    async def ask(replicas: Replicas) -> None:
        for digest in (ONE, TWO):
            await replicas.load(digest, Path())
        await answer(replicas, asked(ONE))
        await replicas.load(THREE, Path())
        await answer(replicas, asked(TWO))

    with running({"replica-1": engine}, room=2) as replicas:
        run(ask(replicas))
    assert engine.changes == ["+1", "+2", "-2", "+3", "-1", "+2"]


def test_requests_for_more_adapters_than_there_is_room_for_are_all_answered() -> None:
    engine = Recorded(waits=(0.001, 0.002), max_num_seqs=8)

    async def ask(replicas: Replicas) -> list[tuple[int, ...]]:
        for digest in (ONE, TWO, THREE):
            await replicas.load(digest, Path())
        work = [answer(replicas, asked(digest)) for _ in range(10) for digest in (ONE, TWO, THREE)]
        return await asyncio.gather(*work)

    with running({"replica-1": engine}, room=1) as replicas:
        assert run(ask(replicas)) == [(97, 97)] * 30
        assert replicas.in_flight == (0, 0)
    assert len(engine.changes) < 30, "requests for one adapter share its load"


def test_request_moves_to_another_replica_if_its_own_stops_before_the_first_token() -> None:
    engines = {name: Recorded(waits=(0.05, 0.0)) for name in NAMES}
    home = engines[first(ONE)]

    async def ask(replicas: Replicas) -> None:
        await replicas.load(ONE, Path())
        asking = asyncio.create_task(answer(replicas, asked(ONE)))
        while not home.begun:
            await asyncio.sleep(0)
        home.stopped = "It crashed."
        assert await asking == (97, 97)
        # Further ones do not wait for the one that has stopped.
        assert await answer(replicas, asked(ONE)) == (97, 97)

    with running(engines) as replicas:
        run(ask(replicas))
        assert [state.up for state in replicas.states()].count(False) == 1
        assert replicas.max_num_seqs == 8
        assert replicas.stopped is None


def test_answer_that_has_begun_gets_the_error_of_its_replica() -> None:
    engines = {name: Recorded(waits=(0.0, 0.05)) for name in NAMES}
    home = engines[first(ONE)]

    async def ask(replicas: Replicas) -> None:
        await replicas.load(ONE, Path())
        deltas = stream(replicas, asked(ONE))
        assert (await anext(deltas)).ids == (97,)
        home.stopped = "It crashed."
        with pytest.raises(EngineStoppedError, match="It crashed"):
            await anext(deltas)

    with running(engines) as replicas:
        run(ask(replicas))
    assert not any(engine.asked for engine in engines.values() if engine is not home)


def test_requests_fail_only_once_no_replica_is_up() -> None:
    engines = {name: Recorded() for name in NAMES}

    async def ask(replicas: Replicas) -> None:
        await replicas.load(ONE, Path())
        for engine in engines.values():
            engine.stopped = "It crashed."
        assert replicas.stopped == "It crashed."
        with pytest.raises(EngineStoppedError, match="It crashed"):
            await answer(replicas, asked(ONE))

    with running(engines) as replicas:
        run(ask(replicas))


def test_load_goes_to_the_next_replica_if_the_first_one_stops_meanwhile() -> None:
    engines = {name: Recorded() for name in NAMES}
    home = engines[first(ONE)]

    async def ask(replicas: Replicas) -> None:
        home.can_load.clear()
        loading = asyncio.create_task(replicas.load(ONE, Path()))
        await asyncio.sleep(0.01)
        home.stopped = "It crashed."
        home.can_load.set()
        await loading
        assert await answer(replicas, asked(ONE)) == (97, 97)

    with running(engines) as replicas:
        run(ask(replicas))
    assert home.loaded == []


def test_adapter_that_cannot_be_loaded_is_refused_by_load_and_by_requests() -> None:
    async def ask(replicas: Replicas) -> None:
        with pytest.raises(UserError, match="changed"):
            await replicas.load(ONE, Path("broken"))
        with pytest.raises(RequestFailedError, match="not loaded"):
            await answer(replicas, asked(ONE))

    with running({name: Recorded() for name in NAMES}) as replicas:
        run(ask(replicas))


def test_abort_while_the_adapter_is_loading_leaves_nothing_behind() -> None:
    engines = {name: Recorded() for name in NAMES}
    other = next(name for name in NAMES if name != first(ONE))

    async def ask(replicas: Replicas) -> None:
        await replicas.load(ONE, Path())
        engines[first(ONE)].stopped = "It crashed."
        engines[other].can_load.clear()
        asking = asyncio.create_task(answer(replicas, asked(ONE)))
        await asyncio.sleep(0.01)
        assert replicas.in_flight == (0, 1)
        asking.cancel()
        await asyncio.wait([asking])
        assert replicas.in_flight == (0, 0)
        engines[other].can_load.set()
        assert await answer(replicas, asked(ONE)) == (97, 97)

    with running(engines) as replicas:
        run(ask(replicas))
    assert len(engines[other].asked) == 1


def test_hot_adapter_gets_a_second_replica_and_other_adapters_stay_on_theirs() -> None:
    engines = {name: Recorded(max_num_seqs=4) for name in NAMES}
    for engine in engines.values():
        engine.held_at = 1

    async def ask(replicas: Replicas) -> None:
        await replicas.load(ONE, Path())
        work = [asyncio.create_task(answer(replicas, asked(ONE))) for _ in range(4)]
        while [state.adapters for state in replicas.states()] != [1, 1]:
            await asyncio.sleep(0.001)
        work += [asyncio.create_task(answer(replicas, asked(ONE))) for _ in range(8)]
        while sum(len(engine.asked) for engine in engines.values()) < 12:
            await asyncio.sleep(0.001)
        for engine in engines.values():
            engine.held_at = 0
        assert await asyncio.gather(*work) == [(97, 97)] * 12

    with running(engines) as replicas:
        run(ask(replicas))
    counts = {name: len(engine.asked) for name, engine in engines.items()}
    assert min(counts.values()) >= 3, counts


def test_drained_replica_finishes_its_answers_gets_no_further_ones_and_is_stopped() -> None:
    engines = {name: Recorded() for name in NAMES}
    home = engines[first(ONE)]
    home.held_at = 2

    async def ask(replicas: Replicas) -> None:
        await replicas.load(ONE, Path())
        running = stream(replicas, asked(ONE))
        await anext(running)
        draining = asyncio.wrap_future(replicas.drain(first(ONE), 60))
        while replicas.up == 2:
            await asyncio.sleep(0.001)
        assert await answer(replicas, asked(ONE)) == (97, 97)
        assert (len(home.asked), home.stops, draining.done()) == (1, 0, False)
        home.held_at = 0
        assert [delta.finish async for delta in running] == ["length"]
        assert await draining
        assert home.stops == 1
        assert replicas.names == [name for name in NAMES if name != first(ONE)]
        assert await answer(replicas, asked(ONE)) == (97, 97)

    with running(engines) as replicas:
        run(ask(replicas))


def test_adapters_of_a_drained_replica_are_loaded_elsewhere_before_it_stops_taking_requests() -> None:
    engines = {name: Recorded() for name in NAMES}
    home, other = engines[first(ONE)], next(engines[name] for name in NAMES if name != first(ONE))
    other.can_load.clear()

    async def ask(replicas: Replicas) -> None:
        await replicas.load(ONE, Path())
        draining = asyncio.wrap_future(replicas.drain(first(ONE), 60))
        assert await answer(replicas, asked(ONE)) == (97, 97)
        assert (len(home.asked), replicas.up) == (1, 2)
        other.can_load.set()
        assert await draining
        assert other.loaded == [ONE]

    with running(engines) as replicas:
        run(ask(replicas))


def test_requests_that_outlast_the_drain_get_the_error_of_a_stopped_replica() -> None:
    engines = {name: Recorded((0.0, 30.0)) for name in NAMES}

    async def ask(replicas: Replicas) -> None:
        await replicas.load(ONE, Path())
        running = stream(replicas, asked(ONE))
        await anext(running)
        assert await asyncio.wrap_future(replicas.drain(first(ONE), 0.2))
        assert engines[first(ONE)].stops == 1

    with running(engines) as replicas:
        run(ask(replicas))


def test_last_replica_that_is_up_is_not_drained() -> None:
    engines = {name: Recorded() for name in NAMES}
    engines["replica-2"].stopped = "It crashed."
    with running(engines) as replicas:
        assert not replicas.drain("replica-1", 60).result(60)
        assert replicas.up == 1


def test_kept_replica_takes_requests_again_with_its_adapters() -> None:
    engines = {name: Recorded() for name in NAMES}
    home = engines[first(ONE)]
    home.held_at = 2

    async def ask(replicas: Replicas) -> None:
        await replicas.load(ONE, Path())
        running = stream(replicas, asked(ONE))
        await anext(running)
        draining = asyncio.wrap_future(replicas.drain(first(ONE), 60))
        while replicas.up == 2:
            await asyncio.sleep(0.001)
        assert replicas.keep(first(ONE))
        assert not replicas.keep(first(ONE))
        assert not await draining
        home.held_at = 0
        assert [delta.finish async for delta in running] == ["length"]
        assert await answer(replicas, asked(ONE)) == (97, 97)
        assert (len(home.asked), home.changes, home.stops) == (2, ["+1"], 0)

    with running(engines) as replicas:
        run(ask(replicas))


def test_added_replica_loads_the_adapters_that_are_its_own_before_it_takes_requests() -> None:
    engines = {name: Recorded() for name in NAMES}
    added = engines["replica-2"]
    added.can_load.clear()
    digests = [f"{number:064x}" for number in range(12)]
    own = [digest for digest in digests if first(digest) == "replica-2"]

    async def ask(replicas: Replicas) -> None:
        for digest in digests:
            await replicas.load(digest, Path())
        adding = asyncio.wrap_future(replicas.add("replica-2"))
        for digest in digests:
            assert await answer(replicas, asked(digest)) == (97, 97)
        assert (replicas.up, adding.done(), added.asked) == (1, False, [])
        assert not replicas.permanently_stopped
        added.can_load.set()
        await adding
        assert sorted(added.loaded) == own
        for digest in digests:
            await answer(replicas, asked(digest))
        assert [request.adapter for request, _ in added.asked] == own

    starter = Starter(NAMES, lambda name, _adapters: engines[name])
    with running({"replica-1": engines["replica-1"]}, starter=starter) as replicas:
        run(ask(replicas))


def test_adapter_that_is_unloaded_while_a_replica_joins_is_not_left_on_it() -> None:
    engines = {name: Recorded() for name in NAMES}
    added, own = engines["replica-2"], next(digest for digest in (ONE, TWO, THREE) if first(digest) == "replica-2")
    added.can_load.clear()

    async def ask(replicas: Replicas) -> None:
        await replicas.load(own, Path())
        adding = asyncio.wrap_future(replicas.add("replica-2"))
        while len(replicas.names) == 1:
            await asyncio.sleep(0.001)
        unloading = asyncio.create_task(replicas.unload(own))
        await asyncio.sleep(0.01)
        added.can_load.set()
        await asyncio.gather(unloading, adding)
        assert added.loaded == []
        assert replicas.resident == []

    starter = Starter(NAMES, lambda name, _adapters: engines[name])
    with running({"replica-1": engines["replica-1"]}, starter=starter) as replicas:
        run(ask(replicas))


def test_replica_that_starts_while_the_server_ends_is_stopped() -> None:
    engines, begun, may_start = {name: Recorded() for name in NAMES}, threading.Event(), threading.Event()

    def start(name: str, _adapters: object) -> Recorded:
        begun.set()
        assert may_start.wait(60)
        return engines[name]

    starter = Starter(NAMES, start, give_up=may_start.set)
    with running({"replica-1": engines["replica-1"]}, starter=starter) as replicas:
        adding = replicas.add("replica-2")
        assert begun.wait(60)
    with pytest.raises(EngineStoppedError, match="shutting down"):
        adding.result(60)
    assert [engine.stops for engine in engines.values()] == [1, 1]


@pytest.mark.parametrize("seed", range(3))
def test_random_load_over_a_growing_and_shrinking_number_fails_no_request(seed: int) -> None:
    """Engines fail a request whose adapter they do not have, and one that comes after their end."""
    draw, digests, room = random.Random(seed), [f"{number:x}" * 64 for number in range(1, 8)], 3
    names = tuple(f"replica-{number}" for number in range(1, 4))
    engines: list[Recorded] = []

    def start(_name: str, _adapters: object) -> Recorded:
        engines.append(Recorded(waits=(0.001, 0.001), max_num_seqs=4))
        return engines[-1]

    async def client(replicas: Replicas) -> None:
        digest = draw.choice([*digests, *digests[:2], None])
        asking = asyncio.create_task(answer(replicas, asked(digest)))
        if draw.random() < 0.2:
            await asyncio.sleep(draw.random() * 0.01)
            asking.cancel()
            await asyncio.wait([asking])
        else:
            assert await asking == (97, 97)

    async def resize(replicas: Replicas) -> None:
        while True:
            free = [name for name in names if name not in replicas.names]
            if free and (len(free) == 2 or draw.random() < 0.5):
                await asyncio.wrap_future(replicas.add(draw.choice(free)))
            else:
                draining = replicas.drain(name := draw.choice(replicas.names), 60)
                if draw.random() < 0.3:
                    replicas.keep(name)
                await asyncio.wrap_future(draining)

    async def ask(replicas: Replicas) -> None:
        for digest in digests:
            await replicas.load(digest, Path())
        resizing = asyncio.create_task(resize(replicas))
        work = []
        for _ in range(200):
            work.append(asyncio.create_task(client(replicas)))
            await asyncio.sleep(draw.random() * 0.004)
        await asyncio.gather(*work)
        resizing.cancel()
        assert replicas.in_flight == (0, 0)

    with running({names[0]: start(names[0], {})}, room=room, starter=Starter(names, start)) as replicas:
        run(ask(replicas))
        assert max(engine.most for engine in engines) <= room
        assert len(engines) > 3
    assert {engine.stops for engine in engines} == {1}


@pytest.mark.parametrize("seed", range(6))
def test_random_load_with_stops_restarts_and_aborts_fails_no_request_that_could_be_answered(seed: int) -> None:
    """Engines fail a request whose adapter they do not have, so that any mistake in the order of changes is seen."""
    draw, digests, room = random.Random(seed), [f"{number:x}" * 64 for number in range(1, 8)], 2
    engines = {f"replica-{number}": Recorded(waits=(0.001, 0.001), max_num_seqs=4) for number in range(3)}
    failed: list[str] = []

    async def client(replicas: Replicas) -> None:
        digest = draw.choice([*digests, *digests[:2], None])
        asking = asyncio.create_task(answer(replicas, asked(digest)))
        if draw.random() < 0.2:
            await asyncio.sleep(draw.random() * 0.01)
            asking.cancel()
            await asyncio.wait([asking])
            return
        try:
            assert await asking == (97, 97)
        except EngineStoppedError as error:
            failed.append(str(error))

    async def unrest() -> None:
        while True:
            await asyncio.sleep(0.02)
            engine = draw.choice([*engines.values()][:2])  # the third one is always up
            engine.stopped = None if engine.stopped else "It crashed."

    async def ask(replicas: Replicas) -> None:
        for digest in digests:
            await replicas.load(digest, Path())
        restless = asyncio.create_task(unrest())
        work = []
        for _ in range(150):
            work.append(asyncio.create_task(client(replicas)))
            await asyncio.sleep(draw.random() * 0.004)
        await asyncio.gather(*work)
        restless.cancel()
        assert replicas.in_flight == (0, 0)

    with running(engines, room=room) as replicas:
        run(ask(replicas))
        # Only answers that had begun.
        assert set(failed) <= {"It crashed."}
        assert len(failed) < 40
        assert max(engine.most for engine in engines.values()) == room
        assert all(state.waiting == 0 for state in replicas.states())


def _expected(base: Path, adapters: dict[str, Path], tokens: int) -> dict[tuple[str | None, int], tuple[int, ...]]:
    """Return each model's own greedy answers, computed alone."""
    found: dict[tuple[str | None, int], tuple[int, ...]] = {}
    models: list[tuple[str | None, Path | None]] = [(None, None), *adapters.items()]
    for digest, folder in models:
        model: Any = LlamaForCausalLM.from_pretrained(base).eval()
        name = None
        if folder is not None:
            model, name = PeftModel.from_pretrained(model, folder, "one").eval(), "one"
        requests = [Request(prompt, name, tokens) for prompt in PROMPTS]
        answers = generate(model, requests, stop_ids=STOPS, pad_id=0, batch_size=1)
        found |= {(digest, place): each.ids for place, each in enumerate(answers)}
    return found


async def _under_load(
    replicas: Replicas, adapters: dict[str, Path], expected: dict[tuple[str | None, int], tuple[int, ...]], kill: Any
) -> tuple[int, int]:
    """Ask for every model at once, again and again, and kill a replica meanwhile.

    Returns:
        The number of answers, and of requests that failed after their first token.
    """
    for digest, folder in adapters.items():
        await replicas.load(digest, folder)
    whole = broken = 0

    async def client(digest: str | None, place: int) -> None:
        nonlocal whole, broken
        for _ in range(4):
            got: list[int] = []
            try:
                async for delta in stream(replicas, Request(PROMPTS[place], digest, 24)):
                    got += delta.ids
            except EngineStoppedError:
                assert got, "a request without a token must move"
                assert tuple(got) == expected[digest, place][: len(got)]
                broken += 1
            else:
                assert tuple(got) == expected[digest, place]
                whole += 1

    clients = [asyncio.create_task(client(*asked)) for asked in expected]
    while whole < len(expected):
        await asyncio.sleep(0.01)
    await kill()
    await asyncio.gather(*clients)
    return whole, broken


def test_each_answer_is_its_own_adapters_when_a_replica_stops_under_load(
    small_base: Path, small_adapters: dict[str, Path]
) -> None:
    expected = _expected(small_base, small_adapters, 24)
    with ExitStack() as started:
        engines = {name: started.enter_context(peft_engine(small_base)) for name in NAMES}
        replicas = started.enter_context(running(engines, room=2))
        stopped = engines[first(next(iter(small_adapters)))]
        whole, broken = run(_under_load(replicas, small_adapters, expected, lambda: asyncio.to_thread(stopped.stop)))
    assert whole + broken == 4 * len(expected)


@pytest.mark.slow
@pytest.mark.fault("engine", "serve")
def test_killed_replica_restarts_with_its_adapters_and_loses_no_request_without_a_token(
    small_base: Path, small_adapters: dict[str, Path]
) -> None:
    expected = _expected(small_base, small_adapters, 24)
    name = first(next(iter(small_adapters)))
    with ExitStack() as started:
        killed = started.enter_context(peft_child(small_base))
        other = started.enter_context(peft_engine(small_base))
        replicas = started.enter_context(running({each: killed if each == name else other for each in NAMES}))

        async def kill() -> None:
            assert killed.child.process_id is not None
            os.kill(killed.child.process_id, signal.SIGKILL)

        whole, broken = run(_under_load(replicas, small_adapters, expected, kill))
        assert whole + broken == 4 * len(expected)
        until = time.monotonic() + 60
        while killed.stopped is not None or killed.restarts == 0:
            assert time.monotonic() < until
            time.sleep(0.05)
        digest = next(iter(small_adapters))
        assert run(answer(replicas, Request(PROMPTS[0], digest, 24))) == expected[digest, 0]
        # The child itself has the adapter again, without a request of the pool for it.
        assert run(answer(killed, Request(PROMPTS[0], digest, 24))) == expected[digest, 0]
        assert replicas.restarts == 1


@pytest.mark.slow
@pytest.mark.release
def test_processes_are_added_and_removed_under_load_and_every_answer_is_its_own_adapters(
    small_base: Path, small_adapters: dict[str, Path]
) -> None:
    expected = _expected(small_base, small_adapters, 24)
    base = Base("small", small_base, None, "LlamaForCausalLM", {})
    config = Config(train=TrainConfig(dtype="float32"), serve=ServeConfig(max_replicas=2))
    engine = start_engines("peft", config, EngineSpec(base, chat_of(TOKENIZER), "none", small_adapters), LogReporter())
    assert isinstance(engine, Replicas)
    processes = {child.pid for child in psutil.Process().children()}
    answered: list[str] = []
    pace = Pace(look=0.0, window=1.0, late=0.1, calm=0.5)
    autoscaler = Autoscaler(engine, ScalingPolicy(1, 2, 2.0, pace), LogReporter(), 60.0)

    async def client(digest: str | None, place: int) -> None:
        while not done.is_set():
            assert await answer(engine, Request(PROMPTS[place], digest, 24)) == expected[digest, place]
            answered.extend(state.name for state in engine.states() if state.up)

    async def looks(demand: Demand, names: list[str]) -> None:
        while engine.names != names or engine.up != len(names):
            autoscaler.look(demand)
            await asyncio.sleep(0.05)

    async def ask() -> None:
        clients = [asyncio.create_task(client(*asked)) for asked in expected]
        for _ in range(2):
            await looks(Demand(16, 4, unanswered=[3.0] * 4), ["replica-1", "replica-2"])
            answered.clear()
            while answered.count("replica-2") < 3 * len(expected):
                await asyncio.sleep(0.05)
            assert sum(state.adapters > 0 for state in engine.states()) == 2
            await looks(Demand(), ["replica-1"])
        done.set()
        await asyncio.gather(*clients)

    done = asyncio.Event()
    try:
        asyncio.run(asyncio.wait_for(ask(), 240))
        assert engine.in_flight == (0, 0)
        assert engine.resident == sorted(small_adapters)
        until = time.monotonic() + 60
        while {child.pid for child in psutil.Process().children()} != processes:
            assert time.monotonic() < until, "the process of a removed replica remains"
            time.sleep(0.05)
    finally:
        engine.stop()
