"""One of several engines: its requests, and the adapters that come and go in its memory."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tunewright.engines.protocol import AdapterFailedError, Engine, EngineStoppedError
from tunewright.serving.engines.placement import Residents

log = logging.getLogger("tunewright")

_UNLOAD_SECONDS = 10.0
"""The longest time that a replica may take to notice that an aborted request no longer needs its adapter."""
_UNLOAD_PAUSE = 0.05

Phase = Literal["joining", "serving", "leaving", "draining"]
"""A joining replica loads the adapters that will be its own, and takes no requests yet. A leaving one takes requests
while others load its adapters; then it drains: it takes no further ones, and its answers end."""


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
class Replica:
    """An engine, and what this process knows of it.

    Its coroutines run in the event loop of :class:`tunewright.serving.engines.replicas.Replicas`.

    Args:
        changed: guards everything here: requests may come from several event loops.
        phase: see :data:`Phase`.
    """

    name: str
    engine: Engine
    residents: Residents
    changed: threading.Condition
    phase: Phase = "serving"
    load: int = 0
    """Requests that were sent here, or wait for their adapter here."""
    loads: int = 0
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while an adapter is loaded or unloaded: one at a time."""
    freed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def serving(self) -> bool:
        """True if it takes requests while its engine runs."""
        return self.phase in ("serving", "leaving")

    @property
    def up(self) -> bool:
        """True if it takes requests."""
        return self.serving and self.engine.stopped is None

    @property
    def state(self) -> ReplicaState:
        """Its state now."""
        running, waiting = self.engine.in_flight
        return ReplicaState(
            self.name,
            self.up,
            running,
            waiting + self.residents.waiting,
            len(self.residents),
            self.loads,
            self.engine.restarts,
        )

    async def load_adapter(self, digest: str, folder_of: Callable[[str], Path | None]) -> None:
        """Load an adapter; the least recently used one makes room.

        Args:
            folder_of: returns its folder; None: it was unloaded meanwhile.

        Raises:
            UserError, AdapterFailedError, EngineStoppedError: as for the engine.
        """
        try:
            async with self.changing:
                with self.changed:
                    warm = self.residents.warm(digest)  # it was to make room for another one, which took another's
                if not warm:
                    await self._make_room()
                folder = folder_of(digest)
                if folder is None:
                    raise AdapterFailedError(f"The adapter {digest} was unloaded meanwhile.")
                await self.engine.load(digest, folder)
                with self.changed:
                    self.residents.add(digest)
                    self.loads += not warm
        except Exception as error:
            # Nobody may be waiting for it.
            log.warning("failed to load the adapter %s on %s: %s", digest[:12], self.name, error)
            raise

    async def unload_adapter(self, digest: str) -> None:
        """Free an adapter that no running request needs.

        Raises:
            AdapterFailedError: the engine could not free it.
        """
        async with self.changing:
            await self._drop(digest)

    async def _make_room(self) -> None:
        """Unload an adapter if there is no room for another one; if all are in use, wait for one."""
        while True:
            with self.changed:
                digest = self.residents.to_unload()
                self.freed.clear()
                idle = digest is not None and self.residents.idle(digest)
            if digest is None:
                return
            if idle:
                await self._drop(digest)
            else:
                await self.freed.wait()

    async def _drop(self, digest: str) -> None:
        """Unload an adapter without users; an engine may still be at an aborted request."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _UNLOAD_SECONDS
        while True:
            try:
                await self.engine.unload(digest)
                break
            except EngineStoppedError:
                break  # it does not load the adapter again
            except AdapterFailedError:
                if loop.time() > until:
                    raise
                await asyncio.sleep(_UNLOAD_PAUSE)
        with self.changed:
            self.residents.remove(digest)
