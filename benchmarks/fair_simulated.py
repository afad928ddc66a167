"""Simulate a quiet tenant alongside a busy one, and many tenants against one.

    python benchmarks/fair_simulated.py

The scheduler is the real one, with a clock that only passes move. A pass takes 38 ms plus 0.5 ms a row; a prefill pass
takes 35 ms plus 0.45 ms a token, as one adapter's do on two cores. The results depend on no machine. Prints two tables:

    a quiet tenant      with the rule of pairs, without it, and with the engine's former rule. Both tenants ask at
                        random moments, the quiet one for a fifth of the capacity, the loud one once or ten times that
    many tenants        192 requests of 32 tenants (Zipf) against one tenant's: what the scheduler's rules cost, what
                        passes of several adapters add, and what copies to slots add (`generation/batched_lora.py`)
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
from arrivals import burst, zipf_shares
from rich.console import Console
from rich.table import Table

from tunewright.generation.batched_lora import AdapterSlots
from tunewright.serving.gateway.fair_scheduler import HELD_PASSES, FairScheduler, Ticket

ROWS = 16
QUIET = 2.4  # requests a second with answers of 16 tokens
SECONDS = 400.0
ADAPTER_S = 0.00067
"""What a pass takes longer for each further adapter (`adapter_passes.py`)."""
COPY_S = 0.005
"""The copy of an adapter to its slot."""
SLOTS = 52
"""Adapters of the demo that fit into the slots' memory."""
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


def simulate(side: str, prompt: int, answer: int, times: int) -> tuple[float, int, list[float], list[float]]:
    """Return requests a second, prefill passes, and the seconds to each quiet answer's first token and end.

    Args:
        times: the loud tenant's requests for each of the quiet one.
    """
    now = [0.0]
    scheduler = (FairScheduler if side == "in the scheduler" else WithoutPairs)(ROWS, lambda: now[0])
    former = FormerHold() if side == SIDES[0] else None
    draw = random.Random(0)
    due: list[tuple[float, str]] = []
    for tenant, rate in (("quiet", QUIET), ("loud", times * QUIET)):
        at = 0.0
        while at < SECONDS:
            at += draw.expovariate(rate * 16 / answer)
            due.append((at, tenant))
    arrivals = deque(sorted(due))
    asked: dict[Ticket, float] = {}
    left: dict[Ticket, int] = {}
    submitted: deque[Ticket] = deque()
    running: list[Ticket] = []
    first, waits, done, prefills = list[float](), list[float](), 0, 0
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
            first += [now[0] - asked[ticket] for ticket in new if ticket.tenant == "quiet"]
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
    return done / now[0], prefills, first, waits


def simulate_many(tenants: int, seed: int, *, adapter_s: float, copy_s: float) -> tuple[float, float, int]:
    """Return requests a second, busy rows of a pass on average, and copies to slots.

    Args:
        adapter_s, copy_s: seconds for each further adapter of a pass, and for each copy. An idle slot takes as long
            as one in use, since the product is over all of them.
    """
    now = [0.0]
    scheduler, slots = FairScheduler(ROWS, lambda: now[0]), AdapterSlots()
    asks = deque(burst(192, zipf_shares(tenants, 1.0), seed, 20.0))
    requests, done, passes, rows, copies = len(asks), 0, 0, 0, 0
    in_slots: Sequence[str | None] = ()
    left: dict[Ticket, int] = {}
    submitted: deque[Ticket] = deque()
    running: list[Ticket] = []
    while done < requests:
        while asks and asks[0].at <= now[0]:
            left[scheduler.enqueue(f"{asks.popleft().tenant}", 44)] = 16
        submitted += scheduler.admit()
        if not running and not submitted:
            now[0] = asks[0].at
            continue
        new = [submitted.popleft() for _ in range(min(ROWS - len(running), len(submitted)))]
        now[0] += 0.035 + 0.00045 * 44 * len(new) if new else 0.0
        running += new
        adapters = sorted({ticket.tenant for ticket in running})
        computed = len(adapters)
        if computed >= 4:
            before, in_slots = in_slots, slots.assign(adapters, SLOTS) or ()
            kept = before if len(before) == len(in_slots) else [None] * len(in_slots)  # more slots are new memory
            moved = sum(name not in (None, there) for name, there in zip(in_slots, kept, strict=True))
            copies += moved
            now[0] += copy_s * moved
            computed = len(in_slots)
        now[0] += 0.038 + 0.0005 * len(running) + adapter_s * (computed - 1)
        passes, rows = passes + 1, rows + len(running)
        for ticket in list(running):
            tokens = 2 if ticket in new else 1
            scheduler.finish_prefill(ticket)
            scheduler.charge(ticket.tenant, answer=tokens)
            left[ticket] -= tokens
            if left[ticket] <= 0:
                running.remove(ticket)
                scheduler.release(ticket)
                done += 1
    return requests / now[0], rows / passes, copies


def main() -> None:
    """Print both tables."""
    console = Console(width=130)
    names = ("prompt", "answer", "rule of pairs", "requests/s", "prefill passes", "quiet p50", "p99", "first p99")
    table = Table(*names, "at once", "ratio")
    for prompt, answer in ((44, 16), (20, 16), (100, 16), (44, 64)):
        for side in SIDES:
            rate, prefills, first, waits = simulate(side, prompt, answer, 10)
            at_once = float(np.percentile(simulate(side, prompt, answer, 1)[2], 99))
            late = float(np.percentile(first, 99))
            shown = (f"{float(np.percentile(waits, p)):.2f} s" for p in (50, 99))
            firsts = f"{late:.2f} s", f"{at_once:.2f} s", f"{late / at_once:.2f}"
            table.add_row(str(prompt), str(answer), side, f"{rate:.2f}", f"{prefills:,}", *shown, *firsts)
    console.print(table)
    table = Table("32 tenants against one", "throughput", "rows of a pass", "copies")
    for title, adapter_s, copy_s in (
        ("the scheduler's rules", 0.0, 0.0),
        ("and passes of several adapters", ADAPTER_S, 0.0),
        ("and copies to slots", ADAPTER_S, COPY_S),
    ):
        seeds = range(20)
        one = [simulate_many(1, seed, adapter_s=0.0, copy_s=0.0) for seed in seeds]
        many = [simulate_many(32, seed, adapter_s=adapter_s, copy_s=copy_s) for seed in seeds]
        ratios = [a[0] / b[0] for a, b in zip(many, one, strict=True)]
        rows, copies = (float(np.mean([each[place] for each in many])) for place in (1, 2))
        spread = f"{np.mean(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(title, spread, f"{rows:.1f}", f"{copies:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
