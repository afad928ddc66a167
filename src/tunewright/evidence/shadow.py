"""Evidence of a shadow: verdicts on the answers that differ, as a sequence that is valid at every look.

People judge all of them. Or a judge does, and people judge a share that is drawn in advance and corrects the judge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    labels: int
    """Differing answers that people judged."""
    confirmed: float
    """The sum of label times judge's answer, over the probability of a label: see `Judging.weight`."""
    squares: float
    """The sum of the squares of the judge's answers."""


@dataclass(frozen=True)
class Judging:
    """The source of differing pairs' values: people or, corrected by people's labels, a judge."""

    share: float = 1.0
    """The probability with which a pair goes to people."""
    seed: int = 0
    """Decides the pairs that go to people."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """The judge's answers by key, from -1 (live) to 1 (candidate)."""
    takes_part: bool = False
    """False: no judge takes part, and all pairs go to people."""

    def draws(self, key: str) -> bool:
        """Return whether a pair goes to people; its key decides, so the draw is the same at every look."""
        drawn = hashlib.sha256(f"{self.seed}:people:{key}".encode()).digest()
        return int.from_bytes(drawn[:8]) < self.share * 2**64

    def complete(
        self, unit: str, requests: int, differing: Sequence[str], labels: Mapping[str, float], weight: float
    ) -> CompleteUnit:
        """Return a unit with its value, as `unit_differences` defines it; ``weight`` is that of the judge."""
        total = confirmed = squares = 0.0
        drawn = [key for key in differing if self.draws(key)]
        for key in differing:
            judged = self.scores.get(key, 0.0)
            total += weight * judged
            squares += judged**2
        for key in drawn:
            judged = self.scores.get(key, 0.0)
            total += (labels[key] - weight * judged) / self.share
            confirmed += labels[key] * judged / self.share
        return CompleteUnit(unit, total / requests, requests, len(differing), len(drawn), confirmed, squares)


@dataclass(frozen=True)
class Settling:
    """The next units of a sequence, and what the later ones wait for."""

    units: list[CompleteUnit]
    incomplete: int
    """Units whose first day has not passed."""
    waiting: list[str]
    """Keys of the pairs that need a person's verdict, in the order in which they hold up the sequence."""
    unjudged: list[str]
    """Keys of the pairs that need the judge's, if one takes part."""


def settling(
    units: Mapping[str, Sequence[Asked]],
    lasting: set[str],
    scores: Mapping[str, float],
    now: float,
    judging: Judging = Judging(),
    before: tuple[float, float] = (0.0, 0.0),
) -> Settling:
    """Return the units that follow in the sequence, in the order in which they became complete.

    The order depends on times only. A unit that waits for a verdict stops the sequence: passing it over would let
    equal answers in first.

    Args:
        units: the requests of each unit that is not in the sequence, in the order of time.
        lasting: units with a single request, which are complete immediately.
        scores: people's mean verdict by key, from -1 (live) to 1 (candidate).
        now: seconds since 1970.
        judging: the part of a judge.
        before: the sums `confirmed` and `squares` of the units in the sequence.
    """
    confirmed, squares = before
    counted = {name: [each for each in asked if each.time - asked[0].time < COUNTED_S] for name, asked in units.items()}
    ends = {name: asked[0].time + (0 if name in lasting else COMPLETE_S) for name, asked in units.items()}
    complete = sorted((name for name in units if ends[name] <= now), key=lambda name: ends[name])
    later = sorted(units.keys() - set(complete), key=lambda name: ends[name])
    found: list[CompleteUnit] = []
    waiting: list[str] = []
    unjudged: list[str] = []
    for name in [*complete, *later]:
        differing = [each.differing for each in counted[name] if each.differing is not None]
        waiting += [key for key in differing if judging.draws(key) and key not in scores]
        unjudged += [key for key in differing if judging.takes_part and key not in judging.scores]
        if not waiting and not unjudged and ends[name] <= now:
            # The units before decide the weight, so that a unit's value has the right expectation given the past.
            weight = min(max(confirmed / (1 + squares), 0.0), 1.0)
            found.append(judging.complete(name, len(counted[name]), differing, scores, weight))
            confirmed, squares = confirmed + found[-1].confirmed, squares + found[-1].squares
    return Settling(found, len(later), waiting, unjudged)


def mean_scores(verdicts: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """Return the mean verdict of each pair over its reviewers, without skips; ``verdicts`` is by key, then reviewer."""
    said = {key: [_SIDES[verdict] for verdict in of.values() if verdict != "skip"] for key, of in verdicts.items()}
    return {key: sum(scores) / len(scores) for key, scores in said.items() if scores}


@dataclass(frozen=True)
class ShadowJudge:
    """A judge in a shadow's review, and its agreement with people on the pairs that both judged."""

    model: str
    url: str
    share: float
    """The probability with which a differing pair goes to people; the judge answers all."""
    answers: int
    """Differing pairs that the judge answered."""
    unread: int
    """Number of them without a readable verdict, which count as ties."""
    both: int
    """Pairs that people judged as well."""
    agreed: int
    low: float
    high: float
    """95% interval of the share that agrees; 0 and 1 without such pairs."""
    kappa: float | None
    """None: undefined."""

    @property
    def is_useless(self) -> bool:
        """True if it agrees with people no more than chance would, on enough pairs."""
        return self.both >= _FEWEST_COMMON and self.kappa is not None and self.kappa <= 0

    @property
    def agreement(self) -> str:
        """The agreement with people in a sentence."""
        if not self.both:
            return "No pair has been judged by both yet, so nothing shows if the judge is right."
        kappa = "" if self.kappa is None else f", kappa {self.kappa:.2f}"
        share = f"{self.agreed:,} of {self.both:,} pairs: {self.agreed / self.both:.0%}"
        interval = f"95% interval {100 * self.low:.0f} to {100 * self.high:.0f}"
        return f"The judge agrees with people on {share} ({interval}{kappa})."


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
    """Differing answers of the counted requests that people judged: all of them, unless a judge takes part."""
    value: float
    """Mean difference of the units, candidate minus live."""
    low: float
    high: float
    reviewers: tuple[str, ...]
    kappa: float | None
    """The lowest kappa of two reviewers; None: no two judged the same pairs, or kappa is undefined."""
    sequence: str
    """SHA-256 of the sequence's values."""
    judge: ShadowJudge | None = None

    @property
    def summary(self) -> str:
        """The outcome with its bounds, in a line."""
        ends = f"{_points(self.value)} points, 95% bounds {_points(self.low)} to {_points(self.high)}"
        counts = f"{count_of(self.units, 'unit')}, {count_of(self.labels, 'label')}"
        if self.judge is not None:
            counts += f"; judged by {self.judge.model}, people judge {100 * self.judge.share:.4g}% of the pairs"
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
    """Differing answers that still need a person's verdict."""
    unjudged: int
    """Differing answers that still need the judge's verdict."""
    judge: ShadowJudge | None
    """None: no judge takes part."""
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
    requests: int,
    labels: Sequence[int],
    margin: float,
    agreements: Sequence[RaterAgreement],
    reviewers: Sequence[str],
    judge: ShadowJudge | None = None,
) -> tuple[ShadowFinding, list[Look]]:
    """Return what a sequence of units' differences shows at its last unit, and each look.

    Args:
        values: one difference a unit.
        requests: of the units.
        labels: differing answers that people judged, of each unit.
        margin: see `ConfidenceSequence.outcome`.
        agreements: of pairs of reviewers. If two of them agree no more than chance would, nothing can be said.
        reviewers: everyone who judged a pair.
        judge: one that takes part. Without people's labels, nothing can be said.
    """
    # Loaded here: the state's releases need only the finding.
    import numpy as np

    from tunewright.evidence.confidence_sequences import confidence_sequence, largest_difference

    so_far = np.cumsum(labels)
    largest = 1.0 if judge is None else largest_difference(judge.share, judge=True)
    found = confidence_sequence(np.array(values, dtype=np.float64), largest=largest, labels=so_far)
    said: list[Outcome] = [
        "can't tell" if judge is not None and not so_far[place] else found.outcome(place, margin)
        for place in range(len(values))
    ]
    enough = [each.kappa for each in agreements if each.items >= _FEWEST_COMMON and each.kappa is not None]
    lowest = min((each.kappa for each in agreements if each.kappa is not None), default=None)
    outcome: Outcome = "can't tell" if any(kappa <= 0 for kappa in enough) else said[-1]
    # A label counts 1 / share times, so that an early estimate or bound can lie outside of all possible differences.
    means, low, high = (np.clip(each, -1, 1).tolist() for each in (found.means, found.low, found.high))
    digest = hashlib.sha256(np.array(values, dtype="<f8").tobytes()).hexdigest()
    counts = len(values), requests, int(so_far[-1])
    ends = means[-1], low[-1], high[-1]
    made = ShadowFinding(outcome, margin, *counts, *ends, tuple(sorted(reviewers)), lowest, digest, judge)
    looks = [Look(place + 1, *at, said[place]) for place, at in enumerate(zip(means, low, high, strict=True))]
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
    judged = []
    if status.judge is not None:
        judged = [("Judge's answers", f"{status.judge.answers:,}"), ("Waiting for the judge", f"{status.unjudged:,}")]
    rows = [
        ("Recorded requests with both answers", f"{status.pairs:,}"),
        ("Differing answers", f"{status.differing:,}"),
        ("Waiting for a verdict", f"{status.waiting:,}"),
        *judged,
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
    if status.judge is not None:
        named = (
            f"{status.judge.model} judges all pairs that differ, and people judge {100 * status.judge.share:.4g}% of "
        )
        notes.append(f"{named}them, drawn before anyone judges. People's verdicts correct the judge's.")
        notes.append(status.judge.agreement)
        if status.judge.unread:
            notes.append(f"{count_of(status.judge.unread, 'answer')} of the judge had no verdict and count as ties.")
        if status.judge.is_useless:
            notes.append("That is no more than chance: this judge is of no use, and only people's verdicts count.")
    if status.ended:
        notes.append("The sequence has reached its maximum and has ended.")
    if any(each.items >= _FEWEST_COMMON and each.kappa is not None and each.kappa <= 0 for each in status.agreements):
        notes.append("Two reviewers agree no more than chance would: nothing can be said until that is settled.")
    elif status.finding is not None and len(status.finding.reviewers) == 1:
        notes.append("Only one person judged, so nothing shows whether they judge well.")
    return notes
