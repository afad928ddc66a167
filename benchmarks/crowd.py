"""Effect of 1,000 idle connections and 300 greedy requests of one tenant on another tenant's 99th percentile.

    python benchmarks/crowd.py [--rounds 8] [--seconds 15] [--rate 4] [--idle 1000] [--greedy 300]

The quiet tenant streams answers at random moments, which do not wait for each other. In turns it is alone, has a
neighbour that sends as much as it does, has the idle connections only, or has them and the greedy tenant, which keeps
its requests in progress all the time. Every other round has the reverse order, so that other load on the machine
affects all of them. Server, crowd and the quiet tenant's clients are three processes. The base is tiny, so the
gateway's share of the time is large.

Waits are measured by the wall clock, and in the server's own processor time, which other programs do not make longer.
The bar: with the crowd, the 99th percentile is at most twice the one alone. Intervals resample the rounds. Prints a
table and writes benchmarks/results/crowd.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from arrivals import Ask, percentile, poisson
from load_shown import machine
from rich.console import Console
from rich.table import Table
from soak_host import Host, make_project

from tunewright.core.io import write_json
from tunewright.serving.tenants import State
from tunewright.serving.tenants.releases import Grounds

TENANTS = ("quiet", "greedy")
TOKENS, GREEDY_TOKENS = 16, 64
ALONE, NEIGHBOUR, IDLE, CROWD = "alone", "neighbour at 1x", "idle connections", "crowd"
STATES = (ALONE, NEIGHBOUR, IDLE, CROWD)
BAR = 2.0
RESULTS = Path(__file__).with_name("results") / "crowd.json"


@dataclass(frozen=True)
class Wait:
    """The waits of one answer in seconds: by the wall clock since it was due, and in the server's processor time."""

    first: float
    whole: float
    first_cpu: float
    whole_cpu: float


WAITS = tuple(Wait.__dataclass_fields__)


def main() -> None:
    """Measure the quiet tenant in all states."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15, help="of each state in each round")
    parser.add_argument("--rate", type=float, default=4, help="the quiet tenant's requests per second")
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--greedy", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    about = machine(1)
    waits: dict[str, list[list[Wait]]] = {state: [] for state in STATES}
    crowds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        project = Path(temporary) / "project"
        keys = make_tenants(project, options.seed)
        with Host(project) as host:
            quiet = Quiet(host, keys)
            asyncio.run(quiet.load(options.rate, 5, 0, [0.5, 0.5]))  # warms the server up
            for number in range(options.rounds):
                for state in STATES if number % 2 == 0 else reversed(STATES):
                    rate, shares = (2 * options.rate, [0.5, 0.5]) if state == NEIGHBOUR else (options.rate, [1.0, 0.0])
                    idle = options.idle if state in (IDLE, CROWD) else 0
                    with crowd(host.url, keys[1], idle, options.greedy if state == CROWD else 0) as outcome:
                        one = asyncio.run(quiet.load(rate, options.seconds, options.seed + number, shares))
                    waits[state].append(one)
                    if outcome:
                        crowds.append({"state": state, **outcome})
                    print(f"round {number + 1}, {state}: {figures([one])}", file=sys.stderr, flush=True)
    result = {
        "machine": about,
        "settings": vars(options),
        "quiet": {state: figures(rounds) for state, rounds in waits.items()},
        "p99_of_rounds": {state: [figures([one]) for one in rounds] for state, rounds in waits.items()},
        "p99_ratios": {
            state: {name: ratio(waits[state], waits[ALONE], name) for name in WAITS} for state in STATES[1:]
        },
        "crowds": crowds,
    }
    write_json(RESULTS, result)
    show(result)


def make_tenants(project: Path, seed: int) -> list[str]:
    """Create a project with two tenants, each with an adapter; return their keys."""
    adapters = make_project(project, 1 + len(TENANTS), seed)[1:]  # the trained one answers with a word
    keys = []
    with State(f"sqlite:///{project}/serving/state.sqlite", "benchmark") as state:
        for name, adapter in zip(TENANTS, adapters, strict=True):
            state.releases.deploy(name, adapter.name, adapter.digest, Grounds(None, None, "a benchmark"))
            state.tenants.add(name, [name])
            keys.append(state.keys.create(name)[0])
    return keys


class Quiet:
    """The clients of the quiet tenant, and of a neighbour that is as quiet."""

    def __init__(self, host: Host, keys: Sequence[str]) -> None:
        self._url = host.url
        self._keys = keys
        # The processor clock of another process: see clock_getcpuclockid(3).
        self._clock = ~host.pid << 3 | 2

    async def load(self, rate: float, seconds: float, seed: int, shares: Sequence[float]) -> list[Wait]:
        """Send Poisson arrivals of both tenants; return the quiet tenant's waits."""
        connector, patient = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(self._url, connector=connector, timeout=patient) as session:
            began = time.perf_counter()
            asks = poisson(rate, seconds, shares, seed)
            waits = await asyncio.gather(*(self._ask(session, ask, number, began) for number, ask in enumerate(asks)))
        return [wait for ask, wait in zip(asks, waits, strict=True) if ask.tenant == 0]

    async def _ask(self, session: aiohttp.ClientSession, ask: Ask, number: int, began: float) -> Wait:
        await asyncio.sleep(max(0.0, began + ask.at - time.perf_counter()))
        body = {
            "model": TENANTS[ask.tenant],
            "messages": [{"role": "user", "content": f"Which court is number {number}?"}],
            "max_tokens": TOKENS,
            "stream": True,
        }
        headers = {"Authorization": f"Bearer {self._keys[ask.tenant]}"}
        sent = time.clock_gettime(self._clock)
        async with session.post("/v1/chat/completions", json=body, headers=headers) as reply:
            assert reply.status == 200, await reply.text()
            await reply.content.readany()
            first = time.perf_counter() - began - ask.at, time.clock_gettime(self._clock) - sent
            await reply.read()
        whole = time.perf_counter() - began - ask.at, time.clock_gettime(self._clock) - sent
        return Wait(first[0], whole[0], first[1], whole[1])


@contextmanager
def crowd(url: str, key: str, idle: int, greedy: int) -> Iterator[dict[str, Any]]:
    """Run a crowd in another process during the block; yield a dictionary that gets what happened to it."""
    outcome: dict[str, Any] = {}
    if not idle + greedy:
        yield outcome
        return
    script = Path(__file__).with_name("crowd_clients.py")
    command = [sys.executable, str(script), url, key, TENANTS[1], str(idle), str(greedy), str(GREEDY_TOKENS)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n", "the crowd has failed; its messages say why"
        yield outcome
        process.stdin.close()
        outcome |= json.loads(process.stdout.readline())
    finally:
        process.kill()  # it has nothing to finish
        process.wait()
    time.sleep(1)  # the server notices that the clients have gone


def figures(rounds: Sequence[Sequence[Wait]]) -> dict[str, Any]:
    """Return the percentiles over rounds."""
    every = [asdict(wait) for waits in rounds for wait in waits]
    found: dict[str, Any] = {"answers": len(every)}
    for name in WAITS:
        found |= {f"{name}_p{percent}": percentile([one[name] for one in every], percent) for percent in (50, 99)}
    return found


def ratio(rounds: Sequence[Sequence[Wait]], alone: Sequence[Sequence[Wait]], name: str) -> dict[str, float]:
    """Return the ratio of the 99th percentiles, and its 95% interval over resampled pairs of rounds."""
    pairs = [[[asdict(wait)[name] for wait in waits] for waits in pair] for pair in zip(rounds, alone, strict=True)]

    def of(chosen: Sequence[int]) -> float:
        ours, theirs = (np.percentile([wait for n in chosen for wait in pairs[n][side]], 99) for side in (0, 1))
        return float(ours / theirs)

    draw = np.random.default_rng(0)
    resampled = [of(draw.integers(len(pairs), size=len(pairs)).tolist()) for _ in range(2000)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"ratio": of(range(len(pairs))), "low": float(low), "high": float(high)}


def show(result: Mapping[str, Any]) -> None:
    """Print the quiet tenant's waits in each state."""
    table = Table("the quiet tenant", "answers")
    for name in WAITS:
        for column in (f"{name} p50", "p99", "ratio (95% interval)"):
            table.add_column(column)
    for state, one in result["quiet"].items():
        cells = []
        for name in WAITS:
            cells += [f"{1000 * one[f'{name}_p{percent}']:.0f} ms" for percent in (50, 99)]
            found = result["p99_ratios"].get(state, {}).get(name)
            cells.append(f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else "")
        table.add_row(state, str(one["answers"]), *cells)
    console = Console(width=170)
    console.print(table)
    statuses = sum((Counter(one["statuses"]) for one in result["crowds"]), Counter[str]())
    closed = sum(one["closed_by_server"] for one in result["crowds"])
    console.print(f"The crowd's answers by status: {dict(statuses)}; {closed} idle connections closed. Bar: {BAR:g}.")


if __name__ == "__main__":
    main()
