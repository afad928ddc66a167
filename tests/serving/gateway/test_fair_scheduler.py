"""The scheduler with a simple engine: each pass prefills the new rows and gives each row one token."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.engines.protocol import PREFILL_TOKENS
from tunewright.serving.gateway.fair_scheduler import (
    ACTIVE_SECONDS,
    ANSWER_WEIGHT,
    BURST_TOKENS,
    HELD_PASSES,
    ROWS_PER_AHEAD,
    ROWS_PER_RESERVED,
    FairScheduler,
    Ticket,
)


def places(rows: int) -> int:
    """Requests at the engine, at the most."""
    return rows + rows // ROWS_PER_AHEAD


@dataclass
class Engine:
    """Requests (tenant, prompt, answer) that arrive before a pass of their own, one pass a second.

    Who has come when all rows are taken waits for one, in the order of coming.
    """

    rows: int
    scheduler: FairScheduler = field(init=False)
    now: float = 0.0
    admitted: dict[Ticket, int] = field(default_factory=dict)
    """Tokens left of each answer."""
    read: set[Ticket] = field(default_factory=set)
    waiting: dict[Ticket, int] = field(default_factory=dict)
    asked: dict[Ticket, float] = field(default_factory=dict)
    waits: dict[Ticket, float] = field(default_factory=dict)
    """Passes until each had a row."""
    served: Counter[str] = field(default_factory=Counter)
    """Weighted tokens, counted here."""
    passes: list[list[Ticket]] = field(default_factory=list)
    """Whose prompts were read in each."""

    def __post_init__(self) -> None:
        self.scheduler = FairScheduler(self.rows, lambda: self.now)

    def enqueue(self, tenant: str, prompt: int, answer: int) -> Ticket:
        ticket = self.scheduler.enqueue(tenant, prompt)
        self.waiting[ticket], self.asked[ticket] = answer, self.now
        return ticket

    def admit(self) -> None:
        for ticket in self.scheduler.admit():
            self.admitted[ticket] = self.waiting.pop(ticket)

    def step(self) -> None:
        """Let in, then one pass."""
        self.admit()
        at_work = list(self.admitted)[: self.rows]
        self.passes.append([ticket for ticket in at_work if ticket not in self.read])
        for ticket in at_work:
            if ticket not in self.read:
                self.read.add(ticket)
                self.waits[ticket] = self.now - self.asked[ticket]
                self.served[ticket.tenant] += ticket.prompt
                self.scheduler.finish_prefill(ticket)
            self.admitted[ticket] -= 1
            self.served[ticket.tenant] += int(ANSWER_WEIGHT)
            self.scheduler.charge(ticket.tenant, answer=1)
            if not self.admitted[ticket]:
                del self.admitted[ticket]
                self.scheduler.release(ticket)
        self.now += 1

    def has(self, tenant: str) -> int:
        return sum(ticket.tenant == tenant for ticket in self.admitted)


REQUEST = st.tuples(st.sampled_from("abcd"), st.integers(1, 300), st.integers(1, 12))
ARRIVALS = st.lists(st.lists(REQUEST, max_size=6), min_size=1, max_size=30)
ROWS = st.integers(1, 12)


def _run(
    rows: int,
    arrivals: Iterable[Sequence[tuple[str, int, int]]],
    check: Callable[[Engine], None] = lambda _engine: None,
) -> Engine:
    """All of it to its end; ``check`` looks on after each letting in."""
    engine, due = Engine(rows), deque(arrivals)
    steps = 0
    while due or engine.waiting or engine.admitted:
        for request in due.popleft() if due else ():
            engine.enqueue(*request)
        engine.admit()
        check(engine)
        engine.step()
        steps += 1
        assert steps < 10_000, "it never ends"
    return engine


@settings(max_examples=60, deadline=None)
@given(ROWS, ARRIVALS)
def test_tenant_alone_may_use_all_slots_without_a_budget(rows: int, arrivals: list[list[tuple[str, int, int]]]) -> None:
    alone = [[("a", prompt, answer) for _, prompt, answer in pass_] for pass_ in arrivals]

    def check(engine: Engine) -> None:
        assert not engine.waiting or len(engine.admitted) == places(rows)

    _run(rows, alone, check)


@settings(max_examples=60, deadline=None)
@given(ROWS, ARRIVALS)
def test_slot_stays_free_only_by_a_rule(rows: int, arrivals: list[list[tuple[str, int, int]]]) -> None:
    kept = rows // ROWS_PER_AHEAD + max(rows // ROWS_PER_RESERVED, 1 if rows > 1 else 0)
    held_since: dict[Ticket, float] = {}

    def check(engine: Engine) -> None:
        free = places(rows) - len(engine.admitted)
        if not engine.waiting or not free:
            return
        prefilling = [ticket for ticket in engine.admitted if ticket not in engine.read]
        heads = {ticket.tenant: ticket for ticket in reversed(engine.waiting)}.values()
        a_long_one = any(ticket.prompt > PREFILL_TOKENS for ticket in prefilling)

        def waits(ticket: Ticket) -> bool:
            behind_a_long_one = a_long_one and ticket.prompt > PREFILL_TOKENS
            own = sum(one.prompt for one in prefilling if one.prompt <= PREFILL_TOKENS and one.tenant == ticket.tenant)
            behind_its_own = ticket.prompt <= PREFILL_TOKENS < own + ticket.prompt
            only_kept = free <= kept and engine.has(ticket.tenant) > 0
            return behind_a_long_one or behind_its_own or only_kept or held(ticket)

        def held(ticket: Ticket) -> bool:
            another_waits = sum(one.tenant == ticket.tenant for one in engine.waiting) > 1
            nearly_full = rows - len(engine.admitted) < rows // 4
            passes = engine.now - held_since.setdefault(ticket, engine.now)
            return another_waits and nearly_full and engine.has(ticket.tenant) > 0 and passes <= HELD_PASSES

        assert all(map(waits, heads))

    _run(rows, arrivals, check)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(4, 16),
    loud=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=30, max_size=60),
    pauses=st.lists(st.integers(4, int(ACTIVE_SECONDS)), min_size=1, max_size=8),
)
def test_quiet_tenant_waits_one_pass_however_many_requests_a_loud_one_sends(
    rows: int, loud: list[tuple[int, int]], pauses: list[int]
) -> None:
    engine = Engine(rows)
    quiet = [engine.enqueue("quiet", 20, 2)]
    for pause in pauses:
        for _ in range(pause):
            if len(engine.waiting) < 20:
                for prompt, answer in loud:
                    engine.enqueue("loud", prompt, answer)
            engine.step()
        quiet.append(engine.enqueue("quiet", 20, 2))
    engine.step()
    engine.step()
    assert all(engine.waits[ticket] <= 1 for ticket in quiet)


def test_tenant_may_use_all_slots_again_after_a_minute_alone() -> None:
    engine = Engine(8)
    engine.enqueue("other", 1, 1)
    for _ in range(100):
        engine.enqueue("loud", 1, 1000)
    engine.step()
    for _ in range(HELD_PASSES):
        engine.step()
    while engine.now <= ACTIVE_SECONDS:
        engine.step()
        assert engine.has("loud") == 7
    engine.enqueue("loud", 1, 1)
    engine.now += 1
    engine.admit()
    assert engine.has("loud") == places(8)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 8),
    one=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 8)), min_size=120, max_size=120),
    two=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 8)), min_size=120, max_size=200),
)
def test_two_busy_tenants_are_served_equally_within_the_papers_bound(
    rows: int, one: list[tuple[int, int]], two: list[tuple[int, int]]
) -> None:
    engine = Engine(rows)
    for tenant, requests in (("one", one), ("two", two)):
        for prompt, answer in requests:
            engine.enqueue(tenant, prompt, answer)
    for _ in range(25):
        engine.step()
        # The paper's bound (theorem 4.4): twice what can be in progress at once, or the longest prompt.
        assert abs(engine.served["one"] - engine.served["two"]) <= 2 * max(50, places(rows) * (50 + ANSWER_WEIGHT * 8))


def test_idle_tenant_earns_one_burst_of_credit() -> None:
    engine = Engine(1)
    for tenant in ("other", "busy"):
        engine.enqueue(tenant, 10, 45)
    while engine.admitted or engine.waiting:
        engine.step()
    for _ in range(200):
        engine.enqueue("busy", 10, 45)
    for _ in range(45 * 50):
        engine.step()
    # It is owed 50 requests' tokens by now, and comes with as many.
    for _ in range(50):
        engine.enqueue("other", 10, 45)
    before = engine.served["other"]
    while engine.served["other"] - before < BURST_TOKENS:
        engine.step()
    behind = engine.served["busy"]
    for _ in range(45 * 10):
        engine.step()
    assert engine.served["busy"] - behind >= 4 * 100, "then it goes ticket by ticket"


def _busy(rows: int, prompt: int = 20) -> Engine:
    """A loud tenant that has all rows it may have, and requests waiting; a quiet one that has had an answer."""
    engine = Engine(rows)
    engine.enqueue("quiet", prompt, 1)
    engine.step()
    for _ in range(100):
        engine.enqueue("loud", prompt, 1000)
    for _ in range(45):
        engine.step()
    assert engine.has("loud") == rows - rows // ROWS_PER_RESERVED
    return engine


def _end(engine: Engine, answers: int) -> None:
    """End answers of the loud tenant."""
    for ticket in list(engine.admitted)[:answers]:
        del engine.admitted[ticket]
        engine.scheduler.release(ticket)


def test_held_request_is_admitted_after_two_passes_when_no_second_row_is_free() -> None:
    engine = _busy(16)
    _end(engine, 1)
    for _ in range(HELD_PASSES):
        engine.step()
        assert engine.has("loud") == 13
    engine.admit()
    assert engine.has("loud") == 14


def test_held_request_is_prefilled_with_another_tenants_request() -> None:
    engine = _busy(32, prompt=100)  # two of them are over the budget
    _end(engine, 2)
    engine.step()
    assert not engine.passes[-1]
    engine.enqueue("quiet", 100, 1)
    engine.step()
    assert Counter(ticket.tenant for ticket in engine.passes[-1]) == {"quiet": 1, "loud": 1}


def test_tenant_with_fewer_admitted_requests_is_next_when_served_equally() -> None:
    scheduler = FairScheduler(2)
    loud = [scheduler.enqueue("loud", 10) for _ in range(3)]
    assert scheduler.admit() == loud[:2]
    quiet = scheduler.enqueue("quiet", 10)
    scheduler.release(loud[0])
    assert scheduler.admit() == [quiet]


def test_scheduler_keeps_no_counters_of_tenants_that_have_gone() -> None:
    engine, sizes = Engine(8), []
    for number in range(40):
        engine.enqueue(f"passing-{number}", 10, 2)
        while engine.admitted or engine.waiting:
            engine.step()
        engine.now += ACTIVE_SECONDS / 3
        sizes.append(len(engine.scheduler._served))
    assert max(sizes) <= 5


def test_tenant_returns_after_a_minute_with_one_burst_of_credit() -> None:
    now = [0.0]
    scheduler = FairScheduler(1, lambda: now[0])

    def answer(tenant: str, tokens: int) -> None:
        ticket = scheduler.enqueue(tenant, 1)
        assert scheduler.admit() == [ticket]
        scheduler.charge(tenant, answer=tokens)
        scheduler.release(ticket)

    for tenant in ("other", "busy", "other", "busy"):  # each has been forgotten when the next one comes
        before = scheduler._lowest_waiting()
        answer(tenant, 5000)
        after = scheduler._served[tenant]
        assert after == max(0.0, before - BURST_TOKENS) + 1 + 5000 * ANSWER_WEIGHT
        assert scheduler._served.keys() == {tenant}
        now[0] += 2 * ACTIVE_SECONDS


@pytest.mark.parametrize(("budget", "together"), [(PREFILL_TOKENS, 1), (2048, 4)])
def test_engine_that_reads_more_in_a_pass_gets_long_prompts_together(budget: int, together: int) -> None:
    scheduler = FairScheduler(8, prefill_tokens=budget)
    for tenant in "abcd":
        scheduler.enqueue(tenant, 300)
    assert len(scheduler.admit()) == together


@pytest.mark.parametrize("engines", [1, 3])
def test_each_replica_may_have_one_long_prompt_in_prefill(engines: int) -> None:
    scheduler = FairScheduler(32, lambda: 0.0, engines=engines)
    for tenant in "abcde":
        scheduler.enqueue(tenant, PREFILL_TOKENS + 1)
    admitted = scheduler.admit()
    assert len(admitted) == engines
    scheduler.finish_prefill(admitted[0])
    assert len(scheduler.admit()) == 1


def test_engine_with_fewer_rows_gets_no_further_requests_until_it_has_room() -> None:
    scheduler = FairScheduler(16, lambda: 0.0)
    for _ in range(40):
        scheduler.enqueue("a", 1)
    admitted = scheduler.admit()
    assert len(admitted) == places(16)
    assert scheduler.resize(8, 1)
    assert not scheduler.resize(8, 1)
    for number, ticket in enumerate(admitted, 1):
        scheduler.release(ticket)
        assert len(scheduler.admit()) == (number > places(16) - places(8))
    assert scheduler.resize(16, 1)
    assert len(scheduler.admit()) == places(16) - places(8)
