"""Slots in llama.cpp's key/value cache, given out for one adapter at a time.

This is a constraint of llama.cpp, and no scheduling policy. It computes the requests of different adapters in separate
passes, and takes the adapter of the first busy slot each time: a slot that is always busy would starve all other
adapters. So adapters alternate. When all answers of one adapter have ended, the adapter that has waited longest is
next, with all of its waiting requests. While others wait, no later request joins the running adapter.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class CacheSlot:
    """A request's part of the cache: it may fill this many tokens."""

    adapter: str | None
    tokens: int
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class CacheSlots:
    """All slots; they belong to one event loop at a time.

    Args:
        rows: maximum number of concurrent requests.
        tokens: maximum total tokens of all requests.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        self.rows = rows
        self.tokens = tokens
        self.running: list[CacheSlot] = []
        self.waiting: deque[CacheSlot] = deque()

    @asynccontextmanager
    async def slot(self, adapter: str | None, tokens: int, *, resumed: bool = False) -> AsyncIterator[CacheSlot]:
        """Wait for a slot, and keep it for the block.

        Args:
            tokens: at most as many as there are in all.
            resumed: the request had given up its slot to make room, and is the next one of all.
        """
        assert tokens <= self.tokens
        slot = CacheSlot(adapter, tokens)
        (self.waiting.appendleft if resumed else self.waiting.append)(slot)
        self._admit()
        try:
            await slot.admitted
            yield slot
        finally:
            if slot in self.running:
                self.running.remove(slot)
            else:
                self.waiting.remove(slot)
            self._admit()

    def extend(self, slot: CacheSlot, tokens: int) -> bool:
        """Change a running request's tokens if there is room, and return whether there was; alone, there always is."""
        assert tokens <= self.tokens
        if tokens - slot.tokens > self._free:
            return False
        slot.tokens = tokens
        return True

    @property
    def _free(self) -> int:
        return self.tokens - sum(slot.tokens for slot in self.running)

    def _admit(self) -> None:
        while self.waiting:
            adapter = (self.running or self.waiting)[0].adapter
            if self.running and any(slot.adapter != adapter for slot in self.waiting):
                return
            if not self._admit_adapter(adapter):
                return

    def _admit_adapter(self, adapter: str | None) -> bool:
        """Admit the waiting requests of an adapter in their order while there is room; return whether any was."""
        admitted = False
        for slot in [slot for slot in self.waiting if slot.adapter == adapter]:
            if len(self.running) >= self.rows or slot.tokens > self._free:
                break
            self.waiting.remove(slot)
            self.running.append(slot)
            admitted = True
            if not slot.admitted.done():  # a cancelled request removes itself
                slot.admitted.set_result(None)
        return admitted
