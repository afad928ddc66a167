"""Prompt, retrieve, fine-tune or can't tell: a pure function of the measured signals.

=================  ==========================================  =======================  ================
the pilot          all rows may reach                          training pays by volume  answer
=================  ==========================================  =======================  ================
beats              (any)                                       (any)                    fine-tune
is as good         (any)                                       yes                      fine-tune
(any)              at most the margin                          no, or unknown           prompt, retrieve
is not as good     at most minus the margin                    yes                      prompt, retrieve
is not as good     at most the margin, more than minus it      yes                      can't tell
does not beat      more than the margin                        (any other)              can't tell
=================  ==========================================  =======================  ================

Without a pilot the gain of training is unknown, except that no score exceeds 1. With fewer than `FEWEST_CLUSTERS` dev
clusters the answer is *can't tell*. The columns are properties of :class:`Grounds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tunewright.advisor.signals import ShotCurve, Signals, TuningGain
from tunewright.evidence.power import FEWEST_CLUSTERS
from tunewright.evidence.schema import Arm, ArmKind
from tunewright.evidence.verdict import SIGNIFICANT

Recommendation = Literal["fine-tune", "prompt", "retrieve", "can't tell"]

RETRIEVING: frozenset[ArmKind] = frozenset({"retrieved"})
"""Kinds of arms that look demonstrations up for each question."""

EXIT_CODES: dict[Recommendation, int] = {"fine-tune": 0, "prompt": 3, "retrieve": 3, "can't tell": 4}


@dataclass(frozen=True)
class Decision:
    """A recommendation and its reason."""

    answer: Recommendation
    arm: str | None
    """The prompting arm to use, if the answer is to prompt or retrieve."""
    why: str
    """The reason, in a sentence."""

    @property
    def exit_code(self) -> int:
        """0: fine-tune, 3: prompt or retrieve, 4: can't tell."""
        return EXIT_CODES[self.answer]


@dataclass(frozen=True)
class Grounds:
    """Conclusions from the signals, one per property."""

    signals: Signals

    @property
    def clusters(self) -> int:
        """Independent clusters among the dev items (with a pilot: those scored in both arms)."""
        gain = self.signals.gain
        return self.signals.clusters if gain is None else gain.contrast.clusters

    @property
    def enough_clusters(self) -> bool:
        """True if any difference could be significant."""
        return self.clusters >= FEWEST_CLUSTERS

    @cached_property
    def best(self) -> Arm:
        """The best prompting arm."""
        prompting = self.signals.prompting
        return next(a for a in prompting.arms if a.name == prompting.best)

    @cached_property
    def headroom(self) -> float:
        """The gain that twice the demonstrations may add to the best prompting score, as a share.

        It is the gain of the last doubling, since gains diminish; 0 if twice as many do not fit, or if the last
        doubling gained no more than the margin.
        """
        return max([0.0, *(self.lead(curve) + last_gain(curve) for curve in self.signals.context.curves)])

    def lead(self, curve: ShotCurve) -> float:
        """Return the score of a curve's most demonstrations minus the best score of all curves, on the same items.

        It is 0 if that is the best score, else negative.
        """
        tops = [p.score.value for c in self.signals.context.curves for p in c.points]
        return curve.points[-1].score.value - max(tops)

    @property
    def beats(self) -> bool:
        """True if the pilot is better by more than the margin and the headroom, and the test is significant."""
        gain = self.signals.gain
        if gain is None or not self.enough_clusters:
            return False
        above = gain.contrast.interval.low > self.signals.margin + self.headroom
        return above and gain.contrast.p_value < SIGNIFICANT

    @property
    def as_good(self) -> bool:
        """True if the pilot is shown to be less than the margin below the best prompting arm."""
        gain = self.signals.gain
        return gain is not None and self.enough_clusters and gain.contrast.interval.low > -self.signals.margin

    @property
    def reach(self) -> float:
        """The largest gain that an adapter of all rows may have.

        It is the upper end of the pilot's interval, plus the upper end of the last doubling's gain for each doubling to
        all rows. It is capped at the distance to a score of 1. Without a smaller part it is infinite.
        """
        ceiling = 1 - self.best.score(self.signals.metric).interval.low
        gain = self.signals.gain
        if gain is None:
            return ceiling
        ahead = 0.0
        if left := doublings_left(gain):
            ahead = math.inf if gain.slope is None else left * max(gain.slope.interval.high, 0.0)
        return min(ceiling, gain.contrast.interval.high + ahead)

    @property
    def no_gain(self) -> bool:
        """True if no adapter of these rows can gain more than the margin."""
        return self.enough_clusters and self.reach <= self.signals.margin

    @property
    def pays(self) -> Literal["yes", "no", "unclear"]:
        """Answer to *do cheaper calls pay for training?*"""
        even = self.signals.break_even
        return "unclear" if even is None else even.pays


def last_gain(curve: ShotCurve) -> float:
    """Return the gain of the last doubling of demonstrations; 0 if the next one does not fit or the curve is flat."""
    return 0.0 if curve.last is None or not curve.room or curve.rising == "no" else curve.last.difference


def doublings_left(gain: TuningGain) -> float:
    """Return the number of doublings from the pilot's rows to all rows."""
    return math.log2(gain.all_rows / gain.pilot.rows)


def decide(signals: Signals) -> Decision:
    """Return the recommendation by the table above."""
    grounds = Grounds(signals)
    best, margin = signals.prompting.best, f"{100 * signals.margin:g} points"
    if not grounds.enough_clusters:
        return Decision(
            "can't tell",
            None,
            f"{grounds.clusters} independent dev clusters are too few (at least {FEWEST_CLUSTERS} are needed).",
        )
    if grounds.beats:
        beyond = ", even if twice the demonstrations gained as much again" if grounds.headroom > 0 else ""
        return Decision("fine-tune", None, f"The pilot beats {best} by more than the margin of {margin}{beyond}.")
    if grounds.as_good and grounds.pays == "yes":
        return Decision("fine-tune", None, f"The pilot is as good as {best}, and its shorter prompts pay for it.")
    if grounds.no_gain:
        return _without_gain(signals, grounds)
    return Decision("can't tell", None, _unsettled(signals))


def _without_gain(signals: Signals, grounds: Grounds) -> Decision:
    """Return the recommendation if training can only make calls cheaper."""
    best = signals.prompting.best
    if grounds.pays == "yes" and grounds.reach > -signals.margin:
        why = f"Cheaper calls would pay for training, but it is not shown to be as good as {best}."
        return Decision("can't tell", None, why)
    kind = next(a.kind for a in signals.prompting.arms if a.name == signals.cheapest)
    why = f"No adapter of these rows can beat {best} by more than the margin of {100 * signals.margin:g} points"
    if grounds.pays == "no":
        why += ", and cheaper calls would not pay for training"
    return Decision("retrieve" if kind in RETRIEVING else "prompt", signals.cheapest, f"{why}.")


def _unsettled(signals: Signals) -> str:
    gain = signals.gain
    if gain is None:
        return f"There is no pilot ({signals.left_out['gain']}), and prompting leaves room for an adapter to beat it."
    margin = f"the margin of {100 * signals.margin:g} points"
    if gain.contrast.interval.low > signals.margin and gain.contrast.p_value < SIGNIFICANT:
        return "The pilot is better, but twice the demonstrations would fit and may be better still."
    if gain.contrast.interval.high <= signals.margin:
        return f"The pilot does not beat {signals.prompting.best}, but all {gain.all_rows:,} rows may."
    return f"The interval of the pilot's gain over {signals.prompting.best} includes values on both sides of {margin}."
