"""Adds and removes a server's replicas while it runs, as :mod:`.scaling` decides."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from tunewright.core.progress import Reporter, duration
from tunewright.serving.engines.replicas import Replicas
from tunewright.serving.engines.scaling import Capacity, Demand, ScalingPolicy

RETRY_SECONDS = 30.0
"""The wait after a failed start; after each further one it is twice as long."""
LONGEST_RETRY_SECONDS = 600.0


@dataclass(frozen=True)
class ScalingState:
    """The scaling of a server at one moment.

    Args:
        wanted: replicas that there should be.
        present: those that take requests.
        added, removed: changes since the server's start.
        failures: starts that failed.
    """

    wanted: int
    present: int
    added: int
    removed: int
    failures: int


@dataclass(frozen=True)
class _Start:
    began: float
    done: Future[None]


class Autoscaler:
    """Keeps as many replicas as the policy wants.

    A replica starts in the background. If that fails, it is tried again after a wait, and serving continues meanwhile.
    Only one thread calls the methods.

    Args:
        replicas: can start further ones.
        drain_seconds: the longest wait for the requests of a replica that is removed.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        replicas: Replicas,
        policy: ScalingPolicy,
        reporter: Reporter,
        drain_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.look_seconds = policy.pace.look
        self._replicas = replicas
        self._policy = policy
        self._reporter = reporter
        self._drain_seconds = drain_seconds
        self._clock = clock
        self._starts: dict[str, _Start] = {}
        self._drains: dict[str, Future[bool]] = {}
        self._kept: set[str] = set()
        self._wanted = replicas.up
        self._added = self._removed = 0
        self._failures = self._failures_in_a_row = 0
        self._retry_at = clock()

    @property
    def state(self) -> ScalingState:
        """The state for the metrics; any thread may read it."""
        return ScalingState(self._wanted, self._replicas.up, self._added, self._removed, self._failures)

    def look(self, demand: Demand) -> None:
        """Compare the requests with the replicas, and begin to add or remove some."""
        now = self._clock()
        self._note_ended(now)
        self._remove_given_up()
        up = self._replicas.up
        present = len({*self._replicas.remaining, *self._starts})
        capacity = Capacity(up, present, self._replicas.max_num_seqs // max(1, up))
        decision = self._policy.decide(demand, capacity, now)
        self._wanted = decision.wanted
        if decision.wanted > present:
            self._add(decision.wanted - present, decision.reason, now)
        elif decision.wanted < present:
            self._remove(decision.reason)

    def _note_ended(self, now: float) -> None:
        for name, start in list(self._starts.items()):
            if not start.done.done():
                continue
            del self._starts[name]
            error = start.done.exception()
            if error is None:
                self._failures_in_a_row = 0
                self._reporter.say(f"{name} takes requests, {duration(now - start.began)} after its start began.")
                continue
            self._failures += 1
            self._failures_in_a_row += 1
            wait = min(RETRY_SECONDS * 2 ** (self._failures_in_a_row - 1), LONGEST_RETRY_SECONDS)
            self._retry_at = now + wait
            self._reporter.warn(f"{name} did not start; the next attempt is in {duration(wait)}: {error}")
        for name, drain in list(self._drains.items()):
            if drain.done():
                del self._drains[name]
                if drain.result():
                    self._reporter.say(f"{name} has ended.")
                elif name not in self._kept:
                    self._reporter.say(f"{name} is kept: no other replica is up.")
                self._kept.discard(name)

    def _remove_given_up(self) -> None:
        """Make room for another replica in place of one that crashed too often."""
        for name in self._replicas.given_up:
            if name not in self._drains and self._replicas.up:
                self._reporter.warn(f"Removing {name}: it crashed too often.")
                self._drains[name] = self._replicas.drain(name, 0)
                self._removed += 1

    def _add(self, count: int, reason: str, now: float) -> None:
        for name in list(self._drains):
            if count and self._replicas.keep(name):
                count -= 1
                self._kept.add(name)
                self._added += 1
                self._reporter.say(f"Keeping {name}, which was to be removed: {reason}.")
        if now < self._retry_at:
            return
        taken = {*self._replicas.names, *self._starts, *self._drains}
        for name in [name for name in self._replicas.places if name not in taken][:count]:
            self._added += 1
            self._reporter.say(f"Adding {name}: {reason}.")
            self._starts[name] = _Start(now, self._replicas.add(name))

    def _remove(self, reason: str) -> None:
        """Remove the replica that was started last; its adapters return to where they were before."""
        places = self._replicas.places
        free = [name for name in self._replicas.remaining if name not in self._drains]
        if not free:  # one that was kept a moment ago
            return
        name = max(free, key=places.index)
        self._reporter.say(f"Removing {name}: {reason}.")
        self._removed += 1
        self._drains[name] = self._replicas.drain(name, self._drain_seconds)
