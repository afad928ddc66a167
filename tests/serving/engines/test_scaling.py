"""The wanted number of replicas: single decisions, and a simulated server whose load goes up and down."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypothesis_settings import examples
from tunewright.core.errors import UserError
from tunewright.serving.engines.scaling import (
    LONGEST_CALM,
    Capacity,
    Decision,
    Demand,
    Pace,
    ScalingPolicy,
    largest_number,
)

PACE = Pace()
ROWS = 8
QUEUE = Demand(running=8, waiting=4, unanswered=[3.0] * 4)
"""More requests than one replica has rows for, and those that wait do so for longer than the target."""


def policy(largest: int = 4, smallest: int = 1) -> ScalingPolicy:
    return ScalingPolicy(smallest, largest, target=2.0)


def capacity(up: int, starting: int = 0) -> Capacity:
    return Capacity(up, up + starting, ROWS)


def looks(policy: ScalingPolicy, demand: Demand, at: Capacity, seconds: float, start: float = 0.0) -> list[Decision]:
    """The decisions of one look a second."""
    return [policy.decide(demand, at, start + second) for second in range(int(seconds) + 1)]


def test_replica_is_added_once_the_target_has_been_missed_for_a_while() -> None:
    *before, last = looks(policy(), QUEUE, capacity(1), PACE.late)
    assert {decision.wanted for decision in before} == {1}
    assert last == Decision(2, "4 of 4 requests in 30 seconds had no token after 2 s; 8 run and 4 wait on 1 replica")


def test_moment_in_which_the_target_holds_begins_the_wait_again() -> None:
    scaling = policy()
    for second in range(60):
        demand = Demand(8, 4) if second % 10 == 9 else QUEUE
        assert scaling.decide(demand, capacity(1), second).wanted == 1


def test_late_first_tokens_count_without_a_queue() -> None:
    slow = Demand(running=6, first_tokens=[1.0] * 8 + [2.5])
    assert looks(policy(), slow, capacity(1), PACE.late)[-1].wanted == 2
    on_time = Demand(running=6, first_tokens=[1.0] * 10 + [2.5])
    assert looks(policy(), on_time, capacity(1), PACE.late)[-1].wanted == 1


def test_requests_with_a_replica_each_ask_for_no_further_one_however_late_they_are() -> None:
    alone = Demand(running=2, unanswered=[30.0, 30.0], first_tokens=[20.0])
    assert {decision.wanted for decision in looks(policy(), alone, capacity(2), 200)} == {2}


def test_several_are_added_at_once_for_a_queue_that_fills_their_rows_and_no_more_than_allowed() -> None:
    for waiting, wanted in ((1, 2), (16, 3), (1000, 4)):
        queue = Demand(ROWS, waiting, unanswered=[3.0] * waiting)
        assert looks(policy(), queue, capacity(1), PACE.late)[-1].wanted == wanted
    assert looks(policy(), QUEUE, capacity(4), 600)[-1] == Decision(4)


def test_start_in_progress_is_waited_for_unless_the_queue_asks_for_more() -> None:
    scaling = policy()
    assert {decision.wanted for decision in looks(scaling, QUEUE, capacity(1, starting=1), 300)} == {2}
    longer = Demand(ROWS, 2 * ROWS, unanswered=[3.0] * 2 * ROWS)
    assert scaling.decide(longer, capacity(1, starting=1), 301).wanted == 3


def test_first_tokens_from_before_a_replica_was_added_count_no_longer() -> None:
    scaling = policy()
    looks(scaling, Demand(running=6, first_tokens=[5.0] * 20), capacity(1), PACE.late)
    after = looks(scaling, Demand(running=6, first_tokens=[0.5]), capacity(2), PACE.window, start=20)
    assert {decision.wanted for decision in after} == {2}


def test_replica_is_removed_after_a_calm_time_in_which_fewer_would_have_done() -> None:
    calm = Demand(running=4, first_tokens=[0.5])
    *before, last = looks(policy(), calm, capacity(2), PACE.calm)
    assert {decision.wanted for decision in before} == {2}
    assert last == Decision(1, "4 requests at most at one time in 5 minutes; 1 replica would have 8 rows")
    assert looks(policy(smallest=2), calm, capacity(2), 2 * PACE.calm)[-1] == Decision(2)


@pytest.mark.parametrize(
    "busy", [Demand(running=5, first_tokens=[0.5]), Demand(running=3, first_tokens=[1.5])], ids=["rows", "time"]
)
def test_replica_stays_if_fewer_would_be_over_half_full_or_half_late(busy: Demand) -> None:
    scaling = policy()
    for second in range(int(10 * PACE.calm)):
        demand = busy if second % 200 == 0 else Demand()
        assert scaling.decide(demand, capacity(2), second).wanted == 2


def test_number_below_the_smallest_is_filled_up() -> None:
    assert policy(smallest=2).decide(Demand(), capacity(1), 0.0) == Decision(2, "at least 2 are configured")


@pytest.mark.parametrize(("replicas", "largest", "expected"), [(2, None, 2), (1, 4, 4), (3, 3, 3)])
def test_largest_number_is_the_fixed_one_or_the_configured_one(
    replicas: int, largest: int | None, expected: int
) -> None:
    assert largest_number(replicas, largest) == expected


def test_largest_number_below_the_smallest_is_refused() -> None:
    with pytest.raises(UserError, match=r"serve\.max_replicas: At most 2 replicas, but at least 3"):
        largest_number(3, 2)


@dataclass
class Simulation:
    """A server: requests wait in one queue for a row, and run for some seconds.

    Args:
        rate: requests a second, given the time.
        first: seconds from a row to the first token, given the requests of one replica.
        service: seconds in a row.
        starting: seconds that a replica takes to start.
    """

    rate: Callable[[float], float]
    first: Callable[[float], float] = lambda _load: 0.2
    service: float = 4.0
    starting: float = 90.0
    scaling: ScalingPolicy = field(default_factory=policy)
    numbers: list[int] = field(default_factory=list)
    """The number of replicas that take requests, at each second."""
    waits: list[tuple[float, float]] = field(default_factory=list)
    """The time of each first token, with the time to it."""

    def run(self, seconds: int) -> None:
        up, due = 1, 0.0
        ready: list[float] = []
        queue: deque[float] = deque()
        running: list[tuple[float, float, float]] = []  # arrival, first token, end
        for now in range(seconds):
            up += sum(at <= now for at in ready)
            ready = [at for at in ready if at > now]
            due += self.rate(now)
            queue.extend([float(now)] * int(due))
            due -= int(due)
            firsts = [first - arrived for arrived, first, _ in running if now - 1 < first <= now]
            self.waits += [(now, wait) for wait in firsts]
            running = [each for each in running if each[2] > now]
            while queue and queue[0] < now - 60:  # gateway.queue_timeout_s
                queue.popleft()
            while queue and len(running) < up * ROWS:
                first = now + self.first((len(running) + 1) / up)
                running.append((queue.popleft(), first, first + self.service))
            unanswered = [now - at for at in (*queue, *(each[0] for each in running if each[1] > now))]
            demand = Demand(len(running), len(queue), firsts, unanswered)
            wanted = self.scaling.decide(demand, Capacity(up, up + len(ready), ROWS), now).wanted
            ready += [now + self.starting] * (wanted - up - len(ready))
            up = min(up, wanted)
            self.numbers.append(up)

    @property
    def changes(self) -> list[int]:
        return [after - before for before, after in pairwise(self.numbers) if after != before]


def test_number_follows_a_load_that_goes_up_and_down_and_never_turns_back() -> None:
    """Two rows are busy at first, then 25 for an hour, which three replicas have not, and then two again."""
    simulation = Simulation(lambda at: 5.0 if 600 <= at < 4200 else 0.5)
    simulation.run(9000)
    numbers = simulation.numbers
    assert set(numbers[:600]) == {1}
    assert set(numbers[900:4200]) == {4}
    assert numbers[-1] == 1
    assert [change > 0 for change in simulation.changes] == sorted([change > 0 for change in simulation.changes])[::-1]
    late = [wait > 2.0 for at, wait in simulation.waits if at >= 1500]
    assert len(late) > 5 * 2700
    assert not any(late)


def test_burst_of_seconds_starts_nothing() -> None:
    simulation = Simulation(lambda at: 5.0 if at % 600 < 4 else 0.1)
    simulation.run(3600)
    assert max(wait for _, wait in simulation.waits) > 2.0
    assert set(simulation.numbers) == {1}


def test_waves_of_minutes_keep_the_number_between_them() -> None:
    simulation = Simulation(lambda at: 3.0 if at % 400 < 200 else 0.5)
    simulation.run(4 * 3600)
    assert len(simulation.changes) == 1


def test_calm_time_doubles_while_each_removal_is_regretted() -> None:
    """One replica is always late, and two are always at ease."""
    scaling, up, removed = policy(), 2, []
    for second in range(4 * 3600):
        wanted = scaling.decide(QUEUE if up == 1 else Demand(running=2), capacity(up), second).wanted
        removed += [second] if wanted < up else []
        up = wanted
    gaps = [(after - before) / PACE.calm for before, after in pairwise(removed)]
    assert [round(gap) for gap in gaps[:4]] == [2, 4, LONGEST_CALM, LONGEST_CALM]


@given(rate=st.floats(0.1, 6.0), steepness=st.floats(0.0, 0.2))
@examples(8)
def test_constant_load_rarely_changes_the_number(rate: float, steepness: float) -> None:
    """Even where one replica less is late, and the present ones find the load easy."""
    simulation = Simulation(lambda _at: rate, lambda load: 0.2 + steepness * load**2)
    simulation.run(3 * 3600)
    later = simulation.numbers[3600:]
    changes = sum(before != after for before, after in pairwise(later))
    # At the longest calm time, one is removed and added again.
    assert changes <= 2 * (1 + 2 * 3600 / (LONGEST_CALM * PACE.calm))
