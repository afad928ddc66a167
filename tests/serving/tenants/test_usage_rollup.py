"""Rolling requests up: totals stay the same from any day on, and nothing else changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from states import DIGESTS, SHIP, Clock, reservation, with_tenant

from making.property_examples import examples
from tunewright.core.errors import UserError
from tunewright.serving.tenants import State
from tunewright.serving.tenants.feedback import Feedback, FeedbackValues
from tunewright.serving.tenants.quota import LimitExceededError, Limits, RequestUsage
from tunewright.serving.tenants.releases import Candidate, Release
from tunewright.serving.tenants.tenants import Caller

DAY = 86_400


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.now = 20_000.0 * DAY + 100
    return clock


def used(prompt: int = 7, answer: int = 3, first: float | None = 0.5) -> RequestUsage:
    return RequestUsage(prompt, answer, 0.1, first, 1.0, "stop")


def usage(state: State, **how: Any) -> list[Any]:
    return [asdict(each) for each in state.usage.sums(**how)]


def test_roll_up_keeps_totals_and_deletes_lines(state_url: str, clock: Clock) -> None:
    with State(state_url, "ann", clock) as state:
        (acme, courts), (globex, recipes) = with_tenant(state, "acme"), with_tenant(state, "globex")
        for day in range(4):
            for caller, release in ((acme, courts), (globex, recipes), (acme, courts)):
                number = state.quota.reserve(reservation(caller, release), "g")
                state.quota.settle(number, used(prompt=day + 1, first=None if day == 1 else 0.25 * (day + 1)))
                clock.now += 60
            clock.now += DAY - 180
        begins = [None, *(DAY * (20_000 + day) for day in range(6))]
        asked: list[dict[str, Any]] = [{"tenant": name, "since": since} for name in (None, "acme") for since in begins]
        before = [usage(state, **how) for how in asked]
        (key,) = state.keys.list("acme")
        pruned = state.usage_rollup.roll_up(DAY * 20_002.0)
        assert (pruned.days, pruned.requests, pruned.shadow_answers) == (2, 6, 0)
        assert [usage(state, **how) for how in asked] == before
        assert len(state.usage.lines()) == 6
        assert state.usage.rolled_up_until() == DAY * 20_002
        assert state.usage_rollup.roll_up(DAY * 20_002.0).requests == 0
        assert state.usage_rollup.roll_up(DAY * 20_004.0).requests == 6
        assert state.usage.lines() == []
        assert [usage(state, **how) for how in asked] == before
        assert state.keys.list("acme") == [key], "it was last used when it was"
        with pytest.raises(UserError, match="were rolled up into one total"):
            state.usage.sums(since=DAY * 20_001 + 1.0)
        message = [line.subject for line in state.audit.lines() if line.action == "usage.rollup"]
        assert message == ["2024-10-04", "2024-10-05", "2024-10-06", "2024-10-07"]
        assert state.verify().faults == ()


def test_roll_up_keeps_unfinished_and_recent_requests(state_url: str, clock: Clock) -> None:
    clock.now = 20_001.0 * DAY - 30
    with State(state_url, "ann", clock) as state:
        caller, release = with_tenant(state, limits=Limits(requests_per_minute=2))
        state.quota.settle(state.quota.reserve(reservation(caller, release), "g"), used())
        open_one = state.quota.reserve(reservation(caller, release), "g")
        clock.now = 20_001.0 * DAY + 10
        assert state.usage_rollup.roll_up(DAY * 20_001.0).requests == 0
        with pytest.raises(LimitExceededError):
            state.quota.reserve(reservation(caller, release), "g")
        clock.now += 7200
        assert state.usage_rollup.roll_up(DAY * 20_001.0).requests == 1
        state.quota.settle(open_one, used(prompt=100))
        assert usage(state)[0]["prompt_tokens"] == 107
        assert state.usage_rollup.roll_up(DAY * 20_001.0).requests == 1
        (both,) = usage(state)
        assert (both["requests"], both["prompt_tokens"], both["mean_first_token_s"]) == (2, 107, 0.5)


def test_roll_up_deletes_and_counts_shadow_answers(state_url: str, clock: Clock) -> None:
    with State(state_url, "ann", clock) as state:
        caller, _ = with_tenant(state)
        release = state.releases.start_candidate("courts-acme", Candidate("courts-2", DIGESTS["b"], None), SHIP)
        for place in range(2):
            number = state.quota.reserve(replace(reservation(caller, release), response_id=f"{place}"), "g")
            state.quota.settle(number, used())
            state.quota.record_shadow(number, release.id, "a", "b", None)
            clock.now += DAY
        assert state.usage_rollup.roll_up(DAY * 20_001.0).shadow_answers == 1
        assert len(state.usage.shadow_lines("courts-acme")) == 1


def test_roll_up_deletes_and_counts_feedback(state_url: str, clock: Clock) -> None:
    with State(state_url, "ann", clock) as state:
        caller, release = with_tenant(state)
        up = FeedbackValues("up", None, None, None)
        for response_id in ("chatcmpl-1", "chatcmpl-2"):
            number = state.quota.reserve(replace(reservation(caller, release), response_id=response_id), "g")
            state.quota.settle(number, used())
            assert state.feedback.record(caller.tenant_id, response_id, up) == "recorded"
            clock.now += DAY
        pruned = state.usage_rollup.roll_up(DAY * 20_001.0)
        assert (pruned.days, pruned.requests, pruned.feedback) == (1, 1, 1)
        assert [line.response_id for line in state.feedback.lines()] == ["chatcmpl-2"]
        assert state.feedback.record(caller.tenant_id, "chatcmpl-1", up) is None
        assert state.verify().faults == ()


def test_same_feedback_sent_to_two_servers_is_recorded_once(state_url: str) -> None:
    with State(state_url) as state, State(state_url) as other, ThreadPoolExecutor(8) as threads:
        caller, release = with_tenant(state)
        up = FeedbackValues("up", None, None, None)
        for place in range(20):
            response_id = f"chatcmpl-{place}"
            state.quota.reserve(replace(reservation(caller, release), response_id=response_id), "g")
            record = partial(Feedback.record, tenant_id=caller.tenant_id, response_id=response_id, values=up)
            statuses = list(threads.map(record, [state.feedback, other.feedback] * 4))
            assert sorted(str(status) for status in statuses) == ["recorded", *["unchanged"] * 7]


def test_shadow_units_count_answers_of_the_newest_shadow_by_end_user(state_url: str, clock: Clock) -> None:
    with State(state_url, "ann", clock) as state:
        caller, _ = with_tenant(state)
        other, _ = with_tenant(state, "globex")

        ids = count()

        def ask(by: Caller, release: Release, end_user: str | None, answer: str | None) -> None:
            named = replace(reservation(by, release), end_user=end_user, response_id=f"{next(ids)}")
            number = state.quota.reserve(named, "g")
            state.quota.settle(number, used())
            state.quota.record_shadow(number, release.id, "a", answer, None if answer else "the server stopped")

        assert state.usage.shadow_units("courts-acme") == []
        former = state.releases.start_candidate("courts-acme", Candidate("courts-2", DIGESTS["b"], None), SHIP)
        ask(caller, former, "eve", "b")
        assert state.usage.shadow_units("courts-acme") == [(1, 1)]
        newer = state.releases.start_candidate("courts-acme", Candidate("courts-3", DIGESTS["c"], None), SHIP)
        ask(caller, newer, "eve", None)
        assert state.usage.shadow_units("courts-acme") == [(1, 1)], "the newest that answered"
        for by, end_user, answer in (
            (caller, "eve", "b"),
            (other, "eve", "a"),
            (caller, None, "b"),
            (caller, "eve", "a"),
            (caller, None, "a"),
        ):
            ask(by, newer, end_user, answer)
        assert state.usage.shadow_units("courts-acme") == [(2, 1), (1, 0), (1, 1), (1, 0)]
        assert state.usage.shadow_units("courts-globex") == []


@pytest.mark.parametrize("before", [DAY * 20_000 + 1.0, DAY * 20_001.0])
def test_roll_up_refuses_a_time_within_a_day_or_in_the_future(state_url: str, clock: Clock, before: float) -> None:
    with (
        State(state_url, "ann", clock) as state,
        pytest.raises(UserError, match=r"not the beginning of a day|in the future"),
    ):
        state.usage_rollup.roll_up(before)


@examples(20)
@given(st.lists(st.tuples(st.integers(0, 3 * DAY), st.integers(0, 50)), max_size=12), st.lists(st.integers(0, 4)))
def test_totals_equal_those_of_all_lines_however_often_days_are_rolled_up(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[int, int]], days: list[int]
) -> None:
    clock = Clock()
    folder: Path = tmp_path_factory.mktemp("state")
    with State(f"sqlite:///{folder}/state.sqlite", "ann", clock) as state:
        caller, release = with_tenant(state)
        for at, tokens in sorted(asked):
            clock.now = 20_000.0 * DAY + at
            state.quota.settle(state.quota.reserve(reservation(caller, release), "g"), used(prompt=tokens))
        clock.now = 20_010.0 * DAY
        for day in days:
            state.usage_rollup.roll_up(DAY * (20_000.0 + day))
            for begin in range(4):
                rest = [tokens for at, tokens in asked if at >= begin * DAY]
                found = usage(state, since=DAY * (20_000.0 + begin))
                assert [(each["requests"], each["prompt_tokens"]) for each in found] == [(len(rest), sum(rest))][
                    : len(rest)
                ]
