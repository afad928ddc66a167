"""Jumps of the clock: limits, expiry and write-offs survive them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from states import Clock, reservation, with_tenant

from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import LOST_SECONDS, LimitExceededError, Limits, RequestUsage
from tunewright.serving.tenants.tenants import InvalidKeyError

HOUR = 3600.0
BEAT = LOST_SECONDS / 4


class Time:
    """The clock, which jumps, and steady time, which does not."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.steady = Clock()

    def advance(self, seconds: float) -> None:
        self.clock.now += seconds
        self.steady.now += seconds

    def jump(self, seconds: float) -> None:
        self.clock.now += seconds


@contextmanager
def opened(url: str, time: Time) -> Iterator[State]:
    with State(url, clock=time.clock, steady=time.steady) as state:
        yield state


def beat(time: Time, seconds: float, *servers: Callable[[], None]) -> None:
    """Let time pass, in which these servers live."""
    for _ in range(int(seconds / BEAT) + 1):
        time.advance(BEAT)
        for server in servers:
            server()


@pytest.mark.parametrize("limits", [Limits(requests_per_minute=2), Limits(tokens_per_minute=20)])
def test_limit_locks_nobody_out_when_the_clock_moves_back(state_url: str, limits: Limits) -> None:
    time = Time()
    with opened(state_url, time) as state:
        caller, release = with_tenant(state, limits=limits)
        for _ in range(2):
            state.quota.reserve(reservation(caller, release), "g")
        time.jump(-HOUR)
        with pytest.raises(LimitExceededError) as caught:  # it does not double the limit either
            state.quota.reserve(reservation(caller, release), "g")
        assert caught.value.wait == 60
        time.advance(60)
        state.quota.reserve(reservation(caller, release), "g")


def test_expired_key_stays_expired_when_the_clock_moves_back(state_url: str) -> None:
    time = Time()
    with opened(state_url, time) as state:
        state.tenants.add("acme")
        key, _ = state.keys.create("acme", lifetime=60)
        other, _ = state.keys.create("acme", lifetime=2 * HOUR)
        time.advance(60)
        for _ in range(2):
            with pytest.raises(InvalidKeyError, match="expired"):
                state.keys.caller(key)
            state.keys.caller(other)
            time.jump(-HOUR)


def test_valid_key_is_valid_again_after_the_clock_was_ahead_for_a_while(state_url: str) -> None:
    time = Time()
    with opened(state_url, time) as state:
        state.tenants.add("acme")
        key, _ = state.keys.create("acme", lifetime=HOUR)
        time.jump(1000 * HOUR)
        with pytest.raises(InvalidKeyError, match="expired"):
            state.keys.caller(key)
        time.jump(-1000 * HOUR)
        state.keys.caller(key)


@pytest.mark.fault("clock jump", "serve")
def test_requests_of_a_living_server_are_not_lost_when_the_clock_jumps_forward(state_url: str) -> None:
    time = Time()
    with opened(state_url, time) as one, opened(state_url, time) as two:
        caller, release = with_tenant(one, limits=Limits(concurrency=1))

        def first() -> None:
            one.quota.heartbeat("first", "host:1", 1)

        def second() -> None:
            two.quota.heartbeat("second", "host:2", 1)

        beat(time, LOST_SECONDS, first, second)
        number = two.quota.reserve(reservation(caller, release), "second")
        time.jump(LOST_SECONDS + 1)
        beat(time, LOST_SECONDS, first, second)
        with pytest.raises(LimitExceededError):
            one.quota.reserve(reservation(caller, release), "first")
        two.quota.settle(number, RequestUsage(3, 4, 0.0, 0.0, 0.0, "stop"))
        (line,) = one.usage.lines()
        assert (line.outcome, line.completion_tokens) == ("stop", 4)


def test_new_server_lets_others_beat_first_after_a_jump(state_url: str) -> None:
    time = Time()
    with opened(state_url, time) as old:
        caller, release = with_tenant(old)
        beat(time, LOST_SECONDS, lambda: old.quota.heartbeat("old", "host:1", 1))
        old.quota.reserve(reservation(caller, release), "old")
        time.jump(LOST_SECONDS + 1)
        with opened(state_url, time) as new:
            new.quota.heartbeat("new", "host:2", 1)
            beat(
                time,
                LOST_SECONDS,
                lambda: old.quota.heartbeat("old", "host:1", 1),
                lambda: new.quota.heartbeat("new", "host:2", 1),
            )
            assert [line.outcome for line in new.usage.lines()] == [None]


@pytest.mark.parametrize("jump", [-HOUR, HOUR])
def test_dead_server_is_written_off_after_a_jump(state_url: str, jump: float) -> None:
    time = Time()
    with opened(state_url, time) as state:
        caller, release = with_tenant(state)
        state.quota.heartbeat("dies", "host:1", 1)
        state.quota.reserve(reservation(caller, release), "dies")
        time.jump(jump)
        beat(time, 2 * LOST_SECONDS, lambda: state.quota.heartbeat("lives", "host:2", 1))
        assert [line.outcome for line in state.usage.lines()] == ["lost"]
        assert state.quota.servers() == [("host:2", 1)]
