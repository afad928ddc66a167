"""Who is computed when: llama.cpp works for one adapter at a time, and has room for so many tokens.

llama.cpp computes requests of different adapters in passes of their own, and takes the adapter of the first busy slot
each time, so that a slot that is always busy would keep all other adapters waiting for ever. Here adapters take
turns: when all answers of one have ended, it is the turn of whichever has waited longest, and all that wait for the
same one come with it. While others wait, nobody joins who came after them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Turn:
    """One request's: its tokens are those that it may fill of the cache."""

    adapter: str | None
    tokens: int
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class AdapterTurns:
    """Belongs to one event loop at a time.

    Args:
        rows: requests at once, at the most.
        tokens: of all of them together.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        self.rows = rows
        self.tokens = tokens
        self.running: list[Turn] = []
        self.waiting: deque[Turn] = deque()

    @asynccontextmanager
    async def turn(self, adapter: str | None, tokens: int, *, again: bool = False) -> AsyncIterator[Turn]:
        """Wait for one.

        Args:
            tokens: at most as many as there are in all.
            again: it has given its turn up to make room, and is the next one.
        """
        assert tokens <= self.tokens
        mine = Turn(adapter, tokens)
        (self.waiting.appendleft if again else self.waiting.append)(mine)
        self._let_in()
        try:
            await mine.admitted
            yield mine
        finally:
            if mine in self.running:
                self.running.remove(mine)
            else:
                self.waiting.remove(mine)
            self._let_in()

    def extend(self, turn: Turn, tokens: int) -> bool:
        """Let a request under way have so many tokens instead, if there is room; where it is alone there is."""
        assert tokens <= self.tokens
        if tokens - turn.tokens > self._free:
            return False
        turn.tokens = tokens
        return True

    @property
    def _free(self) -> int:
        return self.tokens - sum(turn.tokens for turn in self.running)

    def _let_in(self) -> None:
        while self.waiting:
            adapter = (self.running or self.waiting)[0].adapter
            if self.running and any(turn.adapter != adapter for turn in self.waiting):
                return
            if not self._let_in_of(adapter):
                return

    def _let_in_of(self, adapter: str | None) -> bool:
        """Return those who wait for an adapter, in their order, as long as there is room; whether there was any."""
        entered = False
        for turn in [turn for turn in self.waiting if turn.adapter == adapter]:
            if len(self.running) >= self.rows or turn.tokens > self._free:
                break
            self.waiting.remove(turn)
            self.running.append(turn)
            entered = True
            if not turn.admitted.done():  # whoever has gone takes itself out
                turn.admitted.set_result(None)
        return entered
