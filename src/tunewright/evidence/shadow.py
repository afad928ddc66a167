"""Evidence of a shadow: people's verdicts on the answers that differ, as a sequence that is valid at every look."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunewright.core.text import count_of
from tunewright.evidence.common import Outcome
from tunewright.evidence.human_eval import RaterAgreement
from tunewright.render.blocks import Block, Lead, Line, Lines, Notes, Tone, table, words

COUNTED_S = 24 * 3600.0
"""Only requests of a unit's first day count, so that the unit can be complete while its user continues."""
COMPLETE_S = COUNTED_S + 3600.0
"""After this time no request of the first day is still to be recorded."""
_FEWEST_COMMON = 10
"""Pairs that two reviewers have judged, from which their agreement may stop a decision."""
_SIDES = {"live": -1.0, "shadow": 1.0, "both": 0.0, "neither": 0.0}


@dataclass(frozen=True)
class Asked:
    """One request of a unit: its time in seconds since 1970, and the key of its verdicts; None: equal answers."""

    time: float
    differing: str | None


@dataclass(frozen=True)
class CompleteUnit:
    """A unit that can enter the sequence."""

    unit: str
    value: float
    """The mean difference of its answers, candidate minus live."""
    requests: int
    differing: int


@dataclass(frozen=True)
class Settling:
    """The next units of a sequence, and what the later ones wait for."""

    units: list[CompleteUnit]
    incomplete: int
    """Units whose first day has not passed."""
    waiting: list[str]
    """Keys of the counted pairs without a verdict, in the order in which they hold up the sequence."""


def settling(
    units: Mapping[str, Sequence[Asked]], lasting: set[str], scores: Mapping[str, float], now: float
) -> Settling:
    """Return the units that follow in the sequence, in the order in which they became complete.

    The order depends on times only. A unit that waits for a verdict stops the sequence: passing it over would let
    equal answers in first.

    Args:
        units: the requests of each unit that is not in the sequence, in the order of time.
        lasting: units with a single request, which are complete immediately.
        scores: people's mean verdict by key, from -1 (live) to 1 (candidate).
        now: seconds since 1970.
    """
    counted = {name: [each for each in asked if each.time - asked[0].time < COUNTED_S] for name, asked in units.items()}
    ends = {name: asked[0].time + (0 if name in lasting else COMPLETE_S) for name, asked in units.items()}
    complete = sorted((name for name in units if ends[name] <= now), key=lambda name: ends[name])
    found: list[CompleteUnit] = []
    waiting: list[str] = []
    for name in complete:
        differing = [each.differing for each in counted[name] if each.differing is not None]
        waiting += [key for key in differing if key not in scores]
        if not waiting:
            value = sum(scores[key] for key in differing) / len(counted[name])
            found.append(CompleteUnit(name, value, len(counted[name]), len(differing)))
    later = sorted(units.keys() - set(complete), key=lambda name: ends[name])
    ahead = [each.differing for name in later for each in counted[name] if each.differing is not None]
    return Settling(found, len(later), [*waiting, *(key for key in ahead if key not in scores)])


def mean_scores(verdicts: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """Return the mean verdict of each pair over its reviewers, without skips; ``verdicts`` is by key, then reviewer."""
    said = {key: [_SIDES[verdict] for verdict in of.values() if verdict != "skip"] for key, of in verdicts.items()}
    return {key: sum(scores) / len(scores) for key, scores in said.items() if scores}


@dataclass(frozen=True)
class Look:
    """The sequence after a number of units: the mean difference, its bounds and what may be said."""

    units: int
    value: float
    low: float
    high: float
    outcome: Outcome


@dataclass(frozen=True)
class ShadowFinding:
    """The finding of a sequence at one look."""

    outcome: Outcome
    margin: float
    units: int
    requests: int
    labels: int
    """Differing answers of the counted requests; people judged all of them."""
    value: float
    """Mean difference of the units, candidate minus live."""
    low: float
    high: float
    reviewers: tuple[str, ...]
    kappa: float | None
    """The lowest kappa of two reviewers; None: no two judged the same pairs, or kappa is undefined."""
    sequence: str
    """SHA-256 of the sequence's values."""

    @property
    def summary(self) -> str:
        """The outcome with its bounds, in a line."""
        ends = f"{_points(self.value)} points, 95% bounds {_points(self.low)} to {_points(self.high)}"
        counts = f"{count_of(self.units, 'unit')}, {count_of(self.labels, 'label')}"
        return f"{self.outcome} ({ends}; {counts})" if self.units else "no verdict"


@dataclass(frozen=True)
class ShadowStatus:
    """A shadow's sequence, and what may be said now."""

    alias: str
    release: int
    candidate: str
    live: str
    margin: float
    most_units: int
    pairs: int
    """Recorded requests with both answers."""
    differing: int
    unanswered: int
    unrecorded: int
    kinds: dict[str, int]
    """Units by kind: user, conversation or request."""
    incomplete: int
    waiting: int
    """Differing answers that still need a verdict."""
    finding: ShadowFinding | None
    """None: no unit is in the sequence."""
    ended: bool
    """The sequence has reached its maximum."""
    agreements: tuple[RaterAgreement, ...]
    looks: list[Look]

    @property
    def reached(self) -> dict[str, int]:
        """The number of units at which each outcome other than *can't tell* was first reached."""
        first = {look.outcome: look.units for look in reversed(self.looks)}
        return {outcome: first[outcome] for outcome in ("worse", "not worse", "better") if outcome in first}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The layout of the status."""
        return tuple(_blocks(self))


def nothing_found(margin: float) -> ShadowFinding:
    """Return the finding of a sequence without a unit."""
    return ShadowFinding("can't tell", margin, 0, 0, 0, 0.0, -1.0, 1.0, (), None, hashlib.sha256().hexdigest())


def finding(
    values: Sequence[float],
    counts: tuple[int, int],
    margin: float,
    agreements: Sequence[RaterAgreement],
    reviewers: Sequence[str],
) -> tuple[ShadowFinding, list[Look]]:
    """Return what a sequence of units' differences shows at its last unit, and each look.

    Args:
        values: one difference a unit.
        counts: the units' requests, and their differing answers.
        margin: see `ConfidenceSequence.outcome`.
        agreements: of pairs of reviewers. If two of them agree no more than chance would, nothing can be said.
        reviewers: everyone who judged a pair.
    """
    # Loaded here: the state's releases need only the finding.
    import numpy as np

    from tunewright.evidence.confidence_sequences import confidence_sequence

    found = confidence_sequence(np.array(values, dtype=np.float64))
    enough = [each.kappa for each in agreements if each.items >= _FEWEST_COMMON and each.kappa is not None]
    lowest = min((each.kappa for each in agreements if each.kappa is not None), default=None)
    outcome: Outcome = "can't tell" if any(kappa <= 0 for kappa in enough) else found.outcome(-1, margin)
    ends = float(found.means[-1]), float(found.low[-1]), float(found.high[-1])
    digest = hashlib.sha256(np.array(values, dtype="<f8").tobytes()).hexdigest()
    made = ShadowFinding(outcome, margin, len(values), *counts, *ends, tuple(sorted(reviewers)), lowest, digest)
    bounds = zip(found.means.tolist(), found.low.tolist(), found.high.tolist(), strict=True)
    looks = [Look(place + 1, *ends, found.outcome(place, margin)) for place, ends in enumerate(bounds)]
    return made, looks


_SAID = {
    "better": "{candidate} is better than {live}",
    "not worse": "{candidate} is not worse than {live} by the margin of {margin}",
    "worse": "{candidate} is worse than {live}",
    "can't tell": "Can't tell if {candidate} is better or worse than {live}",
}


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _blocks(status: ShadowStatus) -> list[Block]:
    names = {"candidate": status.candidate, "live": status.live, "margin": f"{100 * status.margin:g} points"}
    found = status.finding
    if found is None:
        parts: list[Block] = [Lead(f"{status.alias}: no unit is in the sequence yet.")]
    else:
        ends = f"{_points(found.value)} points, 95% bounds {_points(found.low)} to {_points(found.high)}"
        over = f"over {count_of(found.units, 'unit')} with {count_of(found.requests, 'request')}"
        parts = [Lead(f"{_SAID[found.outcome].format(**names)}: {ends}, {over}.")]
    rows = [
        ("Recorded requests with both answers", f"{status.pairs:,}"),
        ("Differing answers", f"{status.differing:,}"),
        ("Waiting for a verdict", f"{status.waiting:,}"),
        ("Units whose first day has not passed", f"{status.incomplete:,}"),
        ("Without an answer in the shadow", f"{status.unanswered:,}"),
        ("Not recorded, so not counted", f"{status.unrecorded:,}"),
    ]
    parts.append(table("Requests of the shadow", words("Requests", "Number"), rows))
    if status.agreements:
        kappas = [
            (" and ".join(each.raters), f"{each.items:,}", f"{each.agreed:,}", _kappa(each))
            for each in status.agreements
        ]
        parts.append(table("Agreement of reviewers", (*words("Reviewers"), "Pairs", "Agreed", "Kappa"), kappas))
    parts.append(Notes(tuple(_notes(status))))
    if len(status.looks) > 1:
        shown = [look for look in status.looks if look.units in _shown(len(status.looks))]
        every_look = [
            (f"{look.units:,}", *map(_points, (look.value, look.low, look.high)), look.outcome) for look in shown
        ]
        parts.append(table("The sequence", ("Units", "Difference", "Low", "High", *words("Outcome")), every_look))
        every: dict[str, tuple[Tone, str]] = {
            "mean": ("tuned", "value"),
            "lower bound": ("plain", "low"),
            "upper bound": ("plain", "high"),
        }
        points = [(float(look.units), look) for look in status.looks]
        lines = tuple(
            Line(label, tuple((at, 100 * getattr(look, name)) for at, look in points), tone)
            for label, (tone, name) in every.items()
        )
        parts.append(
            Lines("shadow-sequence", "The sequence and its bounds", lines, "difference, points", below="units")
        )
    return parts


def _shown(last: int) -> set[int]:
    """Return the looks of the table: 1, 2, 5, 10, 20, 50 ... and the last one."""
    return {last, *(digit * 10**power for power in range(len(str(last))) for digit in (1, 2, 5))}


def _kappa(each: RaterAgreement) -> str:
    return "-" if each.kappa is None else f"{each.kappa:.2f}"


def _notes(status: ShadowStatus) -> list[str]:
    kinds = ", ".join(f"{count_of(count, kind)}" for kind, count in sorted(status.kinds.items()))
    notes = [
        f"Units: {kinds or 'none'}. A unit counts once, by the mean of its first day.",
        "The bounds hold at every look together, so you may look at any time and stop. They are about the running mean "
        "over the recorded traffic.",
        f"Declared before the first look: a margin of {100 * status.margin:g} points, and at most "
        f"{status.most_units:,} units.",
    ]
    others = [f"{outcome} at {count_of(units, 'unit')}" for outcome, units in status.reached.items()]
    if others:
        notes.append(f"First reached: {', '.join(others)}.")
    if status.ended:
        notes.append("The sequence has reached its maximum and has ended.")
    if any(each.items >= _FEWEST_COMMON and each.kappa is not None and each.kappa <= 0 for each in status.agreements):
        notes.append("Two reviewers agree no more than chance would: nothing can be said until that is settled.")
    elif status.finding is not None and len(status.finding.reviewers) == 1:
        notes.append("One person judged all pairs, so nothing shows whether they judge well.")
    return notes
