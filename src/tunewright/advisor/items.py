"""Items of the dev split and the arms' answers to them, shared by all signals."""

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
    """Scores by the deciding metric."""


@dataclass(frozen=True)
class Items:
    """Some dev items, with the metric that scores their answers."""

    clusters: Sequence[str]
    metric: MetricName
    margin: float
    seed: int

    def score(self, answers: Answers) -> ArmScore:
        """Return an arm's score on these items, by the deciding metric."""
        return answers.arm.score(self.metric)

    def contrast(self, treatment: Answers, control: Answers) -> Contrast:
        """Return the contrast of two arms on these items."""
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
    """Return the gain of an arm with ``after`` rows or demonstrations over one with ``before``, per doubling."""
    difference, interval = items.difference(larger, smaller)
    doublings = math.log2(after / before)
    return Doubling(
        before=before,
        after=after,
        difference=difference / doublings,
        interval=Interval(low=interval.low / doublings, high=interval.high / doublings),
    )
