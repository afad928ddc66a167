"""1,000 adapters on four replicas of a tiny base: waits, loads and memory, with affinity and without it.

    python benchmarks/serving_replicas.py [--adapters 1000] [--room 100] [--rate 8] [--seconds 75]

Each replica is an engine process with a random base of two layers and one thread. Requests arrive at random times
(Poisson); each is for one adapter, by Zipf's law. Both sides get the same requests, one after the other, in two rounds
of which the second begins with the other side:

    affinity        the server's own placement
    least loaded    any of the least loaded replicas, as of a load balancer that knows no adapters

Waits count from the time a request was due to its last token, at the engines: without HTTP, keys and queue. The
simulation of `replicas_simulated.py` gets the costs of a load and of an answer from a run of its own before, and is
compared with what was measured. Prints a table and writes benchmarks/results/serving_replicas.json.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from arrivals import Ask, percentile, poisson, zipf_shares
from load_shown import machine
from peft import LoraConfig, get_peft_model
from replicas_simulated import SIDES, Costs, Simulation, placement, result
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from tunewright.adapters.registry import adapter_digest
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.engines.protocol import stream
from tunewright.generation.requests import Request
from tunewright.serving.engines.peft_child import PeftChild, PeftSettings
from tunewright.serving.engines.replicas import Replicas

RESULTS = Path(__file__).with_name("results") / "serving_replicas.json"
VOCABULARY, CONTEXT, ROWS = 512, 256, 16
PROMPT, TOKENS = 24, 16
STOP = 0


def main() -> None:
    """Measure both sides, and compare the simulation with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--room", type=int, default=100, help="adapters in a replica's memory")
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=75.0, help="of each side in each round")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    options = parser.parse_args()
    about = machine(1)
    with tempfile.TemporaryDirectory() as place, ExitStack() as started:
        base, adapters = Path(place, "base"), write_models(Path(place), options.adapters)
        with ThreadPoolExecutor(options.replicas) as pool:
            engines = list(pool.map(lambda _: start(base), range(options.replicas)))
        for engine in engines:
            started.callback(engine.stop)
        costs = asyncio.run(calibrate(engines, adapters, options))
        rounds = []
        for number, order in enumerate((SIDES, SIDES[::-1])):
            asks = poisson(options.rate, options.seconds, zipf_shares(options.adapters, options.exponent), number)
            rounds.append({side: asyncio.run(measure(side, engines, adapters, asks, options, costs)) for side in order})
    show(rounds)
    settings = vars(options) | {"rows": ROWS, "prompt_tokens": PROMPT, "answer_tokens": TOKENS}
    found = {"load_s": costs.load, "exchange_s": costs.exchange, "answer_s": costs.answer, "row_s": costs.row}
    write_json(RESULTS, {"machine": about, "settings": settings, "costs": found, "rounds": rounds})


def write_models(place: Path, count: int) -> dict[str, Path]:
    """Write a random base and its adapters; return their folders by digest."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(place / "base")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped: Any = get_peft_model(model, config)
    found = {}
    for number in range(count):
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.1)
        folder = place / f"adapter-{number}"
        wrapped.save_pretrained(folder)
        found[adapter_digest(folder)] = folder
    return found


def start(base: Path) -> PeftChild:
    """Start a replica."""
    settings = PeftSettings(
        base=base,
        architecture="LlamaForCausalLM",
        dtype="float32",
        quantization="none",
        stop_ids=(STOP,),
        pad_id=STOP,
        max_num_seqs=ROWS,
        context_length=CONTEXT,
        variables={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    return PeftChild(settings, LogReporter())


def replicas_of(engines: Sequence[PeftChild], room: int, side: str) -> Replicas:
    """Return the engines as one engine."""
    return Replicas(
        {f"replica-{number}": engine for number, engine in enumerate(engines, 1)},
        room=room,
        placement=placement(side),
    )


async def empty(engines: Sequence[PeftChild], adapters: dict[str, Path]) -> None:
    """Unload every adapter."""
    for engine in engines:
        for digest in adapters:
            await engine.unload(digest)


async def calibrate(engines: Sequence[PeftChild], adapters: dict[str, Path], options: argparse.Namespace) -> Costs:
    """Measure a load with room and without, and answers of adapters that are all in memory, at the same rate."""
    digests = list(adapters)
    replicas = replicas_of(engines, options.room, "affinity")
    seconds = []
    for digest in digests[: 3 * options.room]:
        began = time.monotonic()
        await replicas.load(digest, adapters[digest])
        seconds.append(time.monotonic() - began)
    loads = float(np.mean(seconds))
    await empty(engines, adapters)
    single = replicas_of(engines[:1], 10, "affinity")
    exchanges = []
    for place, digest in enumerate(digests[:60]):
        began = time.monotonic()
        await single.load(digest, adapters[digest])
        if place >= 10:
            exchanges.append(time.monotonic() - began)
    await empty(engines, adapters)
    few = digests[: options.room]
    warm = replicas_of(engines, options.room, "affinity")
    for digest in few:
        await warm.load(digest, adapters[digest])
    asks = poisson(options.rate, options.seconds / 2, np.full(len(few), 1 / len(few)), 99)
    others: list[int] = []
    waits = await drive(warm, few, asks, others)
    await empty(engines, adapters)
    design = np.stack([np.ones(len(waits)), np.asarray(others, float)], axis=1)
    (answer, row), *_ = np.linalg.lstsq(design, np.asarray(waits), rcond=None)
    expected = design @ np.asarray([answer, row])
    factors = np.quantile(np.asarray(waits) / expected, np.linspace(0.005, 0.995, 100))
    return Costs(loads, float(np.mean(exchanges)), float(answer), float(row), tuple(float(each) for each in factors))


async def drive(
    replicas: Replicas, digests: Sequence[str], asks: Sequence[Ask], others: list[int] | None = None
) -> list[float]:
    """Send each request when it is due; return the seconds from then to its last token.

    Args:
        others: receives, for each request, the mean number of other requests on a replica when it was sent.
    """
    began = time.monotonic()
    prompts = np.random.default_rng(0).integers(1, VOCABULARY, (len(asks), PROMPT))

    async def ask(number: int) -> float:
        request = Request(tuple(int(token) for token in prompts[number]), digests[asks[number].tenant], TOKENS)
        async for delta in stream(replicas, request, tenant=str(asks[number].tenant)):
            if delta.finish:
                break
        return time.monotonic() - began - asks[number].at

    waiting = []
    for number, due in enumerate(asks):
        await asyncio.sleep(max(0.0, began + due.at - time.monotonic()))
        if others is not None:
            others.append(round(sum(replicas.in_flight) / len(replicas.names)))
        waiting.append(asyncio.create_task(ask(number)))
    return list(await asyncio.gather(*waiting))


async def measure(
    side: str,
    engines: Sequence[PeftChild],
    adapters: dict[str, Path],
    asks: Sequence[Ask],
    options: argparse.Namespace,
    costs: Costs,
) -> dict[str, Any]:
    """Measure and simulate one side; every adapter is loaded once before, as when a server starts."""
    digests = list(adapters)
    replicas = replicas_of(engines, options.room, side)
    registered = [digests[place] for place in np.random.default_rng(1).permutation(len(digests))]
    began = time.monotonic()
    for digest in registered:
        await replicas.load(digest, adapters[digest])
    start_s = time.monotonic() - began
    before = sum(state.loads for state in replicas.states())
    cpu_before = _cpu(engines)
    waits = await drive(replicas, digests, asks)
    states = replicas.states()
    measured = {
        "requests": len(asks),
        "p50_s": percentile(waits, 50),
        "p99_s": percentile(waits, 99),
        "loads": sum(state.loads for state in states) - before,
        "adapters_in_memory": sum(state.adapters for state in states),
        "private_mb": [round(_private(engine) / 1e6, 1) for engine in engines],
        "cpu_s": round(_cpu(engines) - cpu_before, 1),
        "start_s": round(start_s, 1),
    }
    await empty(engines, adapters)
    simulation = Simulation(side, options.replicas, ROWS, options.room, costs)
    simulation.register(registered)
    simulation.run(asks, digests)
    return {"measured": measured, "simulated": result(simulation, len(asks))}


def _private(engine: PeftChild) -> int:
    """Return the memory that only this replica has."""
    return int(psutil.Process(engine.child.process_id).memory_full_info().uss)


def _cpu(engines: Sequence[PeftChild]) -> float:
    """Return the processor seconds of all replicas."""
    times = [psutil.Process(engine.child.process_id).cpu_times() for engine in engines]
    return float(sum(each.user + each.system for each in times))


def show(rounds: Sequence[dict[str, Any]]) -> None:
    """Print what was measured and simulated."""
    table = Table("round", "side", "", "requests", "p50 s", "p99 s", "loads", "in memory", "MB a replica", "CPU s")
    for number, found in enumerate(rounds, 1):
        for side in SIDES:
            for how, values in found[side].items():
                memory = values.get("private_mb")
                table.add_row(
                    str(number),
                    side,
                    how,
                    *(str(values[name]) for name in ("requests", "p50_s", "p99_s", "loads", "adapters_in_memory")),
                    "" if memory is None else f"{max(memory):.0f}",
                    str(values.get("cpu_s", "")),
                )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
