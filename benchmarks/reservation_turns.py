"""A tenant's reservation behind a burst of another tenant's, with turns and in the order of arrival.

    python benchmarks/reservation_turns.py [--rounds 20] [--burst 300]

One tenant's requests are there at once, and another tenant's request comes right after them; there is no engine and no
HTTP. In turns: the request alone, behind the burst as the server does it, and behind the burst without turns. Counts
the reservations that are made before it, and measures the process's own processor time until it is made. Prints a
table and writes benchmarks/results/reservation_turns.json.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from tunewright.adapters.lineage import SystemPrompt
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.engines.protocol import Engine
from tunewright.serving.gateway.auth import ServedAdapter
from tunewright.serving.gateway.tenant_auth import TenantAuth
from tunewright.serving.tenants import Grounds, Reservation, State

RESULTS = Path(__file__).with_name("results") / "reservation_turns.json"
SIDES = ("alone", "with turns", "in the order of arrival")
DIGEST = "0" * 64


class AnyAdapter:
    """An engine that has every adapter."""

    name = "none"

    async def load(self, digest: str, folder: Path) -> None:
        """Load nothing."""

    async def unload(self, digest: str) -> None:
        """Unload nothing."""


class NoTurns(dict[int, asyncio.Lock]):
    """Locks that nobody shares."""

    def setdefault(self, _tenant: int, lock: asyncio.Lock) -> asyncio.Lock:
        """Return the new lock."""
        return lock


def main() -> None:
    """Measure all sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--burst", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(Path(folder), options.rounds, options.burst))
    table = Table("the quiet tenant's reservation", "reservations before it", "p50", "p99", "p99 to alone")
    for side, one in found.items():
        before = f"{one['before_p50']:.0f} (most {one['before_max']})"
        ratio = f"{one['seconds_p99'] / found['alone']['seconds_p99']:.1f}"
        table.add_row(side, before, *(f"{1000 * one[f'seconds_p{p}']:.1f} ms" for p in (50, 99)), ratio)
    Console(width=120).print(table)
    write_json(RESULTS, {"settings": vars(options), "sides": found})


async def measure(folder: Path, rounds: int, burst: int) -> dict[str, dict[str, Any]]:
    """Return each side's counts and processor times."""
    url = f"sqlite:///{folder}/state.sqlite"
    reservations = []
    with State(url) as state:
        release = state.releases.deploy("model", "adapter", DIGEST, Grounds(None, None, "a benchmark"))
        for name in ("greedy", "quiet"):
            state.tenants.add(name, ["model"])
            caller = state.keys.caller(state.keys.create(name)[0])
            reservations.append(Reservation(caller.tenant_id, caller.key_id, "model", release.id, DIGEST, 10))
    greedy, quiet = reservations
    served = ServedAdapter(folder, SystemPrompt(None))
    auth = TenantAuth(
        State(url, serving=True), cast(Engine, AnyAdapter()), lambda _name, _digest: served, LogReporter()
    )
    turns = auth._reserving
    taken: dict[str, list[tuple[int, float]]] = {side: [] for side in SIDES}
    async with auth.running(lambda _callers: None):
        for number in range(rounds + 1):
            for side in SIDES:
                auth._reserving = NoTurns() if side == SIDES[2] else turns  # type: ignore[assignment]
                tasks = [asyncio.create_task(auth.reserve(greedy)) for _ in range(0 if side == SIDES[0] else burst)]
                began = time.process_time()
                mine = await asyncio.create_task(auth.reserve(quiet))  # runs after those of the burst
                seconds = time.process_time() - began
                before = sum(other < mine for other in await asyncio.gather(*tasks))
                if number:  # the first round fills caches
                    taken[side].append((before, seconds))
    return {
        side: {
            "before_p50": float(np.median([before for before, _ in own])),
            "before_max": max(before for before, _ in own),
            **{f"seconds_p{p}": float(np.percentile([seconds for _, seconds in own], p)) for p in (50, 99)},
        }
        for side, own in taken.items()
    }


if __name__ == "__main__":
    main()
