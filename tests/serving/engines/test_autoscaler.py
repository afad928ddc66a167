"""An autoscaler over scripted engines: what it adds, removes, keeps and reports."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from recorded_engine import NAMES, ONE, Recorded, answer, asked, first, run, running
from tenant_server import StopAfter

from tunewright.core.errors import UserError
from tunewright.engines.protocol import stream
from tunewright.serving.engines.autoscaler import LONGEST_RETRY_SECONDS, RETRY_SECONDS, Autoscaler, ScalingState
from tunewright.serving.engines.replicas import Replicas, Starter
from tunewright.serving.engines.scaling import Demand, Pace, ScalingPolicy

PACE = Pace(look=1.0, window=2.0, late=1.0, calm=5.0)
QUEUE = Demand(running=8, waiting=4, unanswered=[3.0] * 4)
WHY = "4 of 4 requests in 2 seconds had no token after 2 s; 8 run and 4 wait on 1 replica"


class Scaled:
    """Replicas with an autoscaler, whose clock stands still between two looks."""

    def __init__(self, replicas: Replicas, largest: int) -> None:
        self.replicas = replicas
        self.reported = StopAfter()
        self.now = 0.0
        policy = ScalingPolicy(1, largest, 2.0, PACE)
        self._autoscaler = Autoscaler(replicas, policy, self.reported, 60.0, lambda: self.now)

    @property
    def state(self) -> ScalingState:
        return self._autoscaler.state

    def look(self, demand: Demand, times: int = 1, seconds: float = 1.0) -> None:
        for _ in range(times):
            self.now += seconds
            self._autoscaler.look(demand)

    def until(self, demand: Demand, holds: Callable[[], bool]) -> None:
        """Look again and again, at the same time by its clock, until something has ended in the background."""
        end = time.monotonic() + 300
        while not holds():
            assert time.monotonic() < end, self.reported.messages
            self.look(demand, seconds=0)
            time.sleep(0.002)


@contextmanager
def scaled(start: Callable[[str], Recorded], count: int = 1, largest: int = 2) -> Iterator[Scaled]:
    names = tuple(f"replica-{number}" for number in range(1, largest + 1))

    def starting(name: str, _adapters: Mapping[str, Path]) -> Recorded:
        return start(name)

    with running({name: start(name) for name in names[:count]}, starter=Starter(names, starting)) as replicas:
        yield Scaled(replicas, largest)


def test_replica_is_added_for_late_requests_and_removed_after_a_calm_time_with_the_reasons_in_the_log() -> None:
    engines = {name: Recorded() for name in NAMES}
    with scaled(engines.__getitem__) as server:
        server.look(QUEUE, times=2)
        assert server.state == ScalingState(wanted=2, present=server.state.present, added=1, removed=0, failures=0)
        server.until(QUEUE, lambda: len(server.reported.messages) == 2)
        server.look(Demand(), times=6)
        server.until(Demand(), lambda: server.replicas.names == ["replica-1"])
        server.until(Demand(), lambda: len(server.reported.messages) == 4)
        assert server.state == ScalingState(wanted=1, present=1, added=1, removed=1, failures=0)
        assert server.reported.messages == [
            f"Adding replica-2: {WHY}.",
            "replica-2 takes requests, 0 seconds after its start began.",
            "Removing replica-2: 0 requests at most at one time in 5 seconds; 1 replica would have 8 rows.",
            "replica-2 has ended.",
        ]
        assert [engine.stops for engine in engines.values()] == [0, 1]


def test_failed_start_is_named_and_repeated_after_a_longer_and_longer_wait_while_requests_are_answered() -> None:
    attempts = 0

    def start(name: str) -> Recorded:
        nonlocal attempts
        if name == "replica-2":
            attempts += 1
            if attempts < 3:
                raise UserError("No room", where="the GPU")
        return Recorded()

    with scaled(start) as server:
        server.look(QUEUE, times=2)
        server.until(QUEUE, lambda: server.state.failures == 1)
        assert run(answer(server.replicas, asked(None))) == (97, 97)
        server.look(QUEUE, times=int(RETRY_SECONDS) - 1)
        assert (attempts, server.state.wanted, server.state.present) == (1, 2, 1)
        server.look(QUEUE)
        server.until(QUEUE, lambda: server.state.failures == 2)
        server.look(QUEUE, times=2 * int(RETRY_SECONDS))
        server.until(QUEUE, lambda: server.state.present == 2)
        assert server.state == ScalingState(wanted=2, present=2, added=3, removed=0, failures=2)
        failures = [message for message in server.reported.messages if message.startswith("Warning")]
        assert failures == [
            f"Warning: replica-2 did not start; the next attempt is in {wait} seconds: the GPU: No room"
            for wait in (30, 60)
        ]
    assert LONGEST_RETRY_SECONDS / RETRY_SECONDS > 4


def test_replica_that_drains_is_kept_when_the_load_returns() -> None:
    engines = {name: Recorded() for name in NAMES}
    engines["replica-2"].held_at = 2

    async def ask(server: Scaled) -> None:
        await server.replicas.load(own, Path())
        unfinished = stream(server.replicas, asked(own))
        await anext(unfinished)
        server.look(Demand(), times=6)
        while server.replicas.up == 2:
            await asyncio.sleep(0.001)
        server.look(QUEUE, times=2)
        assert server.replicas.up == 2
        engines["replica-2"].held_at = 0
        assert [delta.finish async for delta in unfinished] == ["length"]

    own = next(f"{number:064x}" for number in range(99) if first(f"{number:064x}") == "replica-2")
    with scaled(engines.__getitem__, count=2) as server:
        run(ask(server))
        assert server.reported.messages[-1] == f"Keeping replica-2, which was to be removed: {WHY}."
        # Its thread has to end before it can be removed again.
        server.until(Demand(), lambda: not server._autoscaler._drains)
        server.look(Demand(), times=12)
        server.until(Demand(), lambda: server.replicas.names == ["replica-1"])
        assert (server.state.added, server.state.removed, engines["replica-2"].stops) == (1, 2, 1)


def test_replica_that_crashed_too_often_makes_room_for_another_one() -> None:
    started: list[tuple[str, Recorded]] = []

    def start(name: str) -> Recorded:
        started.append((name, Recorded()))
        return started[-1][1]

    with scaled(start, count=2) as server:
        crashed = started[0][1]
        crashed.stopped, crashed.permanently_stopped = "It crashed.", True
        server.until(QUEUE, lambda: server.replicas.names == ["replica-2"])
        server.look(QUEUE, times=3)
        server.until(QUEUE, lambda: server.state.present == 2)
        assert [name for name, _ in started] == ["replica-1", "replica-2", "replica-1"]
        assert server.reported.messages[0] == "Warning: Removing replica-1: it crashed too often."


def test_only_replica_that_is_up_is_not_removed() -> None:
    engines = {name: Recorded() for name in NAMES}
    with scaled(engines.__getitem__, count=2) as server:
        engines["replica-1"].stopped = "It crashed."
        server.look(Demand(), times=20)
        assert (server.state.present, server.state.removed, server.reported.messages) == (1, 0, [])
        engines["replica-1"].stopped = None
        server.look(Demand(), times=1)
        server.until(Demand(), lambda: server.replicas.names == ["replica-1"])


def test_replica_that_was_to_be_removed_stays_if_the_other_one_stops_meanwhile() -> None:
    engines = {name: Recorded() for name in NAMES}
    own = next(f"{number:064x}" for number in range(99) if first(f"{number:064x}") == "replica-2")

    async def ask(server: Scaled) -> None:
        await server.replicas.load(own, Path())
        engines["replica-1"].can_load.clear()
        server.look(Demand(), times=6)  # the other one is to load its adapter first
        assert server.state.removed == 1
        engines["replica-1"].stopped = "It crashed."
        engines["replica-1"].can_load.set()
        end = "replica-2 is kept: no other replica is up."
        await asyncio.to_thread(server.until, Demand(), lambda: server.reported.messages[-1] == end)
        assert await answer(server.replicas, asked(own)) == (97, 97)

    with scaled(engines.__getitem__, count=2) as server:
        run(ask(server))
        assert server.replicas.names == list(NAMES)


def test_added_replica_answers_for_its_own_adapters() -> None:
    engines = {name: Recorded() for name in NAMES}

    async def ask(server: Scaled) -> None:
        await server.replicas.load(ONE, Path())
        server.look(QUEUE, times=2)
        await asyncio.to_thread(server.until, QUEUE, lambda: server.state.present == 2)
        await answer(server.replicas, asked(ONE))

    with scaled(engines.__getitem__) as server:
        run(ask(server))
    assert [name for name in NAMES if engines[name].asked] == [first(ONE)]
