"""Pause of running answers while another adapter is loaded or unloaded.

    python benchmarks/release_pause.py PROJECT [--adapters 32] [--rounds 5] [--rows 4] [--threads N]

PROJECT has a trained adapter. Several versions of it (its B matrices disturbed by a seed) are loaded in the engine
``peft``, which then decodes rows of some of them without end. In one run:

    nothing   the gaps between an answer's tokens while nothing else is done
    load      gaps during the loading of one more adapter
    unload    gaps during its unloading
    peft      time of peft to load and delete an adapter next to as many others, when nothing can be decoded

Prints a table, and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from load_tenants import disturbed

from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.engines.protocol import Engine, stream
from tunewright.generation.requests import Request
from tunewright.models.loading import load_model, with_adapters
from tunewright.open_project import OpenProject
from tunewright.serving.engine_start import EngineSpec, start_engine

NOISE = 10.0
PROMPT = 40
"""Tokens before an answer."""


def main() -> None:
    """Measure both sides with the same adapters."""
    parser = argparse.ArgumentParser()
    parser.add_argument("project", type=Path)
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 8, 32], help="resident ones")
    parser.add_argument("--rounds", type=int, default=5, help="of loading and letting go")
    parser.add_argument("--rows", type=int, default=4, help="running answers, each of another adapter if there are")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    found = OpenProject(ProjectFolder(options.project), LogReporter())
    trained = find_adapter(found.folder.adapters)
    with tempfile.TemporaryDirectory() as place:
        made = [disturbed(Path(place), trained, seed, NOISE) for seed in range(max(options.adapters) + 1)]
        for count in options.adapters:
            ours = asyncio.run(measure(found, made[:count], made[count], options.rounds, options.rows))
            gc.collect()
            result = {"adapters": count, **ours, **by_peft(found, made[:count], made[count], options.rounds)}
            gc.collect()
            send(result)
            print(json.dumps(result), flush=True)


def send(result: dict[str, Any]) -> None:
    """Print the medians over the rounds."""
    print(f"{result['adapters']} adapters there, {result['rows']} running answers", file=sys.stderr)
    print(f"  a pass: {1000 * result['pass_s']:.0f} ms", file=sys.stderr)
    for what in ("nothing", "load", "unload"):
        gaps = [1000 * gap for gap in result[f"gaps_{what}_s"]]
        summary = f"{statistics.median(gaps):5.0f} ms (of {len(gaps)} rounds {min(gaps):.0f} to {max(gaps):.0f})"
        print(f"  longest gap, {what:8}{summary}", file=sys.stderr)
    for what in ("load", "delete"):
        print(f"  peft's {what:14}{1000 * statistics.median(result[f'peft_{what}_s']):5.0f} ms", file=sys.stderr)


async def measure(found: OpenProject, resident: list[Adapter], late: Adapter, rounds: int, rows: int) -> dict[str, Any]:
    """Return the longest gap of each round, by concurrent operation."""
    config = found.folder.config
    spec = EngineSpec(
        found.base, replace(found.chat, stop_ids=frozenset()), "none", {each.digest: each.folder for each in resident}
    )
    engine = await asyncio.to_thread(start_engine, "peft", config, spec, found.reporter)
    gaps: dict[str, list[float]] = {"nothing": [], "load": [], "unload": []}
    seconds: dict[str, list[float]] = {"load": [], "unload": []}
    try:
        async with decoding(engine, [resident[n % len(resident)].digest for n in range(rows)]) as tokens:
            await tokens.gap_within(1.0)
            for _ in range(rounds):
                gaps["nothing"].append(await tokens.gap_within(1.0))
                for what in seconds:
                    began = time.perf_counter()
                    await (engine.load(late.digest, late.folder) if what == "load" else engine.unload(late.digest))
                    ended = time.perf_counter()
                    seconds[what].append(ended - began)
                    await tokens.after(ended)
                    gaps[what].append(tokens.longest(began, ended))
                    await asyncio.sleep(0.5)
    finally:
        await asyncio.to_thread(engine.stop)
    return {
        "rows": rows,
        "pass_s": statistics.median(b - a for times in tokens.times for a, b in pairwise(times)),
        **{f"gaps_{what}_s": values for what, values in gaps.items()},
        **{f"{what}_s": values for what, values in seconds.items()},
    }


class Tokens:
    """Arrival times of each answer's tokens."""

    def __init__(self, rows: int) -> None:
        self.times: list[list[float]] = [[] for _ in range(rows)]

    def longest(self, began: float, ended: float) -> float:
        """Return an answer's longest gap between two tokens that overlaps a span of time."""
        pairs = [pair for times in self.times for pair in pairwise(times)]
        return max(b - a for a, b in pairs if b >= began and a <= ended)

    async def gap_within(self, seconds: float) -> float:
        """Return the longest gap without any other operation."""
        began = time.perf_counter()
        await asyncio.sleep(seconds)
        ended = time.perf_counter()
        await self.after(ended)
        return self.longest(began, ended)

    async def after(self, moment: float) -> None:
        """Wait until each answer has a token later than a moment."""
        while any(times[-1] <= moment for times in self.times):
            await asyncio.sleep(0.005)


@asynccontextmanager
async def decoding(engine: Engine, adapters: list[str]) -> AsyncIterator[Tokens]:
    """Keep answers of these adapters running, each restarted when it ends."""
    tokens = Tokens(len(adapters))

    async def one(place: int) -> None:
        while True:
            prompt = tuple(1000 + place + n for n in range(PROMPT))
            async for _ in stream(engine, Request(prompt, adapters[place], 4000)):
                tokens.times[place].append(time.perf_counter())

    tasks = [asyncio.create_task(one(place)) for place in range(len(adapters))]
    try:
        while not all(tokens.times):
            await asyncio.sleep(0.01)
        yield tokens
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def by_peft(found: OpenProject, resident: list[Adapter], late: Adapter, rounds: int) -> dict[str, list[float]]:
    """Return the seconds that peft takes next to as many adapters."""
    base = load_model(found.base, found.folder.config.train.dtype, "none")
    model = with_adapters(base, {each.digest: each.folder for each in resident})
    taken: dict[str, list[float]] = {"peft_load_s": [], "peft_delete_s": []}
    for _ in range(rounds):
        began = time.perf_counter()
        with_adapters(model, {late.digest: late.folder})
        middle = time.perf_counter()
        model.set_adapter(resident[0].digest, inference_mode=True)
        model.delete_adapter(late.digest)
        taken["peft_load_s"].append(middle - began)
        taken["peft_delete_s"].append(time.perf_counter() - middle)
    return taken


if __name__ == "__main__":
    main()
