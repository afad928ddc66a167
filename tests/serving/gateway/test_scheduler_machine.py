"""The scheduler under any sequence of calls, against lists of who waits and who is admitted."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hypothesis_settings import examples
from tunewright.engines.protocol import PREFILL_TOKENS
from tunewright.serving.gateway.fair_scheduler import ROWS_PER_AHEAD, FairScheduler, Ticket

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
