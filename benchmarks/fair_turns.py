"""Effect of a tenant at ten times its load on another tenant: fair scheduling against first come, first served.

    python benchmarks/fair_turns.py PROJECT [--seconds 60] [--rounds 3] [--threads 1]

PROJECT has a trained adapter. Two tenants ask at random moments (Poisson arrivals, which do not wait for answers),
the quiet one always at a fifth of the server's capacity. The loud one sends nothing, as much as the quiet one, or ten
times as much, which exceeds the capacity. The loads alternate, so that other load on the machine affects all of them,
and the capacity for one tenant alone is measured in each round. The server runs in a separate process, the clients in
this one. The bar: the quiet one's 99th percentiles with the loud one at ten times are less than twice those with it
at once. Prints a table and writes benchmarks/results/fair_turns.json.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arrivals import Answer, Waits, burst, poisson
from load_clients import Clients
from load_host import Host
from load_shown import machine
from rich.console import Console
from rich.table import Table

from tunewright.adapters.registry import find_adapter
from tunewright.config.project import ProjectFolder
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.data.versions import load_version
from tunewright.open_project import OpenProject
from tunewright.serving.engine_start import max_num_seqs
from tunewright.serving.gateway.fair_scheduler import ACTIVE_SECONDS
from tunewright.serving.tenants import State
from tunewright.serving.tenants.releases import Grounds

TENANTS = ("quiet", "loud")
SHARE = 0.2  # of the server's capacity, asked for by the quiet tenant
TOKENS = 16
LOADS = {"alone": 0, "loud at 1x": 1, "loud at 10x": 10}
FIRST_COME = "loud at 10x, first come"
RESULTS = Path(__file__).with_name("results") / "fair_turns.json"


def main() -> None:
    """Measure the server's capacity, then the loads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("project", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="of each load in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    about = machine(options.threads)
    opened = OpenProject(ProjectFolder(options.project), LogReporter())
    answers: dict[str, list[Answer]] = {name: [] for name in (*LOADS, FIRST_COME)}
    capacities: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        url = f"sqlite:///{temporary}/state.sqlite"
        keys = tenants(url, opened.folder)
        prompts = [row.example.prompt for row in load_version(opened.folder.dataset).examples("test")]
        with Host(options.project, url, options.threads) as host:
            meter = Meter(Clients(host.url, keys, ["model"] * 2), prompts)
            for turn in range(options.rounds):
                if turn:
                    time.sleep(ACTIVE_SECONDS + 1)  # who has had company lately leaves places free for it
                config = opened.folder.config
                capacities.append(asyncio.run(meter.capacity(max_num_seqs(config.serve.engine, config))))
                for name, times in LOADS.items():
                    answers[name] += asyncio.run(meter.load(SHARE * capacities[-1], times, options.seconds, turn))
        with Host(options.project, url, options.threads, fair=False) as host:
            meter = Meter(Clients(host.url, keys, ["model"] * 2), prompts)
            answers[FIRST_COME] = asyncio.run(meter.load(SHARE * capacities[-1], 10, options.seconds, 0))
    waits = {name: Waits.of(own) for name, own in answers.items()}
    show(capacities, waits)
    measured = {name: {"answers": one.answered, **one.summary()} for name, one in waits.items()}
    settings = {"seconds": options.seconds, "rounds": options.rounds, "tokens": TOKENS, "quiet_share": SHARE}
    ratios = {name: ratio(waits, f"{name}_p99") for name in ("first", "whole")}
    write_json(
        RESULTS,
        {
            "machine": about,
            "settings": settings,
            "capacities_per_s": capacities,
            "quiet": measured,
            "p99_ratios": ratios,
        },
    )


def tenants(url: str, project: ProjectFolder) -> list[str]:
    """Create two tenants of one adapter; return their keys."""
    adapter = find_adapter(project.adapters)
    with State(url, "benchmark") as state:
        state.releases.deploy("model", adapter.name, adapter.digest, Grounds(None, None, "a benchmark"))
        for name in TENANTS:
            state.tenants.add(name, ["model"])
        return [state.keys.create(name)[0] for name in TENANTS]


class Meter:
    """A client that sends requests as both tenants.

    Args:
        prompts: drawn from at random.
    """

    def __init__(self, clients: Clients, prompts: list[Any]) -> None:
        self._clients = clients
        self._prompts = prompts

    async def capacity(self, batch: int) -> float:
        """Return requests per second with the batch always full."""
        for count in (batch, 6 * batch):
            asks = burst(count, [0.0, 1.0], 0)
            answers, seconds = await self._clients.open_loop(asks, lambda n: self._prompts[n % 16], TOKENS)
        return len(answers) / seconds

    async def load(self, rate: float, times: int, seconds: float, seed: int) -> list[Answer]:
        """Return the quiet tenant's answers while the loud one sends at ``times`` its rate."""
        draw = random.Random(seed)
        drawn = [draw.choice(self._prompts) for _ in range(10_000)]
        quiet = poisson(rate, seconds, [1.0, 0.0], seed)
        loud = poisson(times * rate, seconds, [0.0, 1.0], seed + 1000) if times else []
        noise = asyncio.create_task(self._clients.open_loop(loud, lambda n: drawn[n], TOKENS)) if loud else None
        answers, _ = await self._clients.open_loop(quiet, lambda n: drawn[-n], TOKENS)
        if noise is not None:
            noise.cancel()
            await asyncio.gather(noise, return_exceptions=True)
        assert all(answer.status == 200 for answer in answers)
        return answers


def ratio(waits: Mapping[str, Waits], what: str) -> float:
    """Return the growth of the quiet tenant's waits when the loud one goes from once to ten times."""
    before, after = waits["loud at 1x"].summary()[what], waits["loud at 10x"].summary()[what]
    assert before and after
    return after / before


def show(capacities: Sequence[float], waits: Mapping[str, Waits]) -> None:
    """Print the quiet tenant's waits under each load."""
    table = Table("the quiet tenant", "answers", "first p50", "p99", "between p50", "p99", "whole p50", "p99")
    for name, one in waits.items():
        summary = one.summary()
        table.add_row(
            name,
            str(one.answered),
            *(f"{summary[f'{what}_p{p}']:.2f} s" for what in ("first", "between", "whole") for p in (50, 99)),
        )
    console = Console(width=120)
    console.print(table)
    grown = {what: f"{ratio(waits, f'{what}_p99'):.2f} times" for what in ("first", "whole")}
    console.print(
        f"The server can do {min(capacities):.1f} to {max(capacities):.1f} requests/s. p99 from 1x to 10x: "
        f"first token {grown['first']}, whole answer {grown['whole']} (bar: less than 2)."
    )


if __name__ == "__main__":
    main()
