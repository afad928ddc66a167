"""Replicas that stop, drain and run out of room, with several adapters under load."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_kinds import STOPS, TOKENIZER, peft_child, peft_engine
from peft import PeftModel
from scripted_engine import ScriptedEngine
from transformers import LlamaForCausalLM

from tunewright.core.errors import UserError
from tunewright.engines.protocol import Delta, Engine, EngineStoppedError, RequestFailedError, stream
from tunewright.generation.generate import generate
from tunewright.generation.requests import Request
from tunewright.serving.engines.placement import rendezvous_order
from tunewright.serving.engines.replicas import Replicas

NAMES = ("replica-1", "replica-2")
PROMPTS = [tuple(TOKENIZER(text).input_ids) for text in ("Mobile County", "Where is it?", "a")]
ONE, TWO, THREE = ("1" * 64, "2" * 64, "3" * 64)


class Recorded(ScriptedEngine):
    """A scripted engine with its adapters, which can stop."""

    def __init__(self, waits: Sequence[float] = (0.0, 0.0), max_num_seqs: int = 8) -> None:
        super().__init__(waits, max_num_seqs)
        self.loaded: list[str] = []
        self.changes: list[str] = []
        self.can_load = asyncio.Event()
        self.can_load.set()
        self.stops = 0
        self.most = 0
        """The most adapters that were loaded at one time."""

    async def deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Fail as an engine does that has stopped, or has another adapter."""
        if request.adapter is not None and request.adapter not in self.loaded:
            raise RequestFailedError(f"The adapter {request.adapter} is not loaded.")
        async with aclosing(super().deltas(request)) as deltas:
            async for delta in deltas:
                if self.stopped:
                    raise EngineStoppedError(self.stopped)
                yield delta

    async def load(self, digest: str, folder: Path) -> None:
        """Load it once it may."""
        while not self.can_load.is_set():
            await asyncio.sleep(0.001)
        if self.stopped:
            raise EngineStoppedError(self.stopped)
        if folder.name == "broken":
            raise UserError("The files have changed")
        self.loaded.append(digest)
        self.changes.append(f"+{digest[0]}")
        self.most = max(self.most, len(self.loaded))

    async def unload(self, digest: str) -> None:
        """Unload it."""
        if digest in self.loaded:
            self.loaded.remove(digest)
            self.changes.append(f"-{digest[0]}")

    def stop(self) -> None:
        """Stop."""
        self.stopped = "stopped"
        self.stops += 1


@contextmanager
def running(engines: dict[str, Any], **settings: Any) -> Iterator[Replicas]:
    replicas = Replicas(engines, **settings)
    try:
        yield replicas
    finally:
        replicas.stop()


async def answer(engine: Engine, request: Request) -> tuple[int, ...]:
    async with aclosing(stream(engine, request)) as deltas:
        return tuple([token async for delta in deltas for token in delta.ids])


def asked(digest: str | None, tokens: int = 2) -> Request:
    return Request(PROMPTS[0], digest, tokens)


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def first(digest: str, names: Sequence[str] = NAMES) -> str:
    return rendezvous_order(digest, tuple(sorted(names)))[0]


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
    engines = {name: Recorded(waits=(0.02, 0.02), max_num_seqs=4) for name in NAMES}

    async def ask(replicas: Replicas) -> None:
        await replicas.load(ONE, Path())
        work = []
        for _ in range(12):
            work.append(asyncio.create_task(answer(replicas, asked(ONE))))
            await asyncio.sleep(0.002)
        assert await asyncio.gather(*work) == [(97, 97)] * 12

    with running(engines) as replicas:
        run(ask(replicas))
    counts = {name: len(engine.asked) for name, engine in engines.items()}
    assert min(counts.values()) >= 3, counts


def test_drained_replica_finishes_its_answers_gets_no_further_ones_and_is_stopped() -> None:
    engines = {name: Recorded() for name in NAMES}
    home = engines[first(ONE)]
    home.waits = [0.0, 0.5]

    async def ask(replicas: Replicas) -> None:
        await replicas.load(ONE, Path())
        running = stream(replicas, asked(ONE))
        await anext(running)
        draining = asyncio.create_task(replicas.drain(first(ONE)))
        await asyncio.sleep(0.01)
        assert await answer(replicas, asked(ONE)) == (97, 97)
        assert (len(home.asked), home.stops, draining.done()) == (1, 0, False)
        assert [delta.finish async for delta in running] == ["length"]
        await draining
        assert home.stops == 1
        assert replicas.names == [name for name in NAMES if name != first(ONE)]
        assert await answer(replicas, asked(ONE)) == (97, 97)

    with running(engines) as replicas:
        run(ask(replicas))


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
