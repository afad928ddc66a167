"""Simulate a quiet tenant alongside a busy one: with the rule of pairs, without it, and with the engine's former rule.

    python benchmarks/fair_simulated.py

The scheduler is the real one, with a clock that only passes move. A pass takes 38 ms plus 0.5 ms a row; a prefill pass
takes 35 ms plus 0.45 ms a token, as one adapter's do on two cores. Both tenants ask at random moments, the quiet one
for a fifth of the capacity, the loud one for ten times as much. The result depends on no machine. Prints a table.
"""

from __future__ import annotations

import random
from collections import Counter, deque

import numpy as np
from rich.console import Console
from rich.table import Table

from tunewright.serving.gateway.fair_scheduler import HELD_PASSES, FairScheduler, Ticket

ROWS = 16
QUIET, LOUD = 2.4, 24.0  # requests a second with answers of 16 tokens
SECONDS = 400.0
SIDES = ("in the engine (before)", "none", "in the scheduler")


class WithoutPairs(FairScheduler):
    """The scheduler without the rule of pairs."""

    def _hold(self, tenant: str, active: int) -> bool:  # noqa: ARG002
        return False


class FormerHold:
    """The rule as the engine had it: newcomers to a nearly full batch wait up to two passes."""

    def __init__(self) -> None:
        self._held = 0

    def holds(self, submitted: deque[Ticket], running: list[Ticket]) -> bool:
        """Return whether this pass prefills nothing, though rows are free."""
        free, rows = ROWS - len(running), Counter(ticket.tenant for ticket in running)
        can_wait = bool(submitted) and 0 < free < ROWS // 4
        few = free < min(ROWS // 8, len(submitted))
        can_wait = can_wait and (few or all(rows[one.tenant] > len(running) / len(rows) for one in submitted))
        self._held = self._held + 1 if can_wait and self._held < HELD_PASSES else 0
        return self._held > 0


def simulate(side: str, prompt: int, answer: int) -> tuple[float, int, list[float]]:
    """Return requests a second, prefill passes, and the seconds of each quiet answer."""
    now = [0.0]
    scheduler = (FairScheduler if side == "in the scheduler" else WithoutPairs)(ROWS, lambda: now[0])
    former = FormerHold() if side == SIDES[0] else None
    draw = random.Random(0)
    due: list[tuple[float, str]] = []
    for tenant, rate in (("quiet", QUIET), ("loud", LOUD)):
        at = 0.0
        while at < SECONDS:
            at += draw.expovariate(rate * 16 / answer)
            due.append((at, tenant))
    arrivals = deque(sorted(due))
    asked: dict[Ticket, float] = {}
    left: dict[Ticket, int] = {}
    submitted: deque[Ticket] = deque()
    running: list[Ticket] = []
    waits, done, prefills = list[float](), 0, 0
    while now[0] < SECONDS:
        while arrivals and arrivals[0][0] <= now[0]:
            at, tenant = arrivals.popleft()
            ticket = scheduler.enqueue(tenant, prompt)
            asked[ticket], left[ticket] = at, answer
        submitted += scheduler.admit()
        if not running and not submitted:
            now[0] = arrivals[0][0]
            continue
        held = former is not None and former.holds(submitted, running)
        new = [] if held else [submitted.popleft() for _ in range(min(ROWS - len(running), len(submitted)))]
        if new:
            prefills += 1
            now[0] += 0.035 + 0.00045 * prompt * len(new)
        running += new
        now[0] += 0.038 + 0.0005 * len(running)
        for ticket in list(running):
            tokens = 2 if ticket in new else 1  # a prefill pass gives the first one
            scheduler.finish_prefill(ticket)
            scheduler.charge(ticket.tenant, answer=tokens)
            left[ticket] -= tokens
            if left[ticket] <= 0:
                running.remove(ticket)
                scheduler.release(ticket)
                done += 1
                if ticket.tenant == "quiet":
                    waits.append(now[0] - asked[ticket])
    return done / now[0], prefills, waits


def main() -> None:
    """Print the sides for some lengths."""
    table = Table("prompt", "answer", "rule of pairs", "requests/s", "prefill passes", "quiet p50", "p99")
    for prompt, answer in ((44, 16), (20, 16), (100, 16), (44, 64)):
        for side in SIDES:
            rate, prefills, waits = simulate(side, prompt, answer)
            shown = (f"{float(np.percentile(waits, p)):.2f} s" for p in (50, 99))
            table.add_row(str(prompt), str(answer), side, f"{rate:.2f}", f"{prefills:,}", *shown)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
