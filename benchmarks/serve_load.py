"""Many tenants on one base: waits by tenant under load, and the cost of tenancy, adapters and the gateway.

    python benchmarks/serve_load.py PROJECT [--tenants 32] [--seconds 300] [--requests 2000] [--threads N]

PROJECT has a trained adapter, of which each tenant gets a version of its own (its weights disturbed by a seed), stored
like any adapter and released under the tenant's alias. The server runs in a separate process, the clients in this one.
In one run on the same server the compared sides alternate, with requests at the same random times, twice as many as
can be answered:

    memory      of each further tenant, against its adapter's bytes
    throughput  of all tenants (Zipf) against one tenant alone, with one adapter
    gateway     throughput and latency over HTTP, with keys, limits and fair turns, against the bare engine
    load        Poisson arrivals, Zipf over tenants; new tenants' adapters are released meanwhile (cold loads)
    isolation   requests of all tenants mixed; each answer is compared with peft's and transformers' answer

Prints tables, writes benchmarks/results/serve_load.json and docs/images/serve-load.png.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from arrivals import Answer, Ask, Bounds, Waits, burst, by_tenant, goodput_fairness, jain, poisson, zipf_shares
from load_clients import Clients, cold_loads
from load_host import Host
from load_mixed import mixed
from load_shown import draw, machine, show
from load_tenants import Tenant, add_tenants, make_adapters, release
from scipy.stats import quantile_test

from tunewright.config.project import ProjectFolder
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Message
from tunewright.data.versions import load_version
from tunewright.open_project import OpenProject
from tunewright.serving.gateway.fair_scheduler import ACTIVE_SECONDS
from tunewright.serving.tenants import State

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "serve_load.json"
PLOT = ROOT / "docs" / "images" / "serve-load.png"
SEED = 0
LATECOMERS = 4
"""Tenants whose adapters are released while there is load."""
PAIR_TOKENS = 2
"""Of an answer whose first token is timed: the engine continues while it is sent, as with any."""
BUSY = 0.6
"""The load's share of what the server can do."""
RUSH = 2.0
"""The same where throughput is measured: nearly all of the time there is more to do than fits."""


def main() -> None:
    """Measure all parts on one server."""
    options = read_options()
    about = machine(options.threads) | {"options": {**vars(options), "project": None, "parts": None, "save": None}}
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "project"
        shutil.copytree(options.project, root)
        opened = OpenProject(ProjectFolder(root), LogReporter())
        url = f"sqlite:///{temporary}/state.sqlite"
        with State(url, "load") as state:
            adapters = make_adapters(opened, options.tenants + LATECOMERS, SEED, options.noise)
            tenants = add_tenants(state, adapters)
            release(state, tenants[0])
            with Host(root, url, options.threads) as host:
                load = Load(opened, state, tenants, options, host)
                for name in options.parts:
                    parts[name] = {"run": about, **getattr(load, name)()}
                    print(json.dumps({name: parts[name]}), file=sys.stderr)
    show(parts)
    if options.save:
        # Parts that were measured in another run stay, and say in which.
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        write_json(RESULTS, {**known, **parts})
        if "load" in parts:
            draw(parts["load"], PLOT)


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    names = ["memory", "throughput", "gateway", "load", "isolation"]
    parser = argparse.ArgumentParser()
    parser.add_argument("project", type=Path)
    parser.add_argument("--tenants", type=int, default=32)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the tenants' shares")
    parser.add_argument("--seconds", type=float, default=300, help="of the load")
    parser.add_argument("--rounds", type=int, default=3, help="that the sides of a comparison take in turns")
    parser.add_argument("--pairs", type=int, default=300, help="of single requests, through the gateway and without")
    parser.add_argument("--jobs", type=int, default=192, help="requests of one side in one round")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--requests", type=int, default=2000, help="whose adapter is checked")
    parser.add_argument("--probes", type=int, default=48, help="the most prompts tried that tell adapters apart")
    parser.add_argument("--noise", type=float, default=14.0, help="how far tenants' adapters are from the trained one")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--parts", nargs="*", default=names, choices=names)
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


Seconds = tuple[float, float]
"""To an answer's first token, and to its end."""


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds and processor seconds of the server for some answers."""

    tokens: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def rounds(count: int, *measured: dict[str, list[Cost]]) -> Iterator[int]:
    """Run the rounds, after one for warming up that is not counted."""
    for turn in range(count + 1):
        yield turn
        if not turn:
            for sides in measured:
                for costs in sides.values():
                    costs.clear()


def compared(sides: dict[str, list[Cost]]) -> dict[str, Any]:
    """Return both sides' medians over the rounds, and the median of the second's share of the first within a round.

    The bars apply to wall-clock time. Processor time is not blurred by other work on the machine; it is the cost as if
    server and model shared one core.
    """
    before, after = sides.values()
    ratios = [b.rate / a.rate for a, b in zip(before, after, strict=True)]
    by_cpu = [(b.tokens / b.cpu) / (a.tokens / a.cpu) for a, b in zip(before, after, strict=True)]
    return {
        "tokens_per_s": {name: statistics.median(c.rate for c in costs) for name, costs in sides.items()},
        "tokens_per_cpu_s": {name: statistics.median(c.tokens / c.cpu for c in costs) for name, costs in sides.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ratio_by_cpu": statistics.median(by_cpu),
    }


class Load:
    """The parts of the measurement; each is a method that returns its part of the results."""

    def __init__(
        self, opened: OpenProject, state: State, tenants: Sequence[Tenant], options: argparse.Namespace, host: Host
    ) -> None:
        self.host = host
        self._opened = opened
        self._state = state
        self._tenants = tenants[: options.tenants]
        self._late = tenants[options.tenants :]
        self._options = options
        self._shares = zipf_shares(options.tenants, options.zipf)
        rows = load_version(opened.folder.dataset).examples("test")
        self._prompts: list[tuple[Message, ...]] = [tuple(row.example.prompt) for row in rows]
        self._ids = [opened.chat.prompt(prompt) for prompt in self._prompts]
        self._clients = Clients(host.url, [tenant.key for tenant in tenants], [tenant.alias for tenant in tenants])
        self._capacity: float | None = None
        """Requests a second that it has answered."""
        self._all_released = False

    def _prompt(self, number: int) -> tuple[Message, ...]:
        return self._prompts[number % len(self._prompts)]

    def _release_all(self) -> list[float]:
        """Release the other tenants' adapters; return the seconds until each was live."""
        if self._all_released:
            return []
        self._all_released = True

        async def one(tenant: int) -> None:
            await asyncio.to_thread(release, self._state, self._tenants[tenant])

        others = list(range(1, len(self._tenants)))
        loads = asyncio.run(cold_loads(self._clients, others, one, 0.0, time.perf_counter()))
        return [end - start for start, end in loads]

    def _asks(self, tenants: Sequence[float], seed: int) -> list[Ask]:
        """Return more requests than fit, in the tenants' shares; all at once until the capacity is known."""
        return burst(self._options.jobs, tenants, seed, RUSH * self._capacity if self._capacity else None)

    def _over_http(self, asks: Sequence[Ask]) -> tuple[list[Answer], Cost]:
        """Return the answers of clients that send these requests."""
        before = self.host.send(do="cpu")
        answers, seconds = asyncio.run(self._clients.open_loop(asks, self._prompt, self._options.tokens))
        assert all(answer.status == 200 for answer in answers)
        cost = Cost(sum(answer.counted for answer in answers), seconds, self.host.send(do="cpu") - before)
        self._capacity = self._capacity or cost.rate / self._options.tokens
        return answers, cost

    def _pairs(self, count: int) -> list[dict[str, dict[str, float]]]:
        """Time single requests of the first tenant, over HTTP and on the bare engine, in seconds.

        Both get the same prompt in alternating order, so that other load on the machine affects both equally.
        """

        async def over_http(session: aiohttp.ClientSession, number: int) -> Seconds:
            began = time.perf_counter()
            reply = await self._clients.ask(session, Ask(0.0, 0), self._prompt(number), PAIR_TOKENS, began)
            answer = reply.answer
            assert answer.status == 200
            return answer.first, answer.end

        async def bare(_session: aiohttp.ClientSession, number: int) -> Seconds:
            (seconds,) = self._bare([Ask(0.0, 0)], since=number, tokens=PAIR_TOKENS)[0]
            return seconds

        async def measured(
            ask: Callable[[aiohttp.ClientSession, int], Awaitable[Seconds]], session: aiohttp.ClientSession, number: int
        ) -> dict[str, float]:
            before = self.host.send(do="cpu")
            first, whole = await ask(session, number)
            return {"first": first, "whole": whole, "cpu": self.host.send(do="cpu") - before}

        async def all_pairs() -> list[dict[str, dict[str, float]]]:
            pairs = []
            async with self._clients.connected(1) as session:
                async with session.get("/health") as reply:  # the connection is made
                    await reply.read()
                for number in range(count):
                    sides = [("bare", bare), ("gateway", over_http)]
                    if number % 2:
                        sides.reverse()
                    pairs.append({name: await measured(ask, session, number) for name, ask in sides})
            return pairs

        return asyncio.run(all_pairs())

    def _bare(self, asks: Sequence[Ask], *, since: int = 0, tokens: int | None = None) -> tuple[list[Seconds], Cost]:
        """Return the answers of the engine alone; all are the first tenant's."""
        tokens, digest = tokens or self._options.tokens, self._tenants[0].adapter.digest
        summary = [(ask.at, self._ids[(since + n) % len(self._ids)], digest, tokens) for n, ask in enumerate(asks)]
        before = self.host.send(do="cpu")
        done = self.host.send(do="bare", asks=summary)
        return done["each"], Cost(len(asks) * tokens, done["seconds"], self.host.send(do="cpu") - before)

    def _be_alone(self) -> None:
        """Wait: the scheduler keeps slots free for recently active tenants."""
        time.sleep(ACTIVE_SECONDS + 1)

    def memory(self) -> dict[str, Any]:
        """Measure the memory that each further tenant adds, against its adapter's file."""
        self._over_http(self._asks([1.0], SEED))  # so that everything a first answer needs is loaded
        one = self.host.send(do="memory")
        loads = self._release_all()
        every = self.host.send(do="memory")
        size = (self._tenants[-1].adapter.folder / "adapter_model.safetensors").stat().st_size
        each = (every - one) / (len(self._tenants) - 1)
        return {
            "one_tenant_bytes": one,
            "all_tenants_bytes": every,
            "each_further_bytes": each,
            "adapter_bytes": size,
            "ratio": each / size,
            "seconds_to_live_p50": statistics.median(loads),
        }

    def throughput(self) -> dict[str, Any]:
        """Compare all tenants with one tenant alone, both at more than full load."""
        self._release_all()
        sides: dict[str, list[Cost]] = {"one": [], "all": []}
        served: Counter[int] = Counter()
        for _ in rounds(self._options.rounds, sides):
            for name, shares in (("one", [1.0]), ("all", list(self._shares))):
                if name == "one":
                    self._be_alone()
                answers, cost = self._over_http(self._asks(shares, len(sides[name])))
                sides[name].append(cost)
                if name == "all":
                    served.update(answer.tenant for answer in answers)
        return {**compared(sides), "adapters_asked": len(served)}

    def gateway(self) -> dict[str, Any]:
        """Compare one tenant over HTTP with the engine alone, on the same requests."""
        if self._all_released:
            self._be_alone()
        full: dict[str, list[Cost]] = {"bare": [], "gateway": []}
        for turn in rounds(self._options.rounds, full):
            asks = self._asks([1.0], turn)
            full["bare"].append(self._bare(asks)[1])
            full["gateway"].append(self._over_http(asks)[1])
        self._pairs(self._options.pairs // 10)  # for warming up
        pairs = self._pairs(self._options.pairs)
        added = {
            name: [pair["gateway"][name] - pair["bare"][name] for pair in pairs] for name in ("first", "whole", "cpu")
        }
        return {
            **compared(full),
            "pairs": len(pairs),
            "alone_p50_s": {
                side: {name: statistics.median(pair[side][name] for pair in pairs) for name in added}
                for side in ("bare", "gateway")
            },
            "added_p50_s": {name: statistics.median(values) for name, values in added.items()},
            "added_p50_interval_s": {
                name: list(quantile_test(values, p=0.5).confidence_interval()) for name, values in added.items()
            },
        }

    def load(self) -> dict[str, Any]:
        """Measure realistic traffic of tenants, with releases meanwhile."""
        self._release_all()
        _, fully = self._over_http(burst(self._options.jobs, list(self._shares), SEED))
        rate = BUSY * fully.rate / self._options.tokens
        asks = poisson(rate, self._options.seconds, self._shares, SEED)

        async def both() -> tuple[list[Answer], list[tuple[float, float]]]:
            async def late(tenant: int) -> None:
                await asyncio.to_thread(release, self._state, self._late[tenant - len(self._tenants)])

            numbers = range(len(self._tenants), len(self._tenants) + len(self._late))
            every = self._options.seconds / (len(self._late) + 1)
            (answers, _), loads = await asyncio.gather(
                self._clients.open_loop(asks, self._prompt, self._options.tokens),
                cold_loads(self._clients, list(numbers), late, every, time.perf_counter()),
            )
            return answers, loads

        answers, loads = asyncio.run(both())
        median = Waits.of(answers).summary()
        assert median["first_p50"] is not None and median["between_p50"] is not None
        bounds = Bounds(first=5 * median["first_p50"], between=2 * median["between_p50"])
        waits = {tenant: Waits.of(own, bounds) for tenant, own in by_tenant(answers).items()}
        everybody = Waits.of(answers, bounds)
        stalls = [max((gap for a in answers for gap in _gaps_within(a, load)), default=0.0) for load in loads]
        return {
            "requests": len(asks),
            "seconds": self._options.seconds,
            "requests_per_s": rate,
            "share_of_capacity": BUSY,
            "statuses": dict(Counter(str(answer.status) for answer in answers)),
            "good_means": {"first_s": bounds.first, "between_mean_s": bounds.between},
            "goodput_per_s": everybody.good / self._options.seconds,
            "good_share": everybody.good / everybody.asked,
            "jain_of_good_shares": goodput_fairness(waits),
            "jain_of_first_p50": jain(t for one in waits.values() if (t := one.summary()["first_p50"])),
            "everybody": everybody.summary(),
            "tenants": {
                self._tenants[n].name: {"requests": one.asked, "good": one.good, **one.summary()}
                for n, one in waits.items()
            },
            "cold_loads": {
                "count": len(loads),
                "seconds_to_live": [end - start for start, end in loads],
                "longest_gap_of_others_s": stalls,
            },
        }

    def isolation(self) -> dict[str, Any]:
        """Send many short requests of all tenants mixed; each answer must be its own adapter's."""
        self._release_all()
        prompts = sorted(self._prompts, key=lambda prompt: len(self._opened.chat.prompt(prompt)))
        few, of = prompts[: self._options.probes], self._options.requests
        return mixed(self._opened, self._state, self._clients, self._tenants, self._late, few, of, SEED)


def _gaps_within(answer: Answer, span: tuple[float, float]) -> list[float]:
    """Return the waits between an answer's tokens that overlap a span of time."""
    pairs = zip(answer.tokens, answer.tokens[1:], strict=False)
    return [b - a for a, b in pairs if b >= span[0] and a <= span[1]]


if __name__ == "__main__":
    main()
