"""The scheduling policy: which tenant's request goes to the engine next.

This is the only place with such a policy; engines fill free rows in the order of submission. Four rules keep a tenant
with many requests from slowing down the others:

*Order.* The waiting tenant with the fewest served tokens is next (Sheng et al. 2024, "Fairness in Serving Large
Language Models", OSDI, arXiv 2401.00588, algorithm 2). The counters of two tenants that always have requests waiting
differ by a constant at most, however many requests one of them sends. A tenant that returns after a pause is lifted to
:data:`BURST_TOKENS` below the lowest waiting counter, so idle time earns no more credit than that. The paper raises
the tenant's counter to the lowest waiting counter. But then a tenant that sends little alternates with one that always
waits, though it should go first.

*Rows.* A row stays occupied until its answer ends. So one row in eight is reserved for tenants below their equal share.
A tenant that returns need not wait for another one's answer to end.

*Prefill.* Every row waits for each prefill pass. So a tenant has a token budget of prompts in prefill at one time, as
in Sarathi-Serve (Agrawal et al. 2024, OSDI, arXiv 2403.02310). The budget is per tenant, or a tenant with one short
prompt would wait for the prompts of all others. Prompts above the budget are computed in chunks by the engine, and one
of them at a time over all tenants. The engine states the budget: what a card computes in one pass takes a processor
many (docs/decisions/0020).

*Pairs.* Every row waits for each prefill pass, and a pass of one prompt takes nearly as long as a pass of two.
So a tenant with its equal share of a nearly full engine holds its next request back, for :data:`HELD_PASSES`
at most. It admits the request with the one after it, or when another is admitted (docs/decisions/0020).

The engine gets somewhat more requests than it has rows. Otherwise a row would stay empty for the pass in which the
gateway receives a finished answer and submits the next request (docs/decisions/0023).

The last three rules cost throughput, so a tenant alone is exempt. It is alone if no other tenant has had a request here
in the last minute.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tunewright.engines.protocol import PREFILL_TOKENS

PROMPT_WEIGHT = 1.0
ANSWER_WEIGHT = 2.0
"""The paper's weights: an answer's token takes a whole pass, and a prompt's token shares one."""
ROWS_PER_RESERVED = 8
"""One row in this many is reserved for tenants below their equal share."""
ROWS_PER_AHEAD = 4
"""One request for this many rows may be at the engine before there is a row for it."""
HELD_PASSES = 2
"""Maximum number of passes for which a request is held back, so that it is prefilled together with another request."""
BURST_TOKENS = 1000.0
"""Maximum credit, in weighted tokens, that a tenant has after a pause."""
ACTIVE_SECONDS = 60.0
"""The time for which a tenant counts as active after its last answer."""


@dataclass(eq=False)
class Ticket:
    """One request in the scheduler: waiting, then admitted and in prefill, then admitted, then released."""

    tenant: str
    prompt: int
    """Tokens of the prompt."""
    short: bool
    """True if the prompt is computed together with others."""
    admitted: bool = False
    prefilling: bool = False


class FairScheduler:
    """Decides which requests are at the engine. It only decides: :class:`AdmissionQueue` does the waiting.

    Args:
        rows: requests that the engine computes at once.
        clock: seconds that never go back.
        prefill_tokens: a tenant's budget of prompt tokens in prefill; a prompt up to this length counts as short. It is
            one engine's, since all prompts of a tenant may be for one of them.
        engines: the number of engines, each of which computes one long prompt at a time.
    """

    def __init__(
        self,
        rows: int,
        clock: Callable[[], float] = time.monotonic,
        prefill_tokens: int = PREFILL_TOKENS,
        engines: int = 1,
    ) -> None:
        assert rows >= 1
        self._rows = rows
        self._prefill_tokens = prefill_tokens
        self._engines = engines
        self._clock = clock
        self._waiting: dict[str, deque[Ticket]] = {}
        self._admitted: Counter[str] = Counter()
        self._prefilling: set[Ticket] = set()
        self._served: dict[str, float] = defaultdict(float)
        self._idle_since: dict[str, float] = {}  # tenants without a request here; the longest idle comes first
        self._last_dequeued: str | None = None
        self._held_until: dict[str, float] = {}
        """Counters at which tenants no longer hold a request back."""

    def resize(self, rows: int, engines: int) -> bool:
        """Set the numbers of rows and engines; return whether a number has changed."""
        assert rows >= 1
        assert engines >= 1
        changed = (rows, engines) != (self._rows, self._engines)
        self._rows, self._engines = rows, engines
        return changed

    @property
    def _ahead(self) -> int:
        return self._rows // ROWS_PER_AHEAD

    @property
    def waiting(self) -> int:
        """The number of waiting requests."""
        return sum(map(len, self._waiting.values()))

    @property
    def free(self) -> int:
        """The number of further requests that could be admitted."""
        return self._rows + self._ahead - self._admitted.total()

    @property
    def idle(self) -> bool:
        """True if no request is waiting or admitted."""
        return not self._waiting and not self._admitted

    @property
    def holding(self) -> bool:
        """True if a tenant holds a request back, so that generated tokens may admit it."""
        return bool(self._held_until)

    def enqueue(self, tenant: str, prompt: int) -> Ticket:
        """Add a request with this many prompt tokens."""
        if tenant not in self._waiting:
            # Lift the counter: idle time must not earn more credit than a burst.
            self._served[tenant] = max(self._served[tenant], self._lowest_waiting() - BURST_TOKENS)
            self._waiting[tenant] = deque()
        self._idle_since.pop(tenant, None)
        ticket = Ticket(tenant, prompt, short=prompt <= self._prefill_tokens)
        self._waiting[tenant].append(ticket)
        return ticket

    def admit(self) -> list[Ticket]:
        """Admit as many requests as the rules allow; call it after every change."""
        admitted: list[Ticket] = []
        while (ticket := self._next(admitted)) is not None:
            self._dequeue(ticket)
            ticket.admitted = ticket.prefilling = True
            self._admitted[ticket.tenant] += 1
            self._prefilling.add(ticket)
            # Charged at once, so that the next choice in this loop already counts it.
            self.charge(ticket.tenant, prompt=ticket.prompt)
            admitted.append(ticket)
        return admitted

    def finish_prefill(self, ticket: Ticket) -> None:
        """Note that the engine has computed the prompt; later calls change nothing."""
        if ticket.prefilling:
            ticket.prefilling = False
            self._prefilling.remove(ticket)

    def release(self, ticket: Ticket) -> None:
        """Remove a request, admitted or waiting."""
        if ticket.admitted:
            self.finish_prefill(ticket)
            ticket.admitted = False
            self._admitted[ticket.tenant] -= 1
        else:
            self._dequeue(ticket)
        if not self._admitted[ticket.tenant]:
            del self._admitted[ticket.tenant]
            if ticket.tenant not in self._waiting:
                self._idle_since[ticket.tenant] = self._clock()

    def charge(self, tenant: str, *, prompt: int = 0, answer: int = 0) -> None:
        """Add tokens to a tenant's counter."""
        self._served[tenant] += PROMPT_WEIGHT * prompt + ANSWER_WEIGHT * answer

    def _next(self, admitted: list[Ticket]) -> Ticket | None:
        """Return the next request to admit, after those that the same call has admitted."""
        if not self._waiting or self.free <= 0:  # below 0 once an engine has stopped
            return None
        active = self._active_tenants()
        # Equal counters: the tenant with fewer admitted requests first, then the one that has waited longer (dicts
        # keep their order, and sorting is stable).
        for tenant in sorted(self._waiting, key=lambda name: (self._served[name], self._admitted[name])):
            ticket = self._waiting[tenant][0]
            # A tenant whose rule fails is skipped, not waited for: rows are never empty while anyone may use them.
            if active == 1:
                return ticket
            allowed = self._may_take_row(tenant, active) and self._may_prefill(ticket)
            if allowed and (admitted or not self._hold(tenant, active)):
                return ticket
        return None

    def _may_take_row(self, tenant: str, active: int) -> bool:
        """Return whether the rule of rows allows the tenant another row; its first one is always allowed."""
        own = self._admitted[tenant]
        return own == 0 or own < self._rows // active or self.free > self._reserved

    def _may_prefill(self, ticket: Ticket) -> bool:
        """Return whether the rule of prefill allows this prompt now."""
        if not ticket.short:
            # Chunks of two long prompts would alternate, which delays the first one and does not help the second.
            return sum(not other.short for other in self._prefilling) < self._engines
        own = sum(other.prompt for other in self._prefilling if other.short and other.tenant == ticket.tenant)
        return own + ticket.prompt <= self._prefill_tokens

    def _hold(self, tenant: str, active: int) -> bool:
        """Return whether the tenant's next request waits, by the rule of pairs, to be prefilled with another one."""
        own, queue = self._admitted[tenant], self._waiting[tenant]
        nearly_full = self._rows - self._admitted.total() < self._rows // 4
        if own == 0 or own < self._rows // active or not nearly_full or len(queue) == 1:
            return False
        together = queue[0].prompt + queue[1].prompt <= self._prefill_tokens
        if together and self.free - 1 > self._reserved:
            return False
        # Each pass gives each of the tenant's rows one token, so its own counter counts the passes.
        passes = HELD_PASSES * own * ANSWER_WEIGHT
        return self._served[tenant] < self._held_until.setdefault(tenant, self._served[tenant] + passes)

    @property
    def _reserved(self) -> int:
        """Requests that only tenants below their equal share may add: reserved rows, and requests ahead of rows.

        A request ahead of its row delays every later one, so it must not belong to a tenant with many.
        """
        return self._ahead + max(self._rows // ROWS_PER_RESERVED, min(1, self._rows - 1))

    def _active_tenants(self) -> int:
        """Return the number of tenants with a request here, now or in the last :data:`ACTIVE_SECONDS`."""
        since = self._clock() - ACTIVE_SECONDS
        # The longest idle tenant comes first, so the loop stops at the first one that is still active.
        while self._idle_since and next(iter(self._idle_since.values())) < since:
            tenant = next(iter(self._idle_since))
            del self._idle_since[tenant]
            # The tenant returns with the credit of a newcomer. The counters of ended tenants would otherwise add up.
            del self._served[tenant]
            if tenant == self._last_dequeued:
                self._last_dequeued = None  # a request is waiting now, and is dequeued before anyone asks
        return len(self._waiting.keys() | self._admitted.keys() | self._idle_since.keys())

    def _lowest_waiting(self) -> float:
        """Return the lowest counter of the waiting tenants; if none waits, the counter of the last tenant that did."""
        if self._waiting:
            return min(self._served[tenant] for tenant in self._waiting)
        # Without a waiting tenant the last one served is the reference; 0 would give newcomers all past credit.
        return self._served[self._last_dequeued] if self._last_dequeued is not None else 0.0

    def _dequeue(self, ticket: Ticket) -> None:
        self._waiting[ticket.tenant].remove(ticket)
        self._held_until.pop(ticket.tenant, None)
        if not self._waiting[ticket.tenant]:
            del self._waiting[ticket.tenant]
            self._last_dequeued = ticket.tenant


@dataclass(frozen=True)
class Slot:
    """A request's admission to the engine."""

    queue: AdmissionQueue
    ticket: Ticket

    def record_tokens(self, tokens: int) -> None:
        """Charge generated tokens to the tenant; the first call also says that the prompt has been computed."""
        self.queue.record_tokens(self.ticket, tokens)


class AdmissionQueue:
    """Slots at the engine, given to tenants in a fair order. A queue belongs to one event loop."""

    def __init__(self, rows: int, prefill_tokens: int = PREFILL_TOKENS, engines: int = 1) -> None:
        self._scheduler = FairScheduler(rows, prefill_tokens=prefill_tokens, engines=engines)
        self._admissions: dict[Ticket, asyncio.Future[None]] = {}

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return self._scheduler.waiting

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
        """Wait for a slot and keep it for the block; leaving early, or being cancelled, gives it up."""
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
