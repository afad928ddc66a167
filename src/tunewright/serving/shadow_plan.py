"""The plan of a shadow: requests, labels and days until it finds a difference of 3, 5 or 10 points."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

from tunewright.core.errors import UserError
from tunewright.evidence.sequence_power import ShadowNeeds, shadow_needs
from tunewright.open_project import OpenProject
from tunewright.render.blocks import Block, Lead, Notes, table
from tunewright.serving.options import ShadowPlanOptions
from tunewright.serving.serve import open_state

if TYPE_CHECKING:
    from tunewright.serving.tenants import State

DIFFERENCES = (0.03, 0.05, 0.10)
_TRAFFIC_DAYS = 28
_FEW_DIFFERING = 20
"""With fewer differing answers, the share that differs is a rough estimate."""


@dataclass(frozen=True)
class ShadowPlan:
    """Requests and labels that a shadow of an alias needs, by difference."""

    alias: str
    differs: float
    """The share of answers that differ, by request."""
    shadowed: int
    """Stored answers of the newest shadow; 0 if the share was given."""
    units: int
    """Users, and requests without a user, of those answers."""
    per_day: float | None
    """Requests a day; None without traffic."""
    needs: list[ShadowNeeds]


def plan(project: OpenProject, alias: str, options: ShadowPlanOptions = ShadowPlanOptions()) -> ShadowPlan:
    """Estimate requests, labels and days until a shadow finds a difference, from the alias's traffic and newest shadow.

    Args:
        alias: its name. With both options it needs no release.
        options: assumptions in place of measurements.

    Raises:
        UserError: no such alias, or no shadow has answered on it and ``differs`` is not given.
    """
    units, per_day = [], None if options.per_day is None else float(options.per_day)
    if options.differs is None or per_day is None:
        with open_state(project) as state:
            state.releases.history(alias)
            if options.differs is None:
                units = state.usage.shadow_units(alias)
            if per_day is None:
                per_day = _requests_per_day(state, alias)
    shadowed, differing = sum(size for size, _ in units), sum(other for _, other in units)
    if options.differs is not None:
        # Steps of a hundredth of a percent are finer than the plan.
        share = round(10_000 * options.differs)
        shapes = [(1, 1)] * share + [(1, 0)] * (10_000 - share)
    elif not units:
        raise UserError(
            f"No shadow has answered on {alias} yet, so the share of answers that differ is unknown",
            where="--differs",
            fix=f"Run `tunewright deploy {alias} ADAPTER --shadow`, or assume a share with --differs 12%.",
        )
    else:
        shapes = units
        if differing < _FEW_DIFFERING:
            project.reporter.warn(
                f"Only {differing} of {shadowed:,} answers in the shadow differ: the plan is a rough estimate."
            )
    needs = [shadow_needs(shapes, difference) for difference in DIFFERENCES]
    differs = options.differs if options.differs is not None else differing / shadowed
    return ShadowPlan(alias, differs, shadowed, len(units), per_day, needs)


def _requests_per_day(state: State, alias: str) -> float | None:
    """Return the alias's mean requests a day, from its first day of the last 28 to its newest day."""
    totals = [each for each in state.usage.by_day() if each.alias == alias]
    if not totals:
        return None
    newest = date.fromisoformat(max(each.day for each in totals))
    since = (newest - timedelta(days=_TRAFFIC_DAYS - 1)).isoformat()
    recent = [each for each in totals if each.day >= since]
    first = date.fromisoformat(min(each.day for each in recent))
    return sum(each.requests for each in recent) / ((newest - first).days + 1)


def plan_blocks(made: ShadowPlan) -> tuple[Block, ...]:
    """Return the assumptions, and a row for each difference."""
    source = "assumed"
    if made.shadowed:
        source = f"{made.shadowed:,} answers in the shadow, {made.units:,} users or requests without a user"
    traffic = "no requests so far" if made.per_day is None else f"{made.per_day:,.4g} requests a day"
    rows = []
    for needs in made.needs:
        counts = (needs.median_requests, needs.median_labels, needs.requests, needs.labels)
        cells = ("-" if count is None else f"{count:,}" for count in counts)
        days = "-"
        if needs.requests is not None and made.per_day is not None:
            days = f"{needs.requests / made.per_day:,.1f}"
        rows.append((f"{100 * needs.difference:.0f} points", *cells, days))
    head = ("Difference", "Requests, half", "Labels, half", "Requests, 80%", "Labels, 80%", "Days, 80%")
    notes = [
        "Half of the shadows, and 80% of them, find a candidate that is worse or better by the difference.",
        "People label the answers that differ. Equal answers need no label.",
    ]
    if any(each.requests is None for each in made.needs):
        notes.append("A row of dashes: too few answers differ for such a difference.")
    return (
        Lead(f"{made.alias}: {100 * made.differs:.3g}% of the answers differ ({source}); {traffic}."),
        table("Requests and labels of a shadow", head, rows),
        Notes(tuple(notes)),
    )
