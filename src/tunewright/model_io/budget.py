"""A budget in money for requests to endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class OutOfBudgetError(Exception):
    """One more request might exceed the remaining budget."""


class Budget:
    """A budget that is never overdrawn: each request reserves its maximum cost before it is sent.

    Args:
        budget: in the prices' currency; None: no cap.
        where: the config key that states it, for messages.
    """

    def __init__(self, budget: float | None, where: str) -> None:
        self.budget = budget
        self.where = where
        self.spent = 0.0
        self._reserved = 0.0
        self._under_way = 0
        self._freed: asyncio.Event | None = None

    def pay(self, amount: float) -> None:
        """Count a reply's cost; the budget never grows, not even by a journal that was edited."""
        self.spent += max(amount, 0.0)

    @asynccontextmanager
    async def reserved(self, most: float) -> AsyncIterator[None]:
        """Reserve ``most``, waiting if needed for requests in flight, which may cost less than they reserved.

        Raises:
            OutOfBudgetError: no request is in flight, and ``most`` exceeds the remaining budget.
        """
        while self.budget is not None and self.spent + self._reserved + most > self.budget:
            if not self._under_way:
                raise OutOfBudgetError(
                    f"The budget of {self.budget:g} is used up: {self.spent:.4f} is spent, and the next request may "
                    f"cost {most:.4f}"
                )
            self._freed = self._freed or asyncio.Event()
            await self._freed.wait()
        self._reserved += most
        self._under_way += 1
        try:
            yield
        finally:
            self._reserved -= most
            self._under_way -= 1
            if self._freed is not None:
                self._freed.set()
                self._freed = None
