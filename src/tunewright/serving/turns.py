"""Whose request goes to the engine next, and how much of the engine one tenant may have while others are about.

Three rules, each for one way in which a loud tenant slows a quiet one down:

*Order.* Of those that wait, the tenant that was served least is next, counted in tokens: Sheng et al. 2024, "Fairness
in Serving Large Language Models" (OSDI, arXiv 2401.00588), algorithm 2. Two tenants that both always wait differ by a
constant at most, however much more one of them asks for. Who comes back after a pause is lifted to a burst below the
lowest counter of those that wait: idling saves up no more than that. (In the paper it saves up nothing; but then a
tenant that asks for little takes turns with one that always waits, when it should go first.)

*Rows.* A row of the engine's batch is kept to an answer's end. So an eighth of them is only for tenants that have less
than an equal share, and a newcomer does not wait for somebody's answer to end.

*Reading.* Prompts are read in passes, and everybody under way waits for each. So each tenant's prompts are handed over
for a pass at a time (the token budget of Agrawal et al. 2024, Sarathi-Serve, OSDI, arXiv 2403.02310). It is each
tenant's own: who asks little does not wait until the others' prompts have been read. A longer prompt is read in pieces
by the engine, and beside the short ones: one of them at a time, over all.

There are some more places than rows: when an answer ends, the next request is at the engine already, and the row does
not stay empty for the pass in which it would be sent there. Whoever is there is answered in the order of coming.

The last two rules cost throughput, and a tenant alone is not held to them. It has company while another one has
something here, or had it within the last minute.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

PROMPT_WEIGHT = 1.0
ANSWER_WEIGHT = 2.0
"""A token of an answer is a pass of its own, one of a prompt shares it: the paper's weights."""
READING_TOKENS = 128
"""Tokens of one tenant's prompts that are read at once in company, and of the longest prompt that counts as short."""
KEPT_PART = 8
"""Such a part of the rows is kept for who has few."""
AHEAD_PART = 4
"""Such a part of the rows as many requests may be at the engine before there is a row for them."""
BURST_TOKENS = 1000.0
"""What a tenant that comes back may have been served less than those that wait, in weighted tokens."""
COMPANY_SECONDS = 60.0
"""How long a tenant keeps its share after its last answer has ended."""


@dataclass(eq=False)
class Turn:
    """One request's way through the engine: it waits, has a place, has had its prompt read, is gone."""

    tenant: str
    prompt: int
    """Tokens."""
    inside: bool = False
    reading: bool = False

    @property
    def short(self) -> bool:
        """True if its prompt is read together with others."""
        return self.prompt <= READING_TOKENS


class Turns:
    """Places at the engine, given to tenants in turn. It only decides: nothing in it waits.

    Args:
        rows: requests that the engine answers at once.
        clock: seconds that never go back.
    """

    def __init__(self, rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        assert rows >= 1
        self._rows = rows
        self._ahead = rows // AHEAD_PART
        self._clock = clock
        self._waiting: dict[str, deque[Turn]] = {}
        self._inside: Counter[str] = Counter()
        self._reading: set[Turn] = set()
        self._served: dict[str, float] = defaultdict(float)
        self._gone: dict[str, float] = {}  # when whoever has nothing here any more had its last answer
        self._left_last: str | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return sum(map(len, self._waiting.values()))

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return self._rows + self._ahead - self._inside.total()

    @property
    def idle(self) -> bool:
        """True if nobody is here."""
        return not self._waiting and not self._inside

    def ask(self, tenant: str, prompt: int) -> Turn:
        """Queue a request whose prompt has so many tokens."""
        if tenant not in self._waiting:
            self._served[tenant] = max(self._served[tenant], self._floor() - BURST_TOKENS)
            self._waiting[tenant] = deque()
        self._gone.pop(tenant, None)
        turn = Turn(tenant, prompt)
        self._waiting[tenant].append(turn)
        return turn

    def let_in(self) -> list[Turn]:
        """Who has a place from now on; call it after every change."""
        entered = []
        while (turn := self._next()) is not None:
            self._stop_waiting(turn)
            turn.inside = turn.reading = True
            self._inside[turn.tenant] += 1
            self._reading.add(turn)
            self.charge(turn.tenant, prompt=turn.prompt)
            entered.append(turn)
        return entered

    def has_read(self, turn: Turn) -> None:
        """The engine has read the prompt; to say so more than once changes nothing."""
        if turn.reading:
            turn.reading = False
            self._reading.remove(turn)

    def leave(self, turn: Turn) -> None:
        """Give up the place, or the wait for it."""
        if turn.inside:
            self.has_read(turn)
            turn.inside = False
            self._inside[turn.tenant] -= 1
        else:
            self._stop_waiting(turn)
        if not self._inside[turn.tenant]:
            del self._inside[turn.tenant]
            if turn.tenant not in self._waiting:
                self._gone[turn.tenant] = self._clock()

    def charge(self, tenant: str, *, prompt: int = 0, answer: int = 0) -> None:
        """Count tokens that a tenant was served."""
        self._served[tenant] += PROMPT_WEIGHT * prompt + ANSWER_WEIGHT * answer

    def _next(self) -> Turn | None:
        if not self._waiting or not self.free:
            return None
        about = self._about()
        # Of equals, the one that has less now; of those, the one whose oldest request came first: dicts keep order.
        for tenant in sorted(self._waiting, key=lambda name: (self._served[name], self._inside[name])):
            turn = self._waiting[tenant][0]
            if about == 1:
                return turn
            if self._inside[tenant] < self._rows // about or self._inside[tenant] == 0 or self.free > self._kept:
                if turn.short:
                    own = sum(one.prompt for one in self._reading if one.short and one.tenant == tenant)
                    if own + turn.prompt <= READING_TOKENS:
                        return turn
                elif all(one.short for one in self._reading):
                    return turn
        return None

    @property
    def _kept(self) -> int:
        """Places for tenants that have less than an equal share: some rows, and all places before there is a row."""
        return self._ahead + max(self._rows // KEPT_PART, min(1, self._rows - 1))

    def _about(self) -> int:
        """Tenants that have something here, or had it lately."""
        since = self._clock() - COMPANY_SECONDS
        while self._gone and next(iter(self._gone.values())) < since:
            del self._gone[next(iter(self._gone))]
        return len(self._waiting.keys() | self._inside.keys() | self._gone.keys())

    def _floor(self) -> float:
        """Return what a newcomer's counter is lifted to."""
        if self._waiting:
            return min(self._served[tenant] for tenant in self._waiting)
        return self._served[self._left_last] if self._left_last is not None else 0.0

    def _stop_waiting(self, turn: Turn) -> None:
        self._waiting[turn.tenant].remove(turn)
        if not self._waiting[turn.tenant]:
            del self._waiting[turn.tenant]
            self._left_last = turn.tenant
