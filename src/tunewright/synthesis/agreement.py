"""The sample that most samples agree with, by the project's metric, and scores against a reference.

For a metric of right and wrong this is the majority of Wang et al. 2022 (self-consistency, arXiv 2203.11171); for a
graded one, the minimum Bayes risk choice of Kumar and Byrne 2004.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunewright.data.examples import Example, Message
from tunewright.metrics import ItemScore, Pair, Scorer, normalised

_WITHOUT_REFERENCE = ("regex", "json_valid", "call_schema_valid", "irrelevance_detection")


def needs_no_reference(scorer: Scorer) -> bool:
    """Return whether a metric scores an answer alone: samples agree by it although they differ."""
    return scorer.name.split()[0] in _WITHOUT_REFERENCE


def choose(
    scorer: Scorer, prompt: tuple[Message, ...], samples: Sequence[Message], asked: int
) -> tuple[Message, float]:
    """Return the sample with the highest mean score against all samples, the first of equals, and that mean.

    Args:
        scorer: the project's metric. Texts decide where it cannot score a pair, or needs no reference.
        prompt: the input.
        samples: the usable samples, at least one.
        asked: number of samples asked for; missing ones count as 0.
    """
    scores = np.zeros((len(samples), len(samples)))  # [answer, reference]
    for j, reference in enumerate(samples):
        for i, answer in enumerate(samples):
            scores[i, j] = _score(scorer, prompt, answer.text, reference)
    means = scores.sum(axis=1) / asked
    best = int(means.argmax())
    return samples[best], float(means[best])


def _score(scorer: Scorer, prompt: tuple[Message, ...], answer: str, reference: Message) -> float:
    same = float(normalised(answer) == normalised(reference.text))
    if same or needs_no_reference(scorer):
        return same
    scored = score_of(scorer, Example((*prompt, reference)), answer)
    return same if scored is None else scored


def score_of(scorer: Scorer, example: Example, answer: str) -> float | None:
    """Return the answer's score against the example's output, from 0 to 1; None if the metric cannot score it."""
    result = scorer.score(Pair(answer, example, (example.output,)))
    return result.value if isinstance(result, ItemScore) else None
