"""Waiting for one's turn at the engine: :mod:`tunewright.serving.turns` for coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tunewright.serving.turns import Turn, Turns


@dataclass(frozen=True)
class Place:
    """A place at the engine, while the block runs that has it."""

    queue: FairQueue
    turn: Turn

    def came(self, tokens: int) -> None:
        """So many tokens of the answer have come, so the prompt has been read."""
        self.queue.came(self.turn, tokens)


class FairQueue:
    """Places at the engine, given to tenants in turn. It belongs to one event loop.

    Args:
        rows: requests that the engine answers at once.
    """

    def __init__(self, rows: int) -> None:
        self._turns = Turns(rows)
        self._entrances: dict[Turn, asyncio.Future[None]] = {}

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return self._turns.waiting

    @property
    def idle(self) -> bool:
        """True if nobody has a place or waits for one."""
        return self._turns.idle

    @asynccontextmanager
    async def place(self, tenant: str, prompt: int) -> AsyncIterator[Place]:
        """Wait for a place, and have it while the block runs; leaving early gives up the wait or the place.

        Args:
            prompt: its tokens.
        """
        turn = self._turns.ask(tenant, prompt)
        entrance = self._entrances[turn] = asyncio.get_running_loop().create_future()
        self._let_in()
        try:
            await entrance
            yield Place(self, turn)
        finally:
            self._entrances.pop(turn, None)
            self._turns.leave(turn)
            self._let_in()

    def came(self, turn: Turn, tokens: int) -> None:
        """See :meth:`Place.came`."""
        self._turns.charge(turn.tenant, answer=tokens)
        if turn.reading:
            self._turns.has_read(turn)
            self._let_in()

    def _let_in(self) -> None:
        for turn in self._turns.let_in():
            entrance = self._entrances.pop(turn)
            if not entrance.cancelled():  # else it leaves as soon as it notices
                entrance.set_result(None)
