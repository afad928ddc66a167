"""Simulate adapters on replicas: the real placement and the real choice of adapters to unload, on a simulated clock.

    python benchmarks/replicas_simulated.py [--adapters 100000] [--replicas 100]

`serving_replicas.py` checks it against measured replicas of a tiny base. An answer takes a time that grows with the
requests that run on its replica; a replica loads one adapter at a time. Prints and returns, with affinity and without
it, the share of requests that wait for a load, loads per request, waits, and the adapters in memory.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from arrivals import Ask, burst, percentile, zipf_shares

from tunewright.core.io import write_json
from tunewright.serving.engines.placement import Candidate, Choice, Placement, Residents, rendezvous_order

RESULTS = Path(__file__).with_name("results") / "replicas_simulated.json"
SIDES = ("affinity", "least loaded")


class LeastLoaded(Placement):
    """The choice of a load balancer that knows no adapters; equal replicas take turns at random."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._draw = random.Random(seed)

    def choose(self, digest: str | None, candidates: Sequence[Candidate], now: float) -> Choice:  # noqa: ARG002
        """Return one of the least loaded replicas."""
        least = min(each.load for each in candidates)
        return Choice(self._draw.choice([each.name for each in candidates if each.load == least]))


def placement(side: str) -> Placement:
    """Return the placement of a side."""
    return Placement() if side == "affinity" else LeastLoaded()


@dataclass(frozen=True)
class Costs:
    """Seconds.

    Args:
        load: to load an adapter into a replica with room.
        exchange: to unload one and load another.
        answer: an answer alone on its replica.
        row: what it takes longer for each other request there.
        spread: quantiles of the noise of an answer's time, as factors; one is drawn for each answer.
    """

    load: float
    exchange: float
    answer: float
    row: float
    spread: tuple[float, ...] = (1.0,)


@dataclass(eq=False)
class _Replica:
    name: str
    residents: Residents
    rows: int
    load: int = 0
    running: int = 0
    loads: int = 0
    loading: str | None = None
    to_load: deque[str] = field(default_factory=deque)
    queue: deque[int] = field(default_factory=deque)
    waiting: dict[str, list[int]] = field(default_factory=dict)


class Simulation:
    """Replicas on a simulated clock.

    Args:
        rows: requests that a replica computes at once.
        room: maximum number of adapters in a replica's memory.
    """

    def __init__(self, side: str, replicas: int, rows: int, room: int, costs: Costs, seed: int = 0) -> None:
        self._placement = placement(side)
        self._replicas = {
            name: _Replica(name, Residents(room), rows) for name in (f"replica-{n}" for n in range(1, replicas + 1))
        }
        self._costs = costs
        self._draw = random.Random(seed)
        self._events: list[tuple[float, int, str, _Replica, Any]] = []
        self._count = 0
        self._asks: Sequence[Ask] = ()
        self._digests: Sequence[str] = ()
        self._where: dict[int, _Replica] = {}
        self.waits: list[float] = []
        self.waited_for_load = 0

    @property
    def loads(self) -> int:
        """The number of adapters loaded so far."""
        return sum(replica.loads for replica in self._replicas.values())

    @property
    def in_memory(self) -> int:
        """The number of adapters in memory, each counted for each replica that has it."""
        return sum(len(replica.residents) for replica in self._replicas.values())

    @property
    def distinct(self) -> int:
        """The number of adapters that any replica has in memory."""
        return len({digest for replica in self._replicas.values() for digest in replica.residents.loaded})

    def holders(self, digest: str) -> int:
        """Return the number of replicas that have an adapter in memory."""
        return sum(replica.residents.warm(digest) for replica in self._replicas.values())

    def register(self, digests: Sequence[str]) -> None:
        """Load each adapter on its replica, as a server does when it starts, without counting the time."""
        for digest in digests:
            replica = self._choose(digest, 0.0)
            leaving = replica.residents.to_unload()
            if leaving is not None:
                replica.residents.remove(leaving)
            replica.residents.add(digest)

    def run(self, asks: Sequence[Ask], digests: Sequence[str]) -> None:
        """Answer requests at their times; each tenant has the adapter of its number."""
        self._asks, self._digests = asks, digests
        arrivals = iter(enumerate(asks))
        arriving = next(arrivals, None)
        while arriving is not None or self._events:
            if arriving is not None and (not self._events or arriving[1].at <= self._events[0][0]):
                self._arrive(arriving[0], arriving[1].at)
                arriving = next(arrivals, None)
                continue
            now, _, kind, replica, what = heapq.heappop(self._events)
            if kind == "loaded":
                self._loaded(replica, what, now)
            else:
                self._end(replica, what, now)

    def _choose(self, digest: str, now: float) -> _Replica:
        candidates = [
            Candidate(each.name, each.load / each.rows, each.residents.warm(digest), each.residents.has_room)
            for each in self._replicas.values()
        ]
        choice = self._placement.choose(digest, candidates, now)
        for name in choice.warm_up:
            self._bring(self._replicas[name], digest, now)
        return self._replicas[choice.name]

    def _arrive(self, number: int, now: float) -> None:
        digest = self._digests[self._asks[number].tenant]
        replica = self._choose(digest, now)
        self._where[number] = replica
        replica.load += 1
        if replica.residents.take(digest, number):
            self._enqueue(replica, number, now)
            return
        self.waited_for_load += 1
        replica.waiting.setdefault(digest, []).append(number)
        self._bring(replica, digest, now)

    def _bring(self, replica: _Replica, digest: str, now: float) -> None:
        if digest != replica.loading and digest not in replica.to_load:
            replica.to_load.append(digest)
            self._load_next(replica, now)

    def _load_next(self, replica: _Replica, now: float) -> None:
        """Begin the next load, unless one is in progress or an adapter that is in use has to leave first."""
        if replica.loading is not None or not replica.to_load:
            return
        if replica.residents.warm(replica.to_load[0]):  # it was to leave, and another one did
            digest = replica.to_load.popleft()
            replica.residents.add(digest)
            for number in replica.waiting.pop(digest, ()):
                self._enqueue(replica, number, now)
            self._load_next(replica, now)
            return
        leaving = replica.residents.to_unload()
        if leaving is not None and not replica.residents.idle(leaving):
            return
        if leaving is not None:
            replica.residents.remove(leaving)
        replica.loading = replica.to_load.popleft()
        seconds = self._costs.load if leaving is None else self._costs.exchange
        self._at(now + seconds, "loaded", replica, replica.loading)

    def _loaded(self, replica: _Replica, digest: str, now: float) -> None:
        replica.residents.add(digest)
        replica.loads += 1
        replica.loading = None
        for number in replica.waiting.pop(digest, ()):
            self._enqueue(replica, number, now)
        self._load_next(replica, now)

    def _enqueue(self, replica: _Replica, number: int, now: float) -> None:
        replica.queue.append(number)
        self._start(replica, now)

    def _start(self, replica: _Replica, now: float) -> None:
        while replica.queue and replica.running < replica.rows:
            seconds = self._costs.answer + self._costs.row * replica.running
            replica.running += 1
            self._at(now + seconds * self._draw.choice(self._costs.spread), "end", replica, replica.queue.popleft())

    def _end(self, replica: _Replica, number: int, now: float) -> None:
        replica.running -= 1
        replica.load -= 1
        replica.residents.give_back(self._digests[self._asks[number].tenant], number)
        self.waits.append(now - self._asks[number].at)
        self._start(replica, now)
        self._load_next(replica, now)

    def _at(self, time: float, kind: str, replica: _Replica, what: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, kind, replica, what))


def result(simulation: Simulation, asked: int) -> dict[str, Any]:
    """Return what a simulation has found."""
    return {
        "requests": asked,
        "p50_s": percentile(simulation.waits, 50),
        "p99_s": percentile(simulation.waits, 99),
        "loads": simulation.loads,
        "loads_per_request": round(simulation.loads / asked, 4),
        "waited_for_load": round(simulation.waited_for_load / asked, 4),
        "adapters_in_memory": simulation.in_memory,
    }


def moved(digests: Sequence[str], replicas: int) -> Iterator[tuple[str, float]]:
    """Yield the share of adapters that another replica takes over when one is added, and when one is removed."""
    names = [f"replica-{number}" for number in range(1, replicas + 2)]
    sets = {"now": names[:-1], "one added": names, "one removed": names[:-2]}
    homes = {
        what: [rendezvous_order(each, tuple(sorted(group)))[0] for each in digests] for what, group in sets.items()
    }
    for what in ("one added", "one removed"):
        pairs = zip(homes["now"], homes[what], strict=True)
        yield what, round(float(np.mean([before != after for before, after in pairs])), 4)


def main() -> None:
    """Simulate both sides on the replicas of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--rows", type=int, default=64, help="requests that a replica computes at once")
    parser.add_argument("--room", type=int, default=400, help="adapters in a replica's memory")
    parser.add_argument("--load-s", type=float, default=0.3, help="seconds to load an adapter")
    parser.add_argument("--answer-s", type=float, default=2.0, help="seconds of an answer alone on a replica")
    parser.add_argument("--use", type=float, default=0.5, help="share of all rows that are in use on average")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--requests", type=int, default=100_000, help="measured, after half as many to warm up")
    options = parser.parse_args()
    # With all rows of a replica in use, an answer takes twice as long as alone.
    costs = Costs(options.load_s, options.load_s, options.answer_s, options.answer_s / options.rows)
    mean_s = options.answer_s * (1 + options.use)
    rate = options.replicas * options.rows * options.use / mean_s
    digests = [f"{number:08x}" for number in range(options.adapters)]
    shares = zipf_shares(options.adapters, options.exponent)
    warm = burst(options.requests // 2, shares, 1, rate)
    asks = burst(options.requests, shares, 2, rate)
    found: dict[str, Any] = {}
    for side in SIDES:
        simulation = Simulation(side, options.replicas, options.rows, options.room, costs)
        simulation.run(warm, digests)
        before = simulation.loads
        simulation.waits.clear()
        simulation.waited_for_load = 0
        shifted = [Ask(warm[-1].at + 600 + ask.at, ask.tenant) for ask in asks]
        simulation.run(shifted, digests)
        found[side] = result(simulation, len(asks)) | {"loads": simulation.loads - before}
        found[side]["loads_per_request"] = round(found[side]["loads"] / len(asks), 4)
        found[side]["distinct_in_memory"] = simulation.distinct
        found[side]["replicas_of_adapters_1_10_100"] = [simulation.holders(digests[place]) for place in (0, 9, 99)]
        print(side, found[side])
    settings = vars(options) | {"rate": round(rate, 1)}
    replaced = dict(moved(digests, options.replicas))
    print("adapters with another first replica:", replaced)
    write_json(RESULTS, {"settings": settings, "sides": found, "moved": replaced})


if __name__ == "__main__":
    main()
