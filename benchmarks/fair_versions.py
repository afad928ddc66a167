"""Compare a quiet tenant's waits alongside a busy one on two versions of the server, in turns on one machine.

    python benchmarks/fair_versions.py PROJECT --before CHECKOUT BEFORE_PROJECT [--rounds 6] [--answers 12]

CHECKOUT is a worktree of another commit, and BEFORE_PROJECT the same project in that commit's format. Both servers run
the whole time, each in a separate process, and take turns with the same requests. The loud tenant always has three
times as many requests open as the engine has rows. The quiet one asks at random moments for a fifth of the capacity.

All moments and waits are in the server's own processor time. The server is never idle, so this clock never stands
still, and other programs on the machine do not make its seconds longer. Waits by the wall clock are printed too.
Prints a table and writes benchmarks/results/fair_versions.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import aiohttp
from arrivals import Answer, Ask
from fair_turns import SHARE, TOKENS
from load_clients import Clients, Prompt
from load_host import Host
from load_shown import machine
from rich.console import Console
from rich.table import Table

from tunewright.config.project import ProjectFolder
from tunewright.core.io import write_json
from tunewright.data.versions import load_version

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fair_versions.json"
OPEN = 48  # requests of the loud tenant: three times the rows of an engine with the config's defaults
# Runs in the checkout whose server uses the database. The project's class had another name before `config/project.py`.
MAKE_TENANTS = """
import sys, fair_turns
from pathlib import Path
folder = getattr(fair_turns, "ProjectFolder", None) or fair_turns.Project
print(*fair_turns.tenants(sys.argv[1], folder(Path(sys.argv[2]))))
"""


@dataclass(frozen=True)
class Round:
    """One round of one version: the quiet tenant's answers, timed by the processor clock."""

    answers: list[Answer]
    wall: list[float]
    """Seconds of each quiet answer."""
    cpu_per_token: float
    """Processor seconds of a token, over both tenants."""

    def figures(self) -> dict[str, float]:
        """Return the round's medians."""
        return {
            "first token, processor s": statistics.median(answer.first for answer in self.answers),
            "whole answer, processor s": statistics.median(answer.whole for answer in self.answers),
            "whole answer, s": statistics.median(self.wall),
            "processor ms a token, both tenants": 1000 * self.cpu_per_token,
        }


class Version:
    """A checkout's server with two tenants."""

    def __init__(self, checkout: Path, project: Path, folder: Path, threads: int) -> None:
        git = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
        self.commit = subprocess.run(git, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        benchmarks = checkout / "benchmarks"
        environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
        state = f"sqlite:///{folder}/{self.commit}.sqlite"
        made = subprocess.run(
            [sys.executable, "-c", MAKE_TENANTS, state, str(project)],
            cwd=benchmarks,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        self.host = Host(project, state, threads, script=benchmarks / "load_host.py", environment=environment)
        # The processor clock of another process: see clock_getcpuclockid(3).
        self._clock: Callable[[], float] = partial(time.clock_gettime, ~self.host.pid << 3 | 2)
        self._clients = Clients(self.host.url, made.stdout.split()[-2:], ["model"] * 2, self._clock)

    async def measure(self, rate: float, count: int, seed: int, prompts: Sequence[Prompt]) -> Round:
        """Ask for ``count`` quiet answers, ``rate`` of them a processor second."""
        draw, began, spoken = random.Random(seed), self._clock(), 0

        async def ask(session: aiohttp.ClientSession, tenant: int, due: float) -> Answer:
            nonlocal spoken
            reply = await self._clients.ask(session, Ask(due, tenant), draw.choice(prompts), TOKENS, began)
            assert reply.status == 200
            spoken += TOKENS
            return reply.answer

        async def loud(session: aiohttp.ClientSession) -> None:
            while True:
                await ask(session, 1, self._clock() - began)

        async def quiet(session: aiohttp.ClientSession, due: float) -> tuple[Answer, float]:
            start = time.perf_counter()
            return await ask(session, 0, due), time.perf_counter() - start

        async with self._clients.connected() as session:
            noise = [asyncio.create_task(loud(session)) for _ in range(OPEN)]
            asked, due = [], 0.0
            for _ in range(count):
                due += draw.expovariate(rate)
                while self._clock() - began < due:
                    await asyncio.sleep(0.005)
                asked.append(asyncio.create_task(quiet(session, due)))
            answers, wall = zip(*await asyncio.gather(*asked), strict=True)
            spent = self._clock() - began
            for task in noise:
                task.cancel()
            await asyncio.gather(*noise, return_exceptions=True)
        return Round(list(answers), list(wall), spent / spoken)


def main() -> None:
    """Measure both versions in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("project", type=Path)
    parser.add_argument("--before", type=Path, nargs=2, required=True, metavar=("CHECKOUT", "PROJECT"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--answers", type=int, default=12, help="of the quiet tenant in each round")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    about = machine(options.threads)
    rows = load_version(ProjectFolder(options.project).dataset).examples("test")
    prompts = [row.example.prompt for row in rows]
    rounds: dict[str, list[Round]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as temporary:
        checkout, project = (path.resolve() for path in options.before)
        before = Version(checkout, project, Path(temporary), options.threads)
        after = Version(ROOT, options.project.resolve(), Path(temporary), options.threads)
        with before.host, after.host:
            warm = [asyncio.run(version.measure(1.0, 3, 0, prompts)) for version in (before, after)]
            rate = SHARE / (TOKENS * warm[0].cpu_per_token)
            for turn in range(options.rounds):
                sides = [("before", before), ("after", after)]
                # The order alternates, so that a machine that becomes slower does not favour one of them.
                for name, version in sides if turn % 2 == 0 else sides[::-1]:
                    rounds[name].append(asyncio.run(version.measure(rate, options.answers, turn, prompts)))
                print({name: done[-1].figures() for name, done in rounds.items()}, file=sys.stderr, flush=True)
            figures = {name: [one.figures() for one in done] for name, done in rounds.items()}
            show(figures["before"], figures["after"])
            write_json(
                RESULTS,
                {
                    "machine": about,
                    "commits": {"before": before.commit, "after": after.commit},
                    "settings": {"answers": options.answers, "open": OPEN, "tokens": TOKENS, "quiet_share": SHARE},
                    "rounds": figures,
                },
            )


def show(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]) -> None:
    """Print medians over the rounds, and the ratio within a round with its spread."""
    table = Table("the quiet tenant", "before", "after", "after / before (rounds)")
    for name in before[0]:
        old, new = [one[name] for one in before], [one[name] for one in after]
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"{statistics.median(old):.3f}", f"{statistics.median(new):.3f}", spread)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
