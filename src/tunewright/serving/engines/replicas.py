"""Several engines of one kind as one engine: each request goes to a replica that has its adapter in memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tunewright.engines.protocol import Engine, EngineStoppedError, RequestFailedError, TokenSink
from tunewright.generation.requests import Request
from tunewright.serving.engines.placement import (
    Candidate,
    Placement,
    Residents,
    adapters_handed_over,
    adapters_taken_over,
)
from tunewright.serving.engines.relay import Relay
from tunewright.serving.engines.replica import Phase, Replica, ReplicaState

T = TypeVar("T")

_END_SECONDS = 20.0
"""The longest time that a server's end waits for a replica that is starting, which then ends with the process."""


@dataclass(frozen=True)
class Starter:
    """Starts replicas, each in a place of its own: a GPU, a share of the threads, a machine of a cluster.

    Args:
        names: of all replicas that there is a place for, in the order in which they are started.
        start: starts one by its name; it may hold the adapters, given by digest, from the start.
        give_up: ends the starts in progress.
    """

    names: tuple[str, ...]
    start: Callable[[str, Mapping[str, Path]], Engine]
    give_up: Callable[[], object] = lambda: None


class Replicas:
    """Engines of one kind and one base, as an engine.

    :mod:`.placement` chooses the replica. Before an adapter's first request on a replica it is loaded there, and its
    files are verified, as by any engine; the least recently used one is unloaded if there is no room. If a replica
    stops, its requests without a token move to another one. The others receive :class:`EngineStoppedError`.

    Args:
        engines: by name. The names decide which adapters a replica gets, so they stay equal over restarts.
        room: maximum number of adapters in a replica's memory; None: no limit.
        placement: chooses the replicas.
        held: is closed once all engines have been stopped.
        starter: starts further replicas; None: their number is fixed.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        room: int | None = None,
        placement: Placement | None = None,
        held: ExitStack | None = None,
        starter: Starter | None = None,
    ) -> None:
        first, *others = engines.values()
        self.name = first.name
        self.prefill_tokens = min(engine.prefill_tokens for engine in engines.values())
        self.context_length = min(engine.context_length for engine in engines.values())
        self.unsupported = first.unsupported.union(*(engine.unsupported for engine in others))
        # Guards everything below: requests may come from several event loops.
        self._changed = threading.Condition(threading.RLock())
        self._room = room
        self._replicas = {
            name: Replica(name, engine, Residents(room), self._changed) for name, engine in engines.items()
        }
        self._placement = placement or Placement()
        self._held = held or ExitStack()
        self._starter = starter
        self._folders: dict[str, Path] = {}
        self._loading: dict[tuple[Replica, str], Future[None]] = {}
        self._stopped: str | None = None
        self._threads: list[threading.Thread] = []
        """Those that start or drain a replica."""
        # Adapters are loaded in a loop of their own, so that a load outlives the request that has caused it.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tunewright-replicas", daemon=True)
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """The names of the replicas, with those that join or drain."""
        return [replica.name for replica in self._now()]

    @property
    def remaining(self) -> list[str]:
        """The names of the replicas that are not being removed."""
        return [replica.name for replica in self._now() if replica.phase not in ("leaving", "draining")]

    @property
    def places(self) -> tuple[str, ...]:
        """The names of all replicas that there could be."""
        return tuple(self.names) if self._starter is None else self._starter.names

    @property
    def given_up(self) -> list[str]:
        """The names of the replicas that crashed too often to be restarted."""
        return [replica.name for replica in self._now() if replica.engine.permanently_stopped]

    @property
    def up(self) -> int:
        """The number of replicas that take requests."""
        return sum(replica.up for replica in self._now())

    @property
    def max_num_seqs(self) -> int:
        """The number of requests that the replicas which are up compute at once, at least 1."""
        return max(1, sum(replica.engine.max_num_seqs for replica in self._now() if replica.up))

    @property
    def stopped(self) -> str | None:
        """Reason why no replica answers requests now; None while one does."""
        if self._stopped is not None:
            return self._stopped
        reasons = [replica.engine.stopped for replica in self._now() if replica.serving]
        return None if None in reasons else next(iter(reasons), "All replicas are draining.")

    @property
    def permanently_stopped(self) -> bool:
        """True if no replica will answer any more."""
        return self._stopped is not None or all(replica.engine.permanently_stopped for replica in self._now())

    @property
    def restarts(self) -> int:
        """The number of restarts after a crash, of all replicas."""
        return sum(replica.engine.restarts for replica in self._now())

    @property
    def in_flight(self) -> tuple[int, int]:
        """The number of running requests, and of those that wait in a replica or for their adapter."""
        states = self.states()
        return sum(state.running for state in states), sum(state.waiting for state in states)

    @property
    def resident(self) -> list[str]:
        """The digests of the adapters in any replica's memory."""
        with self._changed:
            return sorted({digest for replica in self._replicas.values() for digest in replica.residents.loaded})

    def states(self) -> list[ReplicaState]:
        """Return the state of each replica."""
        with self._changed:
            return [replica.state for replica in self._replicas.values()]

    def submit(self, request: Request, sink: TokenSink, *, tenant: str = "") -> Callable[[], object]:
        """Start a request on a replica: see :meth:`tunewright.engines.protocol.Engine.submit`."""
        relay = Relay(self, request, sink, tenant)
        relay.start()
        return relay.abort

    async def load(self, digest: str, folder: Path) -> None:
        """Load an adapter on the first of its replicas that is up; the others load it when they are to answer for it.

        Raises:
            UserError: the files do not match the digest, or the engine cannot hold this adapter.
            AdapterFailedError: the engine failed to load it.
            EngineStoppedError: no replica is up.
        """
        with self._changed:
            if digest in self._folders:
                return
            self._folders[digest] = folder
        tried: set[str] = set()
        try:
            while True:
                with self._changed:
                    replica = self._choose(digest, tried)
                    loading = self._bring(replica, digest)
                try:
                    await asyncio.shield(asyncio.wrap_future(loading))
                    return
                except EngineStoppedError:
                    tried.add(replica.name)
        except BaseException:
            with self._changed:
                self._folders.pop(digest, None)
            raise

    async def unload(self, digest: str) -> None:
        """Free an adapter that no running request needs, on each replica.

        Raises:
            AdapterFailedError: an engine could not free it.
            EngineStoppedError: the engine has been stopped.
        """
        with self._changed:
            if self._stopped is not None:
                raise EngineStoppedError(self._stopped)
            self._folders.pop(digest, None)
            self._placement.forget(digest)
            freeing = [
                asyncio.run_coroutine_threadsafe(replica.unload_adapter(digest), self._loop)
                for replica in self._replicas.values()
            ]
        for done in freeing:
            await asyncio.shield(asyncio.wrap_future(done))

    def add(self, name: str) -> Future[None]:
        """Start a replica in the background; it takes requests once the adapters that will be its own are loaded.

        The result is there once it does. Its errors are those of the starter, and :class:`EngineStoppedError` if the
        server ends meanwhile.

        Args:
            name: one of :attr:`places` that is free.
        """
        assert self._starter is not None
        starter = self._starter

        def start() -> None:
            with self._changed:
                folders = dict(self._folders)
            engine = starter.start(name, folders)
            with self._changed:
                stopped = self._stopped
                if stopped is None:
                    self._replicas[name] = replica = Replica(name, engine, Residents(self._room), self._changed)
                    replica.phase = "joining"
                    others = {each.name: each.residents for each in self._replicas.values() if each.serving}
                    loads = [self._bring(replica, digest) for digest in adapters_taken_over(name, others, self._room)]
            if stopped is not None:
                engine.stop()
                raise EngineStoppedError(stopped)
            wait(loads)  # a failed one is logged, and fails its requests wherever it is
            with self._changed:
                replica.phase = "serving"

        return self._in_background(start)

    def drain(self, name: str, seconds: float) -> Future[bool]:
        """Take a replica out in the background: it gets no further requests, and is stopped once its last one ended.

        First its adapters are loaded where their requests will go, as far as there is room. The result says whether it
        has been stopped: no if no other one is up, or it has been kept.

        Args:
            name: one that no earlier call drains still.
            seconds: the longest wait for its requests. Then those without a token move, and the others receive
                :class:`EngineStoppedError`.
        """
        with self._changed:
            replica = self._replicas[name]
            replica.phase = "leaving"

        def others() -> dict[str, Residents]:
            each = self._replicas.values()
            return {other.name: other.residents for other in each if other.up and other is not replica}

        def waited(phase: Phase, holds: Callable[[], bool]) -> bool:
            """Wait in a phase for a condition, but not forever; return whether the phase has remained."""
            self._changed.wait_for(lambda: holds() or replica.phase != phase or self._stopped is not None, seconds)
            return replica.phase == phase and self._stopped is None

        def drain() -> bool:
            with self._changed:
                if self._stopped is not None:
                    return False
                moves = adapters_handed_over(replica.residents, others())
                loads = [self._bring(self._replicas[other], digest) for other, digest in moves]
                for load in loads:
                    load.add_done_callback(self._notify)
                if not waited("leaving", lambda: all(load.done() for load in loads)):
                    return False
                if not others():
                    replica.phase = "serving"
                    return False
                replica.phase = "draining"
                if not waited("draining", lambda: replica.load == 0):
                    return False
                del self._replicas[name]
            replica.engine.stop()
            return True

        return self._in_background(drain)

    def keep(self, name: str) -> bool:
        """Let a draining replica take requests again; return whether it was draining still."""
        with self._changed:
            replica = self._replicas.get(name)
            if replica is None or replica.phase not in ("leaving", "draining"):
                return False
            replica.phase = "serving"
            self._changed.notify_all()
            return True

    def stop(self) -> None:
        """Stop all replicas at once; unfinished requests receive :class:`EngineStoppedError`."""
        with self._changed:
            self._stopped = "The server is shutting down."
            self._changed.notify_all()
            engines = [replica.engine for replica in self._replicas.values()]
        if self._starter is not None:
            self._starter.give_up()
        # Together: each may take seconds to end.
        with ThreadPoolExecutor(max(1, len(engines))) as pool:
            list(pool.map(lambda engine: engine.stop(), engines))
        if self._thread.is_alive():
            cancelled = asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop)
            cancelled.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
            self._thread.join()
            self._loop.close()
        until = time.monotonic() + _END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._held.close()

    def assign(self, adapter: str | None, user: object, tried: Collection[str]) -> tuple[Replica, Future[None] | None]:
        """Return the replica that answers a request, and the load of its adapter if it must wait for that.

        The request counts as the replica's until :meth:`give_back`.

        Args:
            tried: replicas that have failed the request already.

        Raises:
            RequestFailedError: the adapter is not loaded.
            EngineStoppedError: no further replica is up.
        """
        with self._changed:
            if adapter is not None and adapter not in self._folders:
                raise RequestFailedError(f"The adapter {adapter} is not loaded.")
            replica = self._choose(adapter, tried)
            replica.load += 1
            if adapter is None or replica.residents.take(adapter, user):
                return replica, None
            return replica, self._bring(replica, adapter)

    def give_back(self, replica: Replica, adapter: str | None, user: object) -> None:
        """Note that a request has left a replica."""
        with self._changed:
            replica.load -= 1
            if adapter is not None and replica.residents.give_back(adapter, user):
                with suppress(RuntimeError):  # the loop is closed: nothing is loaded any more
                    self._loop.call_soon_threadsafe(replica.freed.set)
            if replica.phase == "draining":
                self._changed.notify_all()

    def _notify(self, _ended: object) -> None:
        with self._changed:
            self._changed.notify_all()

    def _now(self) -> list[Replica]:
        with self._changed:
            return list(self._replicas.values())

    def _choose(self, adapter: str | None, tried: Collection[str]) -> Replica:
        """Choose a replica, and start loading the adapter where it will be needed next."""
        if self._stopped is not None:
            raise EngineStoppedError(self._stopped)
        up = [replica for replica in self._replicas.values() if replica.up and replica.name not in tried]
        if not up:
            raise EngineStoppedError(self.stopped or "The replica has stopped, and no other one is up. Try again.")
        candidates = [
            Candidate(
                replica.name,
                replica.load / replica.engine.max_num_seqs,
                adapter is not None and replica.residents.warm(adapter),
                replica.residents.has_room,
            )
            for replica in up
        ]
        choice = self._placement.choose(adapter, candidates, time.monotonic())
        if adapter is not None:
            for name in choice.warm_up:
                self._bring(self._replicas[name], adapter)
        return self._replicas[choice.name]

    def _bring(self, replica: Replica, digest: str) -> Future[None]:
        """Return the load of an adapter on a replica, which is started unless it is in progress."""
        loading = self._loading.get((replica, digest))
        if loading is None:
            loading = asyncio.run_coroutine_threadsafe(self._load_on(replica, digest), self._loop)
            self._loading[replica, digest] = loading
        return loading

    async def _load_on(self, replica: Replica, digest: str) -> None:
        try:
            await replica.load_adapter(digest, self._folders.get)
        finally:
            with self._changed:
                self._loading.pop((replica, digest), None)

    def _in_background(self, work: Callable[[], T]) -> Future[T]:
        """Run a function in a thread that the process does not wait for when it ends."""
        done: Future[T] = Future()
        done.set_running_or_notify_cancel()  # from here on it cannot be cancelled

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - the caller's, whatever it is
                done.set_exception(error)

        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=run, name="tunewright-replica", daemon=True))
        self._threads[-1].start()
        return done


async def _cancel_all() -> None:
    """Cancel the other tasks of this loop, and wait for them."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
