"""One request on its way over several engines."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Collection
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Protocol

from tunewright.engines.protocol import Delta, EngineStoppedError, Event, RequestFailedError, TokenSink
from tunewright.generation.requests import Request
from tunewright.serving.engines.replica import Replica


class ReplicaPool(Protocol):
    """Assigns replicas to requests; ``user`` is the request that holds its adapter in the replica's memory."""

    def assign(
        self, adapter: str | None, user: object, tried: Collection[str]
    ) -> tuple[Replica, Future[None] | None]: ...

    def give_back(self, replica: Replica, adapter: str | None, user: object) -> None: ...


class Relay:
    """One request on its way over replicas; it is the sink of the engine that answers it.

    Args:
        pool: assigns replicas.
        request, sink, tenant: see :meth:`tunewright.engines.protocol.Engine.submit`.
    """

    def __init__(self, pool: ReplicaPool, request: Request, sink: TokenSink, tenant: str) -> None:
        self._pool = pool
        self._request = request
        self._sink = sink
        self._tenant = tenant
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # has the span that the engine's own span belongs to
        self._replica: Replica | None = None
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
