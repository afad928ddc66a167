"""The number of replicas that a server's load asks for, without engines or clocks: :mod:`.autoscaler` acts on it.

*More.* Users wait for the first token: in the queue, for a row, for their adapter, for the prompts of others. So there
is one target, the time to first token. It is missed while over :data:`LATE_SHARE` of the requests get theirs later. The
time that requests without a token have waited so far counts too, so that a queue is seen while it grows. If each
request has a replica for itself, another replica would not help, and the target does not count as missed.

*How many.* One more than take requests; more at once if the requests that run and wait fill the rows of more. A load of
minutes should not start them one by one.

*Fewer.* One less after a calm time in which that many would have done with half of their rows, and with half of the
target. The distance between the two conditions keeps the number from going back and forth. If it does so nevertheless,
since fewer replicas miss the target at a load that more of them find easy, each calm time is twice as long as the one
before it, up to :data:`LONGEST_CALM` times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from tunewright.core.errors import UserError
from tunewright.core.progress import duration
from tunewright.core.text import count_of
from tunewright.serving.engines.placement import FREE

LATE_SHARE = 0.1
LONGEST_CALM = 8


def largest_number(replicas: int, max_replicas: int | None) -> int:
    """Return the largest number of replicas that a server may have.

    Raises:
        UserError: it is below the smallest number.
    """
    if max_replicas is not None and max_replicas < replicas:
        raise UserError(
            f"At most {count_of(max_replicas, 'replica')}, but at least {replicas}",
            where="serve.max_replicas",
            fix=f"Set it to {replicas} or more, or lower serve.replicas.",
        )
    return max_replicas or replicas


@dataclass(frozen=True)
class Pace:
    """The times of scaling, in seconds.

    Args:
        look: between two looks at the load.
        window: the time whose first tokens count.
        late: the target must be missed for so long before replicas are added.
        calm: fewer replicas must do for so long before one is removed.
    """

    look: float = 1.0
    window: float = 30.0
    late: float = 15.0
    calm: float = 300.0


@dataclass(frozen=True)
class Demand:
    """The requests of a server.

    Args:
        running: those at the replicas now.
        waiting: those in the queue now.
        first_tokens: seconds to the first token of the requests that received theirs since the last look.
        unanswered: seconds so far of the requests without a token.
    """

    running: int = 0
    waiting: int = 0
    first_tokens: Sequence[float] = ()
    unanswered: Sequence[float] = ()

    @property
    def total(self) -> int:
        """The requests that could run now."""
        return self.running + self.waiting


@dataclass(frozen=True)
class Capacity:
    """The replicas of a server.

    Args:
        up: those that take requests.
        present: those too that are starting or restarting; without those that are being removed.
        rows: requests that one of them computes at once.
    """

    up: int
    present: int
    rows: int


@dataclass(frozen=True)
class Decision:
    """The number of replicas that there should be, and the reason if it is another one than there are."""

    wanted: int
    reason: str = ""


@dataclass(frozen=True)
class _Look:
    """The first tokens that came between two looks."""

    at: float
    all: int
    late: int
    slow: int
    """Later than half of the target."""


class ScalingPolicy:
    """Decides how many replicas there should be.

    Args:
        smallest, largest: limits of the number.
        target: the time to first token, in seconds.
    """

    def __init__(self, smallest: int, largest: int, target: float, pace: Pace | None = None) -> None:
        assert 1 <= smallest <= largest
        self._smallest = smallest
        self._largest = largest
        self._target = target
        self.pace = pace or Pace()
        self._looks: deque[_Look] = deque()
        self._up = 0
        self._late_since: float | None = None
        self._calm_since: float | None = None
        self._peak = 0
        """Most requests at once since the calm began."""
        self._patience = 1
        """Factor of the calm time."""
        self._removed_at: float | None = None

    def decide(self, demand: Demand, capacity: Capacity, now: float) -> Decision:
        """Return the wanted number of replicas; to be called at each look.

        Args:
            now: seconds that never go back.
        """
        if capacity.up > self._up:  # what requests waited for before says nothing about the larger number
            self._looks.clear()
            self._late_since = None
        self._up = capacity.up
        self._note(demand, now)
        late, slow, seen = self._counts(demand)
        missed = late > LATE_SHARE * seen and demand.total > capacity.up
        if not missed:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = now
        if self._late_since is not None and now - self._late_since >= self.pace.late:
            needed = max(capacity.up + 1, ceil(demand.total / capacity.rows))
            wanted = max(capacity.present, min(self._largest, needed))
            if wanted > capacity.present:
                self._raised(now)
                return Decision(wanted, self._why_more(demand, capacity, late, seen))
        if capacity.present < self._smallest:
            return Decision(self._smallest, f"at least {self._smallest} are configured")
        if self._is_calm(demand, capacity, slow > LATE_SHARE * seen, now):
            reason = self._why_fewer(capacity)
            self._calm_since, self._removed_at = None, now
            return Decision(capacity.present - 1, reason)
        return Decision(min(capacity.present, self._largest))

    @property
    def _calm_time(self) -> float:
        return self._patience * self.pace.calm

    def _note(self, demand: Demand, now: float) -> None:
        times = demand.first_tokens
        late, slow = (sum(time > limit for time in times) for limit in (self._target, self._target / 2))
        self._looks.append(_Look(now, len(times), late, slow))
        while self._looks[0].at <= now - self.pace.window:
            self._looks.popleft()

    def _counts(self, demand: Demand) -> tuple[int, int, int]:
        """Return the numbers of late and of slow requests, and of those too that are known to be neither."""
        late = sum(time > self._target for time in demand.unanswered)
        slow = sum(time > self._target / 2 for time in demand.unanswered)
        seen = sum(look.all for look in self._looks)
        return (
            late + sum(look.late for look in self._looks),
            slow + sum(look.slow for look in self._looks),
            seen + slow,
        )

    def _is_calm(self, demand: Demand, capacity: Capacity, slow: bool, now: float) -> bool:
        """Return whether one replica less would have done for the calm time."""
        fewer = capacity.present - 1
        enough = demand.total <= FREE * fewer * capacity.rows and (demand.total <= fewer or not slow)
        if fewer < self._smallest or not enough:
            self._calm_since = None
            return False
        if self._calm_since is None:
            self._calm_since, self._peak = now, 0
        self._peak = max(self._peak, demand.total)
        # One that is starting is not stopped halfway.
        return capacity.up == capacity.present and now - self._calm_since >= self._calm_time

    def _raised(self, now: float) -> None:
        """Have more patience if the last removal lasted no longer than the calm before it."""
        if self._removed_at is not None:
            again = now - self._removed_at < self._calm_time
            self._patience = min(LONGEST_CALM, 2 * self._patience) if again else 1
        self._removed_at = None

    def _why_more(self, demand: Demand, capacity: Capacity, late: int, seen: int) -> str:
        return (
            f"{late} of {count_of(seen, 'request')} in {duration(self.pace.window)} had no token after "
            f"{self._target:g} s; {demand.running} run and {demand.waiting} wait on {count_of(capacity.up, 'replica')}"
        )

    def _why_fewer(self, capacity: Capacity) -> str:
        rows = (capacity.present - 1) * capacity.rows
        return (
            f"{count_of(self._peak, 'request')} at most at one time in {duration(self._calm_time)}; "
            f"{count_of(capacity.present - 1, 'replica')} would have {rows} rows"
        )
