"""Limits, checked against a brute-force count, and across several servers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from states import Clock, reservation, with_tenant

from making.property_examples import examples
from tunewright.core.errors import UserError
from tunewright.serving.options import LimitOptions
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import LOST_SECONDS, LimitExceededError, Limits, RequestUsage, changed_limits
from tunewright.serving.tenants.usage import UsageLine, lines_csv

LIMITS = st.builds(
    Limits,
    st.none() | st.integers(1, 4),
    st.none() | st.integers(1, 60),
    st.none() | st.integers(1, 3),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from([0.001, 1.0, 20.0, 30.0, 59.999, 60.0, 61.0])),
        st.tuples(st.just("ask"), st.integers(1, 40)),
        st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, 40)),
    ),
    min_size=1,
    max_size=25,
)


@dataclass
class Line:
    start: float
    tokens: int
    number: int
    finished: bool = False


@dataclass
class Counting:
    """The limits, in the simplest implementation."""

    limits: Limits
    lines: list[Line] = field(default_factory=list)

    def allows(self, now: float, tokens: int) -> bool:
        recent = [line for line in self.lines if now - 60 < line.start <= now]
        in_flight = [line for line in self.lines if not line.finished]
        return (
            (self.limits.requests_per_minute is None or len(recent) + 1 <= self.limits.requests_per_minute)
            and (
                self.limits.tokens_per_minute is None
                or sum(line.tokens for line in recent) + tokens <= self.limits.tokens_per_minute
            )
            and (self.limits.concurrency is None or len(in_flight) + 1 <= self.limits.concurrency)
        )


def used(prompt: int = 0, answer: int = 0) -> RequestUsage:
    return RequestUsage(prompt, answer, 0.01, 0.02, 0.03, "stop")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[State, Clock]]:
    """One database for many cases, each with a tenant of its own."""
    clock = Clock()
    with State(f"sqlite:///{tmp_path_factory.mktemp('limits')}/state.sqlite", clock=clock) as state:
        yield state, clock


@settings(examples(60), suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(limits=LIMITS, steps=STEPS)
def test_reserve_admits_what_a_brute_force_count_admits(
    shared: tuple[State, Clock], limits: Limits, steps: list[Any]
) -> None:
    state, clock = shared
    caller, release = with_tenant(state, f"t{len(state.tenants.list())}", limits)
    model = Counting(limits)
    for step in steps:
        if step[0] == "wait":
            clock.now += step[1]
        elif step[0] == "ask":
            expected = model.allows(clock.now, step[1])
            try:
                number = state.quota.reserve(reservation(caller, release, step[1]), "g")
            except LimitExceededError:
                assert not expected
            else:
                assert expected
                model.lines.append(Line(clock.now, step[1], number))
        else:
            open_lines = [line for line in model.lines if not line.finished]
            if open_lines:
                line = open_lines[step[1] % len(open_lines)]
                tokens = min(line.tokens, step[2])
                state.quota.settle(line.number, used(tokens // 2, tokens - tokens // 2))
                line.tokens, line.finished = tokens, True
    starts = [line.start for line in model.lines]
    for end in starts:  # in no 60 seconds whatever, not only in those of the clock's minutes
        window = [line for line in model.lines if end - 60 < line.start <= end]
        assert limits.requests_per_minute is None or len(window) <= limits.requests_per_minute
        assert limits.tokens_per_minute is None or sum(line.tokens for line in window) <= limits.tokens_per_minute


@settings(examples(40), suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    limits=st.builds(Limits, st.integers(1, 4) | st.none(), st.integers(10, 40) | st.none()),
    asks=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 10)), min_size=1, max_size=15),
)
def test_reserve_succeeds_exactly_after_the_reported_wait(
    shared: tuple[State, Clock], limits: Limits, asks: list[tuple[float, int]]
) -> None:
    state, clock = shared
    caller, release = with_tenant(state, f"w{len(state.tenants.list())}", limits)
    for pause, tokens in asks:
        clock.now += pause
        request = reservation(caller, release, tokens)
        try:
            state.quota.reserve(request, "g")
        except LimitExceededError as error:
            assert error.wait is not None
            message = clock.now + error.wait
            clock.now = message - 0.001
            with pytest.raises(LimitExceededError):
                state.quota.reserve(request, "g")
            clock.now = message
            try:
                state.quota.reserve(request, "g")
            except LimitExceededError as other:  # one limit's wait is over, and the other one's is not
                assert other.limit != error.limit


@pytest.mark.parametrize(
    ("limits", "most"),
    [(Limits(requests_per_minute=20), 20), (Limits(tokens_per_minute=200), 20), (Limits(concurrency=20), 20)],
    ids=["requests", "tokens", "concurrency"],
)
def test_two_servers_together_admit_as_much_as_one(state_url: str, limits: Limits, most: int) -> None:
    with State(state_url) as one, State(state_url) as two:
        caller, release = with_tenant(one, limits=limits)

        def ask(index: int) -> bool:
            try:
                (one, two)[index % 2].quota.reserve(reservation(caller, release), f"g{index % 2}")
            except LimitExceededError:
                return False
            return True

        with ThreadPoolExecutor(8) as threads:
            let_in = list(threads.map(ask, range(60)))
        assert sum(let_in) == most
        assert one.usage.sums()[0].requests == most


def test_second_settle_changes_nothing(state: State) -> None:
    caller, release = with_tenant(state)
    number = state.quota.reserve(reservation(caller, release), "g")
    state.quota.settle(number, used(1, 2))
    state.quota.settle(number, used(3, 4))
    (line,) = state.usage.lines()
    assert (line.prompt_tokens, line.completion_tokens) == (1, 2)


def test_request_over_the_limit_by_itself_has_no_wait(state: State) -> None:
    caller, release = with_tenant(state, limits=Limits(tokens_per_minute=100))
    with pytest.raises(LimitExceededError, match="101 tokens, over the limit") as caught:
        state.quota.reserve(reservation(caller, release, 101), "g")
    assert caught.value.wait is None


def test_requests_of_a_dead_server_no_longer_count(state_url: str) -> None:
    clock = Clock()
    with State(state_url, clock=clock) as state:
        caller, release = with_tenant(state, limits=Limits(concurrency=1))
        state.quota.heartbeat("dies", "host:1", 1)
        state.quota.heartbeat("lives", "host:2", 1)
        number = state.quota.reserve(reservation(caller, release), "dies")
        clock.now += LOST_SECONDS - 1
        state.quota.heartbeat("lives", "host:2", 1)
        with pytest.raises(LimitExceededError, match=r"1 requests in progress \(limit 1\)"):
            state.quota.reserve(reservation(caller, release), "lives")
        clock.now += 1
        state.quota.heartbeat("lives", "host:2", 1)
        assert state.quota.servers() == [("host:2", 1)]
        state.quota.reserve(reservation(caller, release), "lives")
        assert [line.outcome for line in state.usage.lines()] == ["lost", None]
        for _ in range(2):
            state.quota.settle(number, used(1, 1))  # it was only stopped, and its answer is billed
        assert [(line.outcome, line.completion_tokens) for line in state.usage.lines()] == [("stop", 1), (None, None)]


def test_changed_limits_replaces_given_limits_only() -> None:
    limits = changed_limits(Limits(), LimitOptions(requests="60", concurrency="2"))
    assert limits == Limits(60, None, 2)
    assert changed_limits(limits, LimitOptions(requests="none", tokens="1000")) == Limits(None, 1000, 2)


@pytest.mark.parametrize("text", ["0", "-1", "", "1.5", "many", "9" * 30, "²"])
def test_invalid_limit_names_its_option(text: str) -> None:
    with pytest.raises(UserError, match="--tokens"):
        changed_limits(Limits(), LimitOptions(tokens=text))


def test_request_recorded_between_the_time_and_the_row_of_another_one_still_counts(state_url: str) -> None:
    """Two servers record at once: the later time is committed first."""
    clock = Clock()
    with State(state_url, clock=clock) as state:
        caller, _ = with_tenant(state)
        clock.now += 0.01
        state.quota.record_unmetered(caller.tenant_id)
        clock.now -= 0.01
        state.quota.record_unmetered(caller.tenant_id)
        assert state.quota.recent_requests(caller.tenant_id, 3) == 2


def test_usage_has_lines_and_totals(state_url: str, tmp_path: Path) -> None:
    clock = Clock()
    with State(state_url, clock=clock) as state:
        acme, globex = (with_tenant(state, name) for name in ("acme", "globex"))
        for caller, release, prompt, answer in ((*acme, 10, 20), (*acme, 1, 2), (*globex, 100, 200)):
            clock.now += 1
            asked = replace(reservation(caller, release), end_user="=ann")
            state.quota.settle(state.quota.reserve(asked, "g"), used(prompt, answer))
        state.quota.reserve(reservation(*globex), "g")
        sums = {(s.tenant, s.requests, s.in_flight, s.prompt_tokens, s.completion_tokens) for s in state.usage.sums()}
        assert sums == {("acme", 2, 0, 11, 22), ("globex", 2, 1, 100, 200)}
        assert state.usage.sums("acme", since=clock.now - 1)[0].requests == 1
        lines = state.usage.lines("globex")
        assert [(line.tenant, line.alias, line.outcome) for line in lines] == [
            ("globex", "courts-globex", "stop"),
            ("globex", "courts-globex", None),
        ]
        head, *rows = lines_csv(UsageLine, lines).splitlines()
        assert head.split(",") == list(UsageLine.__dataclass_fields__)
        assert rows[0].endswith(",100,200,0.01,0.02,0.03,stop,'=ann")
        assert rows[1].endswith(",,,,,,,")
