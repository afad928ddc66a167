"""Several engines of one kind as one engine: each request goes to a replica that has its adapter in memory."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunewright.engines.protocol import (
    AdapterFailedError,
    Delta,
    Engine,
    EngineStoppedError,
    Event,
    RequestFailedError,
    TokenSink,
)
from tunewright.generation.requests import Request
from tunewright.serving.engines.placement import Candidate, Placement, Residents

log = logging.getLogger("tunewright")

_UNLOAD_SECONDS = 10.0
"""The longest time that a replica may take to notice that an aborted request no longer needs its adapter."""
_UNLOAD_PAUSE = 0.05


@dataclass(frozen=True)
class ReplicaState:
    """A replica at one moment.

    Args:
        up: whether it takes requests.
        adapters: the number of adapters in memory.
        loads: the number of adapters loaded since the start.
        restarts: the number of times it was restarted after a crash.
    """

    name: str
    up: bool
    running: int
    waiting: int
    adapters: int
    loads: int
    restarts: int


@dataclass(eq=False)
class _Replica:
    """An engine, and what this process knows of it."""

    name: str
    engine: Engine
    residents: Residents
    load: int = 0
    """Requests that were sent here, or wait for their adapter here."""
    loads: int = 0
    draining: bool = False
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while an adapter is loaded or unloaded: one at a time."""
    freed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def up(self) -> bool:
        return not self.draining and self.engine.stopped is None


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
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        room: int | None = None,
        placement: Placement | None = None,
        held: ExitStack | None = None,
    ) -> None:
        first, *others = engines.values()
        self.name = first.name
        self.prefill_tokens = min(engine.prefill_tokens for engine in engines.values())
        self.context_length = min(engine.context_length for engine in engines.values())
        self.unsupported = first.unsupported.union(*(engine.unsupported for engine in others))
        self._replicas = {name: _Replica(name, engine, Residents(room)) for name, engine in engines.items()}
        self._placement = placement or Placement()
        self._held = held or ExitStack()
        self._folders: dict[str, Path] = {}
        self._loading: dict[tuple[str, str], Future[None]] = {}
        self._stopped: str | None = None
        # Guards everything above: requests may come from several event loops.
        self._changed = threading.Condition(threading.RLock())
        # Adapters are loaded in a loop of their own, so that a load outlives the request that has caused it.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tunewright-replicas", daemon=True)
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """The names of the replicas."""
        return list(self._replicas)

    @property
    def max_num_seqs(self) -> int:
        """The number of requests that the replicas which are up compute at once, at least 1."""
        return max(1, sum(replica.engine.max_num_seqs for replica in self._now() if replica.up))

    @property
    def stopped(self) -> str | None:
        """Reason why no replica answers requests now; None while one does."""
        if self._stopped is not None:
            return self._stopped
        reasons = [replica.engine.stopped for replica in self._now() if not replica.draining]
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
            states = []
            for replica in self._replicas.values():
                running, waiting = replica.engine.in_flight
                states.append(
                    ReplicaState(
                        replica.name,
                        replica.up,
                        running,
                        waiting + replica.residents.waiting,
                        len(replica.residents),
                        replica.loads,
                        replica.engine.restarts,
                    )
                )
            return states

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
            freeing = [self._run(self._free(replica, digest)) for replica in self._replicas.values()]
        for done in freeing:
            await asyncio.shield(asyncio.wrap_future(done))

    async def drain(self, name: str) -> None:
        """Take a replica out: it gets no further requests, and is stopped once its last one has ended.

        It must not be the last one that is up.
        """
        with self._changed:
            replica = self._replicas[name]
            assert any(other.up for other in self._replicas.values() if other is not replica), "one has to answer"
            replica.draining = True

        def stop_when_idle() -> None:
            with self._changed:
                self._changed.wait_for(lambda: replica.load == 0 or self._stopped is not None)
                self._replicas.pop(name, None)
            replica.engine.stop()

        await asyncio.to_thread(stop_when_idle)

    def stop(self) -> None:
        """Stop all replicas at once; unfinished requests receive :class:`EngineStoppedError`."""
        with self._changed:
            self._stopped = "The server is shutting down."
            self._changed.notify_all()
            engines = [replica.engine for replica in self._replicas.values()]
        # Together: each may take seconds to end.
        with ThreadPoolExecutor(max(1, len(engines))) as pool:
            list(pool.map(lambda engine: engine.stop(), engines))
        if self._thread.is_alive():
            self._run(_cancel_all()).add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
            self._thread.join()
            self._loop.close()
        self._held.close()

    def assign(self, adapter: str | None, user: Relay, tried: Collection[str]) -> tuple[_Replica, Future[None] | None]:
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

    def give_back(self, replica: _Replica, adapter: str | None, user: Relay) -> None:
        """Note that a request has left a replica."""
        with self._changed:
            replica.load -= 1
            if adapter is not None and replica.residents.give_back(adapter, user):
                with suppress(RuntimeError):  # the loop is closed: nothing is loaded any more
                    self._loop.call_soon_threadsafe(replica.freed.set)
            if replica.draining:
                self._changed.notify_all()

    def _now(self) -> list[_Replica]:
        with self._changed:
            return list(self._replicas.values())

    def _choose(self, adapter: str | None, tried: Collection[str]) -> _Replica:
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

    def _bring(self, replica: _Replica, digest: str) -> Future[None]:
        """Return the load of an adapter on a replica, which is started unless it is in progress."""
        loading = self._loading.get((replica.name, digest))
        if loading is None:
            loading = self._loading[replica.name, digest] = self._run(self._load_on(replica, digest))
        return loading

    def _run(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _load_on(self, replica: _Replica, digest: str) -> None:
        try:
            async with replica.changing:
                with self._changed:
                    warm = replica.residents.warm(digest)  # it was to make room for another one, which took another's
                if not warm:
                    await self._make_room(replica)
                folder = self._folders.get(digest)
                if folder is None:
                    raise AdapterFailedError(f"The adapter {digest} was unloaded meanwhile.")
                await replica.engine.load(digest, folder)
                with self._changed:
                    replica.residents.add(digest)
                    replica.loads += not warm
        except Exception as error:
            # Nobody may be waiting for it.
            log.warning("failed to load the adapter %s on %s: %s", digest[:12], replica.name, error)
            raise
        finally:
            with self._changed:
                self._loading.pop((replica.name, digest), None)

    async def _make_room(self, replica: _Replica) -> None:
        """Unload an adapter if there is no room for another one; if all are in use, wait for one."""
        while True:
            with self._changed:
                digest = replica.residents.to_unload()
                replica.freed.clear()
                idle = digest is not None and replica.residents.idle(digest)
            if digest is None:
                return
            if idle:
                await self._drop(replica, digest)
            else:
                await replica.freed.wait()

    async def _free(self, replica: _Replica, digest: str) -> None:
        async with replica.changing:
            await self._drop(replica, digest)

    async def _drop(self, replica: _Replica, digest: str) -> None:
        """Unload an adapter without users; an engine may still be at an aborted request."""
        until = self._loop.time() + _UNLOAD_SECONDS
        while True:
            try:
                await replica.engine.unload(digest)
                break
            except EngineStoppedError:
                break  # it does not load the adapter again
            except AdapterFailedError:
                if self._loop.time() > until:
                    raise
                await asyncio.sleep(_UNLOAD_PAUSE)
        with self._changed:
            replica.residents.remove(digest)


class Relay:
    """One request on its way over replicas; it is the sink of the engine that answers it.

    Args:
        pool: assigns replicas.
        request, sink, tenant: see :meth:`tunewright.engines.protocol.Engine.submit`.
    """

    def __init__(self, pool: Replicas, request: Request, sink: TokenSink, tenant: str) -> None:
        self._pool = pool
        self._request = request
        self._sink = sink
        self._tenant = tenant
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # has the span that the engine's own span belongs to
        self._replica: _Replica | None = None
        self._tried: list[str] = []
        self._begun = False
        self._ended = False
        self._abort: Callable[[], object] | None = None

    def start(self) -> None:
        """Send the request to a replica, or wait for its adapter there."""
        try:
            self._replica, loading = self._pool.assign(self._request.adapter, self, self._tried)
        except (RequestFailedError, EngineStoppedError) as error:
            self._fail(error)
            return
        if loading is None:
            self._submit()
        else:
            loading.add_done_callback(self._wake)

    def abort(self) -> None:
        """End the request: no event is delivered any more."""
        self._ended = True
        if self._abort is not None:
            self._abort()
        self._leave()

    def deliver(self, event: Event) -> None:
        """Pass an event on; if the replica has stopped before the first token, try another one."""
        if self._ended:
            return
        if isinstance(event, EngineStoppedError) and not self._begun:
            self._move()
        elif not isinstance(event, Delta):
            self._fail(event)
        else:
            self._begun = self._begun or bool(event.ids)
            if event.finish:
                self._ended = True
                self._leave()
            self._sink.deliver(event)

    def _wake(self, loading: Future[None]) -> None:
        with suppress(RuntimeError):  # the loop is closed, and nobody waits for the answer
            self._loop.call_soon_threadsafe(self._loaded, loading)

    def _loaded(self, loading: Future[None]) -> None:
        if self._ended:
            return
        try:
            loading.result()
        except (EngineStoppedError, CancelledError):
            self._move()
        except Exception as error:  # noqa: BLE001 - this request fails, whatever was wrong with its adapter
            self._fail(RequestFailedError(f"The adapter {self._request.adapter} could not be loaded: {error}"))
        else:
            self._submit()

    def _submit(self) -> None:
        assert self._replica is not None
        replica, self._abort = self._replica, None
        abort = self._context.copy().run(replica.engine.submit, self._request, self, tenant=self._tenant)
        if self._replica is replica:  # an engine that has stopped may say so at once
            self._abort = abort

    def _move(self) -> None:
        if self._replica is not None:
            self._tried.append(self._replica.name)
        self._leave()
        self.start()

    def _fail(self, error: RequestFailedError | EngineStoppedError) -> None:
        self._ended = True
        self._leave()
        self._sink.deliver(error)

    def _leave(self) -> None:
        if self._replica is not None:
            replica, self._replica = self._replica, None
            self._pool.give_back(replica, self._request.adapter, self)


async def _cancel_all() -> None:
    """Cancel the other tasks of this loop, and wait for them."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
