"""A server's replicas on a Ray cluster of several raylets on this machine, of which one is killed under load."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener
from engine_kinds import STOPS, TOKENIZER
from parts import Counting, ready
from peft import PeftModel
from raylets import raylets, token_required
from transformers import LlamaForCausalLM

from tiny import chat_of
from tunewright.compute import open_hosts
from tunewright.config import Config, ServeConfig, TrainConfig
from tunewright.config.compute import ComputeConfig
from tunewright.core.errors import UserError
from tunewright.engines.protocol import EngineStoppedError, RequestFailedError, stream
from tunewright.generation.constraints import Grammar, GrammarCompiler
from tunewright.generation.generate import generate
from tunewright.generation.requests import Request
from tunewright.models.bases import resolve_base
from tunewright.serving.engines.autoscaler import Autoscaler
from tunewright.serving.engines.replicas import Replicas
from tunewright.serving.engines.scaling import Demand, Pace, ScalingPolicy
from tunewright.serving.engines.start import EngineSpec
from tunewright.serving.engines.start_replicas import start_engines

pytestmark = pytest.mark.ray

PROMPT = tuple(TOKENIZER("Mobile County").input_ids)
TOKENS = 24
WAIT_S = 240


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A head without CPUs and two machines with one each."""
    with token_required(), raylets() as cluster:
        cluster.lost = cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        yield cluster


def spec_of(base: Path) -> EngineSpec:
    opened = resolve_base(str(base), None, base.parent, Listener())
    return EngineSpec(opened, chat_of(TOKENIZER), "none", {})


def config_of(replicas: int, largest: int | None = None) -> Config:
    serve = ServeConfig(replicas=replicas, max_replicas=largest, adapters_per_replica=2)
    return Config(compute=ComputeConfig(cluster="auto"), train=TrainConfig(dtype="float32"), serve=serve)


def expected_answers(base: Path, adapters: dict[str, Path]) -> dict[str | None, tuple[int, ...]]:
    found: dict[str | None, tuple[int, ...]] = {}
    models: list[tuple[str | None, Path | None]] = [(None, None), *adapters.items()]
    for digest, folder in models:
        model: Any = LlamaForCausalLM.from_pretrained(base).eval()
        if folder is not None:
            model = PeftModel.from_pretrained(model, folder, "one").eval()
        request = Request(PROMPT, None if folder is None else "one", TOKENS)
        (answer,) = generate(model, [request], stop_ids=STOPS, pad_id=0, batch_size=1)
        found[digest] = answer.ids
    return found


async def answer(replicas: Replicas, request: Request) -> tuple[int, ...]:
    return tuple([token async for delta in stream(replicas, request) for token in delta.ids])


def test_more_replicas_than_cpus_and_a_missing_base_are_refused(
    machines: Any, small_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="Too few CPUs in the cluster for 3 replicas: 2"):
        start_engines("peft", config_of(3), spec_of(small_base), Listener())
    gone = shutil.copytree(small_base, tmp_path / "base")
    spec = spec_of(gone)
    shutil.rmtree(gone)
    with pytest.raises(UserError, match=r"The machine [\d.]+: The base \S+ is missing"):
        start_engines("peft", config_of(2), spec, Listener())
    import ray

    assert not ray.is_initialized()


def test_closing_events_early_ends_the_work_on_the_other_machine(machines: Any) -> None:
    async def three(host: Any) -> list[int]:
        async with aclosing(host.events("events")) as events:
            return [await anext(events) for _ in range(3)]

    with open_hosts(config_of(2), 1, 1, ready, "", Listener()) as hosts:
        host = hosts.start("counting", Counting, 2)
        assert asyncio.run(three(host)) == [2, 4, 6]
        time.sleep(0.5)
        counted = host.call("so_far")
        time.sleep(0.5)
        assert host.call("so_far") == counted
        host.stop()


def test_replicas_are_added_on_machines_with_room_and_removed_and_one_without_room_waits(
    machines: Any, small_base: Path, small_adapters: dict[str, Path]
) -> None:
    import ray

    expected = expected_answers(small_base, small_adapters)
    heard = Listener()
    engine = start_engines("peft", config_of(1, largest=3), spec_of(small_base), heard)
    assert isinstance(engine, Replicas)
    pace = Pace(look=0.0, window=1.0, late=0.1, calm=0.5)
    autoscaler = Autoscaler(engine, ScalingPolicy(1, 2, 2.0, pace), heard, 60.0)
    done = asyncio.Event()

    async def client(digest: str | None) -> None:
        while not done.is_set():
            assert await answer(engine, Request(PROMPT, digest, TOKENS)) == expected[digest]

    async def looks(demand: Demand, names: list[str]) -> None:
        while engine.names != names or engine.up != len(names):
            autoscaler.look(demand)
            await asyncio.sleep(0.1)

    async def ask() -> None:
        for name, folder in small_adapters.items():
            await engine.load(name, folder)
        clients = [asyncio.create_task(client(digest)) for digest in expected]
        await looks(Demand(16, 4, unanswered=[3.0] * 4), ["replica-1", "replica-2"])
        waiting = engine.add("replica-3")
        while not any("replica-3 waits for a machine with a free CPU" in warning for warning in heard.warned):
            await asyncio.sleep(0.1)
        await looks(Demand(), ["replica-1"])
        await asyncio.wrap_future(waiting)  # the room of the removed one
        assert engine.names == ["replica-1", "replica-3"]
        engine.add("replica-2")  # waits for room until the server ends
        done.set()
        await asyncio.gather(*clients)

    try:
        asyncio.run(asyncio.wait_for(ask(), WAIT_S))
        assert "The cluster has 2 CPUs now: more than 2 replicas need more machines." in heard.warned
    finally:
        engine.stop()
    assert not ray.is_initialized()


def test_replicas_on_a_cluster_answer_and_survive_the_loss_of_a_machine(
    machines: Any, small_base: Path, small_adapters: dict[str, Path]
) -> None:
    expected = expected_answers(small_base, small_adapters)
    heard = Listener()
    engine = start_engines("peft", config_of(2), spec_of(small_base), heard)
    assert isinstance(engine, Replicas)
    broken = 0

    async def client(digest: str | None) -> None:
        nonlocal broken
        for _ in range(5):
            got: list[int] = []
            try:
                async for delta in stream(engine, Request(PROMPT, digest, TOKENS)):
                    got += delta.ids
            except EngineStoppedError:
                assert got, "a request without a token must move"
                assert tuple(got) == expected[digest][: len(got)]
                broken += 1
            else:
                assert tuple(got) == expected[digest]

    async def load() -> None:
        for name, folder in small_adapters.items():
            await engine.load(name, folder)
        for digest in expected:
            assert await answer(engine, Request(PROMPT, digest, TOKENS)) == expected[digest]
        constraint = GrammarCompiler(TOKENIZER, STOPS).compile(Grammar.choices(["Ala.", "Fla."]))
        chosen = await answer(engine, Request(PROMPT, None, 8, constraint=constraint))
        assert TOKENIZER.decode(chosen) in ("Ala.", "Fla.")
        with pytest.raises(RequestFailedError, match="not loaded"):
            await answer(engine, Request(PROMPT, "0" * 64, 2))
        clients = [asyncio.create_task(client(digest)) for digest in expected for _ in range(2)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(machines.remove_node, machines.lost, allow_graceful=False)
        await asyncio.gather(*clients)
        assert engine.in_flight == (0, 0)

    try:
        asyncio.run(asyncio.wait_for(load(), WAIT_S))
        assert broken <= 8, "at most those that ran there"
        until = time.monotonic() + WAIT_S
        while [state.up for state in engine.states()].count(False) != 1:
            assert time.monotonic() < until
            time.sleep(0.1)
        machines.add_node(num_cpus=1)
        while not all(state.up for state in engine.states()):
            assert time.monotonic() < until
            time.sleep(0.1)
        assert engine.restarts == 1
        for digest in expected:
            assert asyncio.run(answer(engine, Request(PROMPT, digest, TOKENS))) == expected[digest]
    finally:
        engine.stop()
    import ray

    assert not ray.is_initialized()
    assert any("was lost" in warning for warning in heard.warned)
