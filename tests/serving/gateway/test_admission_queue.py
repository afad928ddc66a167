"""The admission queue, whose coroutines wait and are cancelled, and its scheduler under any sequence of calls."""

from __future__ import annotations

import asyncio

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from making.property_examples import examples
from tunewright.engines.protocol import PREFILL_TOKENS
from tunewright.serving.gateway.fair_scheduler import (
    HELD_PASSES,
    ROWS_PER_AHEAD,
    AdmissionQueue,
    FairScheduler,
    Slot,
    Ticket,
)


def test_queue_admits_the_next_request_when_a_waiter_is_cancelled() -> None:
    async def run(*, late: bool) -> None:
        queue, entered = AdmissionQueue(1), []

        async def request(tenant: str) -> None:
            async with queue.slot(tenant, 1):
                entered.append(tenant)

        async with queue.slot("a", 1):
            gone, waiting = (asyncio.create_task(request(tenant)) for tenant in "bc")
            await asyncio.sleep(0)
            assert queue.waiting == 2
            if not late:
                gone.cancel()
        # Now its ticket has come, or would have; it has not had the time to notice either.
        gone.cancel()
        await asyncio.gather(gone, waiting, return_exceptions=True)
        assert (entered, queue.idle) == (["c"], True)

    asyncio.run(run(late=False))
    asyncio.run(run(late=True))


def test_queue_admits_further_prompts_when_earlier_ones_are_prefilled() -> None:
    async def run() -> None:
        queue, entered = AdmissionQueue(8), []

        async def request(tenant: str) -> None:
            async with queue.slot(tenant, 100) as place:
                entered.append(tenant)
                await asyncio.sleep(0.01)
                place.record_tokens(1)
                place.record_tokens(1)
                await asyncio.Event().wait()

        tasks = [asyncio.create_task(request(tenant)) for tenant in "abab"]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert entered == ["a", "b"]  # of each as much as is read in a pass
        while len(entered) < 4:
            await asyncio.sleep(0.01)
        assert (entered[:2], sorted(entered[2:])) == (["a", "b"], ["a", "b"])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 300))


def test_queue_admits_a_held_request_when_the_running_ones_get_tokens() -> None:
    async def run() -> None:
        queue, slots = AdmissionQueue(16), list[Slot]()
        done = asyncio.Event()

        async def request(tenant: str) -> None:
            async with queue.slot(tenant, 20) as slot:
                slots.append(slot)
                await done.wait()

        async with queue.slot("quiet", 20):
            pass
        tasks = [asyncio.create_task(request("loud")) for _ in range(20)]
        for _ in range(5):  # prompts are admitted in groups, each after the prefill of the one before
            await asyncio.sleep(0)
            for slot in list(slots):
                slot.record_tokens(1)
        await asyncio.sleep(0)
        assert len(slots) == 14, "two rows are reserved"
        tasks[0].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(slots) == 14, "the next one is held"
        for _ in range(HELD_PASSES):
            for slot in slots[1:14]:
                slot.record_tokens(1)
        await asyncio.sleep(0)
        assert len(slots) == 15
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert queue.idle

    asyncio.run(run())


def test_queue_admits_waiters_as_soon_as_the_engine_has_more_rows() -> None:
    async def run() -> list[int]:
        queue, counts = AdmissionQueue(1), []
        entered = 0

        async def request() -> None:
            nonlocal entered
            async with queue.slot("a", 1):
                entered += 1
                await asyncio.Event().wait()

        tasks = [asyncio.create_task(request()) for _ in range(6)]
        for rows in (1, 4, 4):
            queue.resize(rows, 1)
            await asyncio.sleep(0.01)
            counts.append(entered)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return counts

    assert asyncio.run(run()) == [1, 5, 5]


TENANTS = st.sampled_from("abc")
INDEX = st.integers(0, 63)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, are admitted, compute and leave in any order, also while they wait."""

    @initialize(rows=st.integers(1, 9))
    def start(self, rows: int) -> None:
        self.now = 0.0
        self.rows = rows
        self.scheduler = FairScheduler(rows, lambda: self.now)
        self.waiting: dict[str, list[Ticket]] = {name: [] for name in "abc"}
        self.admitted: list[Ticket] = []
        self.prefilling: list[Ticket] = []
        self.seen = 0

    @rule(tenant=TENANTS, prompt=st.integers(1, 300))
    def enqueue(self, tenant: str, prompt: int) -> None:
        ticket = self.scheduler.enqueue(tenant, prompt)
        self.waiting[tenant].append(ticket)

    @rule()
    def admit(self) -> None:
        several = sum(bool(self.waiting[name]) or any(t.tenant == name for t in self.admitted) for name in "abc") > 1
        had_long = any(not ticket.short for ticket in self.prefilling)
        new = self.scheduler.admit()
        for ticket in new:
            # First come, first served within a tenant.
            assert self.waiting[ticket.tenant].pop(0) is ticket
            self.admitted.append(ticket)
            self.prefilling.append(ticket)
        self.seen += len(new)
        if several:
            assert sum(not ticket.short for ticket in new) + had_long <= 1 or not any(not t.short for t in new)
            for name in {ticket.tenant for ticket in new if ticket.short}:
                own = sum(ticket.prompt for ticket in self.prefilling if ticket.short and ticket.tenant == name)
                assert own <= PREFILL_TOKENS
        if any(self.waiting.values()):
            # An idle engine never has somebody waiting.
            assert self.admitted

    @precondition(lambda self: self.prefilling)
    @rule(index=INDEX)
    def finish_prefill(self, index: int) -> None:
        ticket = self.prefilling.pop(index % len(self.prefilling))
        self.scheduler.finish_prefill(ticket)
        self.scheduler.finish_prefill(ticket)  # a repeated call changes nothing

    @precondition(lambda self: self.admitted)
    @rule(index=INDEX, tokens=st.integers(1, 40))
    def answer(self, index: int, tokens: int) -> None:
        self.scheduler.charge(self.admitted[index % len(self.admitted)].tenant, answer=tokens)

    @precondition(lambda self: self.admitted)
    @rule(index=INDEX)
    def release_admitted(self, index: int) -> None:
        ticket = self.admitted.pop(index % len(self.admitted))
        self.prefilling = [each for each in self.prefilling if each is not ticket]
        self.scheduler.release(ticket)

    @precondition(lambda self: any(self.waiting.values()))
    @rule(index=INDEX)
    def cancel_waiting(self, index: int) -> None:
        there = [ticket for queue in self.waiting.values() for ticket in queue]
        ticket = there[index % len(there)]
        self.waiting[ticket.tenant].remove(ticket)
        self.scheduler.release(ticket)

    @rule(seconds=st.sampled_from([0.1, 5.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert self.scheduler.waiting == sum(map(len, self.waiting.values()))
        places = self.rows + self.rows // ROWS_PER_AHEAD
        assert self.scheduler.free == places - len(self.admitted) >= 0
        assert self.scheduler.idle == (not self.admitted and not any(self.waiting.values()))

    def teardown(self) -> None:
        """Every request that still waits is served once the others leave."""
        if not hasattr(self, "scheduler"):
            return
        left = sum(map(len, self.waiting.values()))
        for _ in range(2 * left + 2):
            self.admit()
            while self.admitted:
                self.release_admitted(0)
        assert self.scheduler.idle
        self.counts_agree()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = examples(60)
