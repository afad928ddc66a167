"""The dev split's items and arms' answers to them, as all signals compare them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunewright.advisor.signals import Doubling
from tunewright.config import MetricName
from tunewright.evidence.base import ArmScore, Interval
from tunewright.evidence.schema import Arm, Contrast
from tunewright.evidence.scoring import contrast
from tunewright.metrics import Scores


@dataclass(frozen=True)
class Answers:
    """One arm with its answers to some items, in their order."""

    arm: Arm
    texts: Sequence[str]
    prompts: Sequence[tuple[int, ...]]
    truncated: Sequence[bool]
    scores: Scores
    """By the deciding metric."""


@dataclass(frozen=True)
class Items:
    """Some dev items, and by what their answers are compared."""

    clusters: Sequence[str]
    metric: MetricName
    margin: float
    seed: int

    def score(self, answers: Answers) -> ArmScore:
        """Return an arm's score on these items, by the deciding metric."""
        return answers.arm.score(self.metric)

    def contrast(self, treatment: Answers, control: Answers) -> Contrast:
        """Two arms on these items."""
        return contrast(
            treatment=treatment.arm.name,
            control=control.arm.name,
            ours=treatment.scores,
            theirs=control.scores,
            clusters=self.clusters,
            seed=self.seed,
        )

    def difference(self, treatment: Answers, control: Answers) -> tuple[float, Interval]:
        """Return the paired difference of two arms' scores with its 95% interval."""
        measured = self.contrast(treatment, control)
        return measured.difference, measured.interval


def per_doubling(larger: Answers, smaller: Answers, after: int, before: int, items: Items) -> Doubling:
    """Return what an arm with ``after`` rows or demonstrations has over one with ``before``, as of one doubling."""
    difference, interval = items.difference(larger, smaller)
    doublings = math.log2(after / before)
    return Doubling(
        before=before,
        after=after,
        difference=difference / doublings,
        interval=Interval(low=interval.low / doublings, high=interval.high / doublings),
    )
