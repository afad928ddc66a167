"""Signal (a): the score by number of demonstrations, the number that fits, and the measured items."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunewright.advisor.signals import Answer, ContextBudget, Doubling, ShotCurve, ShotPoint
from tunewright.config import MetricName
from tunewright.evaluation.arms import ZERO_SHOT
from tunewright.evidence.common import ArmScore, Interval
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


def context_budget(
    arms: Sequence[Answers], items: Items, context: int, query_tokens: Sequence[int], output_tokens: Sequence[int]
) -> ContextBudget:
    """Return the score curve over k for each kind of demonstrations, and the number that fits.

    Args:
        arms: prompting arms with their answers to the same items, including zero-shot. Arms with alternative
            instructions or constrained decoding are ignored.
        items: those items.
        context: the base's context length in tokens.
        query_tokens: lengths of the dev prompts without demonstrations.
        output_tokens: lengths of the training answers.
    """
    query, output = (int(np.percentile(lengths, 99, method="higher")) for lengths in (query_tokens, output_tokens))
    zero = next(a for a in arms if a.arm.name == ZERO_SHOT.name)
    kinds: dict[str, dict[int, list[Answers]]] = defaultdict(lambda: defaultdict(list))
    for answers in arms:
        if answers.arm.shots and not (answers.arm.instruction or answers.arm.optimized or answers.arm.constrained):
            kinds[_kind(answers)][answers.arm.shots].append(answers)
    free = context - query - output
    curves = []
    for name, by_shots in kinds.items():
        # The best of several draws, which is the one a static prompt would use.
        chosen = [max(draws, key=lambda a: items.score(a).value) for _, draws in sorted(by_shots.items())]
        curves.append(_curve(name, [zero, *chosen], items, free))
    return ContextBudget(items=len(items.clusters), context=context, query_p99=query, output_p99=output, curves=curves)


def _kind(answers: Answers) -> str:
    arm = answers.arm
    if arm.retriever is None:
        return arm.kind
    diverse = "" if arm.mmr is None else f", MMR {arm.mmr:g}"
    return f"{arm.kind} by {arm.retriever}{diverse}{', similar first' if arm.order == 'similar_first' else ''}"


def _curve(name: str, arms: Sequence[Answers], items: Items, free: int) -> ShotCurve:
    """Return the curve of arms that differ only in k, zero-shot first; ``free`` tokens can hold demonstrations."""
    scores = [items.score(a) for a in arms]
    best = max(range(len(arms)), key=lambda n: (scores[n].value, -arms[n].arm.shots))
    first, longest = arms[0].arm, arms[-1].arm
    each = (longest.prompt_tokens - first.prompt_tokens) / longest.shots
    last = _last_doubling(arms, items)
    return ShotCurve(
        name=name,
        points=[
            ShotPoint(arm=a.arm.name, shots=a.arm.shots, score=score, prompt_tokens=a.arm.prompt_tokens)
            for a, score in zip(arms, scores, strict=True)
        ],
        best=arms[best].arm.shots,
        enough=cheapest_enough(arms[: best + 1], arms[best], items).arm.shots,
        tokens_per_example=each,
        most=max(int(free / each), 0) if each > 0 else 0,
        last=last,
        rising=_rising(last, items.margin),
    )


def cheapest_enough(arms: Sequence[Answers], best: Answers, items: Items) -> Answers:
    """Return the arm with the shortest prompts whose score is within the margin of the best arm's.

    The whole 95% interval of its paired difference must lie above minus the margin; the best arm itself always
    qualifies.
    """
    for arm in sorted(arms, key=lambda a: a.arm.prompt_tokens):
        if arm is best or items.difference(arm, best)[1].low > -items.margin:
            return arm
    raise AssertionError("the best is one of the arms")


def _last_doubling(arms: Sequence[Answers], items: Items) -> Doubling | None:
    after = arms[-1]
    halves = [a for a in arms if 0 < 2 * a.arm.shots <= after.arm.shots]
    return per_doubling(after, halves[-1], after.arm.shots, halves[-1].arm.shots, items) if halves else None


def _rising(last: Doubling | None, margin: float) -> Answer:
    if last is None:
        return "unclear"
    if last.interval.low > 0:
        return "yes"
    return "no" if last.interval.high <= margin else "unclear"
