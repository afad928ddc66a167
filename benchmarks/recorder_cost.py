"""Throughput of a server that records all requests, against the same server and requests with recording forbidden.

    python benchmarks/recorder_cost.py [--pairs 24] [--requests 16] [--tokens 32] [--parallel 8] [--threads 1]

A tenant of the bundled base with an adapter sends requests, some in parallel, from another process. Each pair is a
block with the header `X-Tunewright-Record: on` and one with `off`, in alternating order. The prompts contain an e-mail
address, so that each record has something to replace. Per block: requests per second, the server's processor time,
and that of its threads besides the engine's: the recorder's own, the event loop's, which hands requests to it, and the
state's. The engine's time for the same requests differs by a tenth from block to block; that of the other threads shows
what recording adds.

Prints a table, and writes benchmarks/results/recorder_cost.json.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from load_shown import machine
from rich.console import Console
from rich.table import Table

from tunewright.adapters.lineage import SystemPrompt
from tunewright.adapters.registry import adapter_digest
from tunewright.chat import open_chat
from tunewright.chat.answers import grammar_compiler
from tunewright.config import ChatConfig, Config, GatewayConfig
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.models.bases import resolve_base
from tunewright.serving.engine_start import EngineSpec, start_engine
from tunewright.serving.gateway.app import RECORD_HEADER, Gateway
from tunewright.serving.gateway.auth import ServedAdapter
from tunewright.serving.gateway.preprocess import Tokenization
from tunewright.serving.gateway.server import serving
from tunewright.serving.gateway.tenant_auth import TenantAuth
from tunewright.serving.tenants import State
from tunewright.serving.tenants.record_keys import KeyFile
from tunewright.serving.tenants.releases import Grounds

RESULTS = Path(__file__).with_name("results") / "recorder_cost.json"
QUESTION = (
    "I live in Elm Street, write to me at tenant.{number}@elm-street-houses.org. My landlord "
    "keeps the deposit of 1,200 dollars and says that the carpet was stained. What is this about?"
)
ALIAS = "alias"


def main() -> None:
    """Run the pairs, or the requests of one block as a child process."""
    parser = argparse.ArgumentParser()
    for name, value in (("pairs", 24), ("requests", 16), ("tokens", 32), ("parallel", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ask", nargs=2, metavar=("URL", "KEY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        url, key = options.ask
        asyncio.run(clients(url, key, options))
        return
    before = machine(options.threads)
    pairs = measure(options)
    shown = {name: summary([pair["off"][name] / pair["on"][name] for pair in pairs]) for name in ("seconds", "cpu")}
    shown["own"] = summary([pair["on"]["recorder"] / pair["off"]["cpu"] for pair in pairs])
    more = [pair["on"]["threads"] - pair["off"]["threads"] for pair in pairs]
    shown["added"] = summary([each / pair["off"]["cpu"] for each, pair in zip(more, pairs, strict=True)])
    shown["milliseconds"] = summary([1000 * each / options.requests for each in more])
    show(pairs, shown)
    settings = {name: getattr(options, name) for name in ("pairs", "requests", "tokens", "parallel", "threads")}
    write_json(RESULTS, {"machine": before, "settings": settings, "ratios": shown, "pairs": pairs})


def measure(options: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """Return the seconds and the server's processor seconds of each pair's two blocks."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    base = resolve_base("bundled:smollm2-135m-instruct", None, Path(), LogReporter())
    chat = open_chat(base, ChatConfig(), LogReporter())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model: Any = AutoModelForCausalLM.from_pretrained(base.folder)
        get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).save_pretrained(f"{folder}/adapter")
        del model
        digest = adapter_digest(folder / "adapter")
        spec = EngineSpec(base, chat, "none", {digest: folder / "adapter"})
        engine = start_engine("peft", Config(), spec, LogReporter())
        state, file = State(f"sqlite:///{folder}/state.sqlite", "recorder_cost"), KeyFile(folder / "record.key")
        state.tenants.add("tenant", [ALIAS])
        key, _ = state.keys.create("tenant")
        state.releases.deploy(ALIAS, "adapter", digest, Grounds(None, None, "a benchmark"))
        state.records.start("tenant", "a benchmark", 1, 1.0, file)
        served = ServedAdapter(folder / "adapter", SystemPrompt(None))
        auth = TenantAuth(state, engine, lambda _name, _digest: served, LogReporter(), file)
        tokenization = Tokenization(chat.prompt, chat.continuation, chat.text, grammar_compiler(chat))
        try:
            with serving(Gateway(engine, auth, tokenization, GatewayConfig()).app) as url, Blocks(url, key) as ask:
                ask("off")  # warms up
                pairs = []
                for number in range(options.pairs):
                    order = ("on", "off") if number % 2 else ("off", "on")
                    pairs.append({side: ask(side) for side in order})
            with State(f"sqlite:///{folder}/state.sqlite") as after:
                (found,) = after.records.list()
        finally:
            engine.stop()
    assert (found.records, found.dropped) == (options.pairs * options.requests, 0), "all are recorded, and none dropped"
    return pairs


class Blocks:
    """The process of the clients: each call sends a block of requests and returns its times."""

    def __init__(self, url: str, key: str) -> None:
        command = [sys.executable, *sys.argv, "--ask", url, key]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, side: str) -> dict[str, float]:
        """Send a block, and wait until its answers are there and their records had time to be written."""
        assert self._process.stdin is not None and self._process.stdout is not None
        before = processor_times()
        print(side, file=self._process.stdin, flush=True)
        seconds = float(self._process.stdout.readline())
        time.sleep(0.3)
        return {"seconds": seconds} | {name: after - before[name] for name, after in processor_times().items()}

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *raised: object) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def processor_times() -> dict[str, float]:
    """Return the processor seconds of this process, of the recorder's thread, and of all threads but the engine's."""
    found = {"cpu": time.process_time(), "recorder": 0.0, "threads": 0.0}
    for thread in threading.enumerate():
        if thread.name.startswith("tunewright-") and thread.name != "tunewright-engine" and thread.ident is not None:
            seconds = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            found["threads"] += seconds
            found["recorder"] += seconds if thread.name == "tunewright-recorder" else 0
    return found


async def clients(url: str, key: str, options: argparse.Namespace) -> None:
    """Send a block of requests for each line of the input, and print its seconds."""
    headers = {"Authorization": f"Bearer {key}"}
    loop, patient = asyncio.get_running_loop(), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, headers=headers, timeout=patient) as session:
        while side := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
            numbers = iter(range(options.requests))

            async def worker(side: str, numbers: Any) -> None:
                for number in numbers:
                    body = {
                        "model": ALIAS,
                        "messages": [{"role": "user", "content": QUESTION.format(number=number)}],
                        "max_tokens": options.tokens,
                        "user": f"user-{number}",
                    }
                    async with session.post("/v1/chat/completions", json=body, headers={RECORD_HEADER: side}) as reply:
                        assert reply.status == 200, await reply.text()
                        await reply.read()

            began = time.perf_counter()
            await asyncio.gather(*(worker(side, numbers) for _ in range(options.parallel)))
            print(time.perf_counter() - began, flush=True)


def summary(ratios: Sequence[float]) -> dict[str, float]:
    """Return the median of the pairs' ratios, with its 95% interval by a bootstrap."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return {"median": statistics.median(ratios), "low": float(low), "high": float(high)}


def show(pairs: Sequence[dict[str, dict[str, float]]], shown: dict[str, dict[str, float]]) -> None:
    """Print the ratios, recording against not (1 is no cost), and what recording adds to the other threads."""
    titles = {
        "seconds": "throughput",
        "cpu": "requests per processor second",
        "own": "the recorder's part of the processor time",
        "added": "that, and what it adds to other threads",
        "milliseconds": "the same, milliseconds per request",
    }
    table = Table(f"recording against not, {len(pairs)} pairs", "median", "95% interval")
    for name, found in shown.items():
        median, low, high = (f"{found[each]:.4f}" for each in ("median", "low", "high"))
        table.add_row(titles[name], median, f"{low} to {high}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
