"""What a tenant at ten times its load does to another one: fair turns against first come, first served.

    python benchmarks/fair_turns.py PROJECT [SECONDS]      (a project with a trained adapter)

Two tenants ask at random moments (Poisson arrivals, which do not wait for answers), the quiet one always at a fifth of
what the server can do. The loud one asks as much as it, then ten times as much: more than there is room for. Prints the
quiet one's waits for a line of people and one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np

from tunewright.adapters.registry import find_adapter
from tunewright.progress import LogReporter
from tunewright.project import Project
from tunewright.road import Road
from tunewright.serving.fairness import FairQueue
from tunewright.serving.state import Grounds, State

TENANTS = ("quiet", "loud")
SHARE = 0.2  # of the server's capacity, asked for by the quiet tenant
MAX_TOKENS = 16


class FirstCome(FairQueue):
    """The order in which engines take requests by themselves: everybody is one tenant."""

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:  # noqa: ARG002
        async with super().place("everybody"):
            yield


@dataclass(frozen=True)
class Waits:
    """The quiet tenant's seconds to the first token and to the whole answer."""

    first: list[float]
    whole: list[float]

    def told(self) -> dict[str, float]:
        """Median and 99th percentile."""
        pairs = {"first": self.first, "whole": self.whole}
        return {f"{name}_p{p}": float(np.percentile(values, p)) for name, values in pairs.items() for p in (50, 99)}


def main(folder: str, seconds: float) -> None:
    """Measure what the server can do, then the three loads."""
    project = Project(Path(folder))
    with tempfile.TemporaryDirectory() as temporary:
        url = f"sqlite:///{temporary}/state.sqlite"
        serve = project.recipe.serve.model_copy(update={"state": url, "port": 0})
        road = Road(Project(project.root, project.recipe.model_copy(update={"serve": serve})), LogReporter())
        keys = _tenants(url, road)
        prompts = [[m.as_dict() for m in row.example.prompt] for row in road.data.version().examples("test")]
        with road.serve().running() as address:
            capacity = asyncio.run(_capacity(address, keys, prompts, road.project.recipe.serve.max_batch))
            print(f"capacity: {capacity:.2f} requests/s")
            even = asyncio.run(_load(address, keys, prompts, capacity, 1, seconds))
            fair = asyncio.run(_load(address, keys, prompts, capacity, 10, seconds))
        with patch("tunewright.serving.app.FairQueue", FirstCome), road.serve().running() as address:
            first_come = asyncio.run(_load(address, keys, prompts, capacity, 10, seconds))
    sides = {"loud at 1x": even, "loud at 10x, fair turns": fair, "loud at 10x, first come": first_come}
    for name, waits in sides.items():
        told, base = waits.told(), even.told()
        print(
            f"{name}: {len(waits.whole)} answers to quiet; first token p50 {told['first_p50']:.2f} s, "
            f"p99 {told['first_p99']:.2f} s ({told['first_p99'] / base['first_p99']:.1f}x); whole answer p50 "
            f"{told['whole_p50']:.2f} s, p99 {told['whole_p99']:.2f} s ({told['whole_p99'] / base['whole_p99']:.1f}x)"
        )
    print(json.dumps({"capacity": capacity} | {name: waits.told() for name, waits in sides.items()}))


def _tenants(url: str, road: Road) -> dict[str, str]:
    adapter = find_adapter(road.project.adapters)
    with State(url, "benchmark") as state:
        state.releases.deploy("model", adapter.name, adapter.digest, Grounds(None, None, "a benchmark"))
        keys = {}
        for name in TENANTS:
            state.tenants.add(name, ["model"])
            keys[name], _ = state.tenants.add_key(name)
    return keys


async def _ask(client: httpx.AsyncClient, key: str, prompt: Any, waits: Waits | None) -> None:
    body = {"model": "model", "messages": prompt, "max_tokens": MAX_TOKENS, "stream": True}
    began, first = time.perf_counter(), None
    headers = {"Authorization": f"Bearer {key}"}
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
        reply.raise_for_status()
        async for line in _data(reply):
            if first is None and '"content": ""' not in line:
                first = time.perf_counter()
    if waits is not None:
        waits.whole.append(time.perf_counter() - began)
        waits.first.append((first or time.perf_counter()) - began)


async def _data(reply: httpx.Response) -> AsyncIterator[str]:
    async for line in reply.aiter_lines():
        if line.startswith("data: {"):
            yield line


async def _capacity(address: str, keys: dict[str, str], prompts: list[Any], batch: int) -> float:
    """Requests a second with the batch always full."""
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        jobs = [prompts[number % len(prompts)] for number in range(6 * batch)]
        await asyncio.gather(*(_ask(client, keys["loud"], prompt, None) for prompt in jobs[:batch]))
        began = time.perf_counter()
        await asyncio.gather(*(_ask(client, keys["loud"], prompt, None) for prompt in jobs))
        return len(jobs) / (time.perf_counter() - began)


async def _load(
    address: str, keys: dict[str, str], prompts: list[Any], capacity: float, times: int, seconds: float
) -> Waits:
    """The quiet tenant's waits, with the loud one at so many times its rate."""
    waits = Waits([], [])
    loud: list[asyncio.Task[None]] = []
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=httpx.Limits(max_connections=None)) as client:

        async def arrive(name: str, rate: float, seed: int) -> list[asyncio.Task[None]]:
            draw, end = random.Random(seed), time.perf_counter() + seconds
            asked: list[asyncio.Task[None]] = []
            while time.perf_counter() < end:
                await asyncio.sleep(draw.expovariate(rate))
                told = waits if name == "quiet" else None
                asked.append(asyncio.create_task(_ask(client, keys[name], draw.choice(prompts), told)))
            return asked

        quiet, loud = await asyncio.gather(
            arrive("quiet", SHARE * capacity, 1), arrive("loud", times * SHARE * capacity, 2)
        )
        await asyncio.gather(*quiet)
        for task in loud:
            task.cancel()
        await asyncio.gather(*loud, return_exceptions=True)
    return waits


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 120)
