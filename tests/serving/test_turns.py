"""The scheduler alone, against a simple engine: each pass reads what has a row and gives each row one token."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.serving.turns import (
    AHEAD_PART,
    ANSWER_WEIGHT,
    BURST_TOKENS,
    COMPANY_SECONDS,
    KEPT_PART,
    READING_TOKENS,
    Turn,
    Turns,
)


def places(rows: int) -> int:
    """Requests at the engine, at the most."""
    return rows + rows // AHEAD_PART


@dataclass
class Engine:
    """Requests (tenant, prompt, answer) that arrive before a pass of their own, one pass a second.

    Who has come when all rows are taken waits for one, in the order of coming.
    """

    rows: int
    turns: Turns = field(init=False)
    now: float = 0.0
    inside: dict[Turn, int] = field(default_factory=dict)
    """Tokens left of each answer."""
    read: set[Turn] = field(default_factory=set)
    waiting: dict[Turn, int] = field(default_factory=dict)
    asked: dict[Turn, float] = field(default_factory=dict)
    waits: dict[Turn, float] = field(default_factory=dict)
    """Passes until each had a row."""
    served: Counter[str] = field(default_factory=Counter)
    """Weighted tokens, counted here."""
    passes: list[list[Turn]] = field(default_factory=list)
    """Whose prompts were read in each."""

    def __post_init__(self) -> None:
        self.turns = Turns(self.rows, lambda: self.now)

    def ask(self, tenant: str, prompt: int, answer: int) -> Turn:
        turn = self.turns.ask(tenant, prompt)
        self.waiting[turn], self.asked[turn] = answer, self.now
        return turn

    def let_in(self) -> None:
        for turn in self.turns.let_in():
            self.inside[turn] = self.waiting.pop(turn)

    def step(self) -> None:
        """Let in, then one pass."""
        self.let_in()
        at_work = list(self.inside)[: self.rows]
        self.passes.append([turn for turn in at_work if turn not in self.read])
        for turn in at_work:
            if turn not in self.read:
                self.read.add(turn)
                self.waits[turn] = self.now - self.asked[turn]
                self.served[turn.tenant] += turn.prompt
                self.turns.has_read(turn)
            self.inside[turn] -= 1
            self.served[turn.tenant] += int(ANSWER_WEIGHT)
            self.turns.charge(turn.tenant, answer=1)
            if not self.inside[turn]:
                del self.inside[turn]
                self.turns.leave(turn)
        self.now += 1

    def has(self, tenant: str) -> int:
        return sum(turn.tenant == tenant for turn in self.inside)


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
    while due or engine.waiting or engine.inside:
        for request in due.popleft() if due else ():
            engine.ask(*request)
        engine.let_in()
        check(engine)
        engine.step()
        steps += 1
        assert steps < 10_000, "it goes on for ever"
    return engine


@settings(max_examples=60, deadline=None)
@given(ROWS, ARRIVALS)
def test_everybody_is_answered_in_the_end_and_nobody_out_of_turn_with_oneself(
    rows: int, arrivals: list[list[tuple[str, int, int]]]
) -> None:
    engine = _run(rows, arrivals)
    assert engine.turns.waiting == 0
    assert engine.turns.free == places(rows)
    for tenant in "abcd":
        entered = [turn for turn in engine.waits if turn.tenant == tenant]
        assert entered == [turn for turn in engine.asked if turn.tenant == tenant]


@settings(max_examples=60, deadline=None)
@given(ROWS, ARRIVALS)
def test_a_tenant_alone_has_all_places_and_no_budget(rows: int, arrivals: list[list[tuple[str, int, int]]]) -> None:
    alone = [[("a", prompt, answer) for _, prompt, answer in pass_] for pass_ in arrivals]

    def check(engine: Engine) -> None:
        assert not engine.waiting or len(engine.inside) == places(rows)

    _run(rows, alone, check)


@settings(max_examples=60, deadline=None)
@given(ROWS, ARRIVALS)
def test_no_place_stays_free_without_a_reason(rows: int, arrivals: list[list[tuple[str, int, int]]]) -> None:
    kept = rows // AHEAD_PART + max(rows // KEPT_PART, 1 if rows > 1 else 0)

    def check(engine: Engine) -> None:
        free = places(rows) - len(engine.inside)
        if not engine.waiting or not free:
            return
        reading = [turn for turn in engine.inside if turn not in engine.read]
        heads = {turn.tenant: turn for turn in reversed(engine.waiting)}.values()
        a_long_one = any(turn.prompt > READING_TOKENS for turn in reading)

        def waits(turn: Turn) -> bool:
            behind_a_long_one = a_long_one and turn.prompt > READING_TOKENS
            own = sum(one.prompt for one in reading if one.prompt <= READING_TOKENS and one.tenant == turn.tenant)
            behind_its_own = turn.prompt <= READING_TOKENS < own + turn.prompt
            only_kept = free <= kept and engine.has(turn.tenant) > 0
            return behind_a_long_one or behind_its_own or only_kept

        assert all(map(waits, heads))

    _run(rows, arrivals, check)


@settings(max_examples=60, deadline=None)
@given(ROWS, ARRIVALS)
def test_in_company_a_pass_reads_each_tenants_budget_and_one_long_prompt(
    rows: int, arrivals: list[list[tuple[str, int, int]]]
) -> None:
    both = [[*pass_, ("company", 1, 1)] for pass_ in arrivals]
    for prompts in _run(rows, both).passes:
        short = [turn for turn in prompts if turn.prompt <= READING_TOKENS]
        for tenant in {turn.tenant for turn in short}:
            assert sum(turn.prompt for turn in short if turn.tenant == tenant) <= READING_TOKENS
        assert len(prompts) - len(short) <= 1


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(4, 16),
    loud=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=30, max_size=60),
    pauses=st.lists(st.integers(4, int(COMPANY_SECONDS)), min_size=1, max_size=8),
)
def test_a_quiet_tenant_waits_for_one_pass_however_much_a_loud_one_asks(
    rows: int, loud: list[tuple[int, int]], pauses: list[int]
) -> None:
    engine = Engine(rows)
    quiet = [engine.ask("quiet", 20, 2)]
    for pause in pauses:
        for _ in range(pause):
            if len(engine.waiting) < 20:
                for prompt, answer in loud:
                    engine.ask("loud", prompt, answer)
            engine.step()
        quiet.append(engine.ask("quiet", 20, 2))
    engine.step()
    engine.step()
    assert all(engine.waits[turn] <= 1 for turn in quiet)


def test_after_a_minute_alone_a_tenant_has_all_places_again() -> None:
    engine = Engine(8)
    engine.ask("other", 1, 1)
    for _ in range(100):
        engine.ask("loud", 1, 1000)
    engine.step()
    while engine.now <= COMPANY_SECONDS:
        engine.step()
        assert engine.has("loud") == 7
    engine.ask("loud", 1, 1)
    engine.now += 1
    engine.let_in()
    assert engine.has("loud") == places(8)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 8),
    one=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 8)), min_size=120, max_size=120),
    two=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 8)), min_size=120, max_size=200),
)
def test_two_who_always_wait_are_served_alike_to_within_a_batch(
    rows: int, one: list[tuple[int, int]], two: list[tuple[int, int]]
) -> None:
    engine = Engine(rows)
    for tenant, requests in (("one", one), ("two", two)):
        for prompt, answer in requests:
            engine.ask(tenant, prompt, answer)
    for _ in range(25):
        engine.step()
        # The paper's bound (theorem 4.4): twice what can be under way at once, or the longest prompt.
        assert abs(engine.served["one"] - engine.served["two"]) <= 2 * max(50, places(rows) * (50 + ANSWER_WEIGHT * 8))


def test_idling_saves_up_a_burst_and_no_more() -> None:
    engine = Engine(1)
    for tenant in ("other", "busy"):
        engine.ask(tenant, 10, 45)
    while engine.inside or engine.waiting:
        engine.step()
    for _ in range(200):
        engine.ask("busy", 10, 45)
    for _ in range(45 * 50):
        engine.step()
    # It is owed 50 requests' tokens by now, and comes with as many.
    for _ in range(50):
        engine.ask("other", 10, 45)
    before = engine.served["other"]
    while engine.served["other"] - before < BURST_TOKENS:
        engine.step()
    behind = engine.served["busy"]
    for _ in range(45 * 10):
        engine.step()
    assert engine.served["busy"] - behind >= 4 * 100, "then it goes turn by turn"


def test_who_asks_for_little_goes_before_who_always_waits() -> None:
    engine = Engine(16)
    for _ in range(100):
        engine.ask("loud", 60, 20)
    for _ in range(50):
        quiet = [engine.ask("quiet", 60, 2) for _ in range(2)]
        engine.step()
        engine.step()
        assert all(engine.waits[turn] <= 1 for turn in quiet)
        for _ in range(8):
            engine.step()


def test_of_two_equally_served_the_one_with_less_under_way_is_next() -> None:
    turns = Turns(2)
    loud = [turns.ask("loud", 10) for _ in range(3)]
    assert turns.let_in() == loud[:2]
    quiet = turns.ask("quiet", 10)
    turns.leave(loud[0])
    assert turns.let_in() == [quiet]


def test_places_that_come_free_together_go_round() -> None:
    turns = Turns(8)
    for tenant in "aaaaaaaabbbbbbbb":
        turns.ask(tenant, 10)
    entered = Counter(turn.tenant for turn in turns.let_in())
    assert entered == {"a": 4, "b": 4}


def test_an_answer_token_counts_as_much_as_two_of_a_prompt() -> None:
    turns = Turns(1)
    turns.charge("a", prompt=10)
    turns.charge("b", answer=5)
    assert turns._served["a"] == turns._served["b"] == 5 * ANSWER_WEIGHT
