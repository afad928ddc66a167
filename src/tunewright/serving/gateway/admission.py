"""The queue in front of the engine: coroutines wait here for the decisions of :mod:`.fair_scheduler`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tunewright.engines.protocol import PREFILL_TOKENS
from tunewright.serving.gateway.fair_scheduler import FairScheduler, Ticket


@dataclass(frozen=True)
class Slot:
    """A request's admission to the engine."""

    queue: AdmissionQueue
    ticket: Ticket

    def record_tokens(self, tokens: int) -> None:
        """Charge generated tokens to the tenant; the first call also says that the prompt has been computed."""
        self.queue.record_tokens(self.ticket, tokens)


class AdmissionQueue:
    """Slots at the engine, given to tenants in a fair order. A queue belongs to one event loop.

    Args:
        rows: requests that the engine computes at once.
        prefill_tokens, engines: see :class:`FairScheduler`.
    """

    def __init__(self, rows: int, prefill_tokens: int = PREFILL_TOKENS, engines: int = 1) -> None:
        self._scheduler = FairScheduler(rows, prefill_tokens=prefill_tokens, engines=engines)
        self._admissions: dict[Ticket, asyncio.Future[None]] = {}

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return self._scheduler.waiting

    @property
    def admitted(self) -> int:
        """The number of requests that have a slot."""
        return self._scheduler.admitted

    @property
    def idle(self) -> bool:
        """True if no request has a slot or waits for one."""
        return self._scheduler.idle

    def resize(self, rows: int, engines: int) -> None:
        """Set the number of requests that the engine computes at once from now on, and the number of engines."""
        if self._scheduler.resize(rows, engines):
            self._admit()

    @asynccontextmanager
    async def slot(self, tenant: str, prompt: int) -> AsyncIterator[Slot]:
        """Wait for a slot and keep it for the block; leaving early, or being cancelled, gives it up.

        Args:
            tenant: the tenant whose turn it takes.
            prompt: tokens of the prompt.
        """
        ticket = self._scheduler.enqueue(tenant, prompt)
        admission = self._admissions[ticket] = asyncio.get_running_loop().create_future()
        self._admit()
        try:
            await admission
            yield Slot(self, ticket)
        finally:
            # A waiter may be cancelled after its admission and before it runs again. The scheduler counts it as
            # admitted then; release() gives the slot back in either state, and _admit() passes it on.
            self._admissions.pop(ticket, None)
            self._scheduler.release(ticket)
            self._admit()

    def record_tokens(self, ticket: Ticket, tokens: int) -> None:
        """See :meth:`Slot.record_tokens`."""
        # Charged while decoding, not at the end: a long answer lowers its tenant's priority from the start.
        self._scheduler.charge(ticket.tenant, answer=tokens)
        if ticket.prefilling or self._scheduler.holding:
            self._scheduler.finish_prefill(ticket)
            self._admit()

    def _admit(self) -> None:
        for ticket in self._scheduler.admit():
            admission = self._admissions.pop(ticket)
            if not admission.cancelled():  # a cancelled waiter releases its ticket as soon as it runs
                admission.set_result(None)
