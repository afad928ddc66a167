"""Whose request goes to the engine next: the tenant's that has been served least (a virtual token counter).

Sheng et al. 2024, "Fairness in Serving Large Language Models" (OSDI, arXiv 2401.00588), algorithm 2: each tenant has a
counter of what it was served; of those that wait, the one with the lowest counter is next. Who comes back after a pause
is lifted to the lowest counter of those that wait, so that idling saves up nothing. Two tenants that both always wait
differ by a constant at most, however much more one of them asks for.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PROMPT_WEIGHT = 1.0
ANSWER_WEIGHT = 2.0
"""A token of an answer is a pass of its own, one of a prompt shares it: the paper's weights."""


class FairQueue:
    """Places at the engine, given to tenants in turn. It belongs to one event loop.

    Args:
        room: requests that may be at the engine at once.
    """

    def __init__(self, room: int) -> None:
        assert room >= 1
        self._room = room
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._served: dict[str, float] = defaultdict(float)
        self._left_last: str | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return sum(len(queue) for queue in self._waiting.values())

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a place, and have it while the block runs; leaving early gives up the wait or the place."""
        await self._wait(tenant)
        try:
            yield
        finally:
            self._room += 1
            self._let_in()

    def charge(self, tenant: str, *, prompt: int = 0, answer: int = 0) -> None:
        """Count tokens that a tenant was served."""
        self._served[tenant] += PROMPT_WEIGHT * prompt + ANSWER_WEIGHT * answer

    async def _wait(self, tenant: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        if tenant not in self._waiting:
            self._served[tenant] = max(self._served[tenant], self._floor())
            self._waiting[tenant] = deque()
        self._waiting[tenant].append(turn)
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._room += 1  # the place came in the moment in which nobody wanted it any more
            elif turn in self._waiting.get(tenant, ()):
                self._remove(tenant, turn)
            self._let_in()
            raise

    def _floor(self) -> float:
        """What a newcomer's counter is lifted to."""
        if self._waiting:
            return min(self._served[tenant] for tenant in self._waiting)
        return self._served[self._left_last] if self._left_last is not None else 0.0

    def _let_in(self) -> None:
        while self._room and self._waiting:
            # Of equals, the one whose oldest request came first into the queue: dicts keep their order.
            tenant = min(self._waiting, key=lambda name: self._served[name])
            turn = self._waiting[tenant][0]
            self._remove(tenant, turn)
            if not turn.cancelled():  # whoever gave up may not have had the time to leave the queue
                self._room -= 1
                turn.set_result(None)

    def _remove(self, tenant: str, turn: asyncio.Future[None]) -> None:
        self._waiting[tenant].remove(turn)
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._left_last = tenant
