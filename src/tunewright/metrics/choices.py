"""Accuracy over a declared list of answers."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.config import MetricName
from tunewright.metrics.exact import normalised
from tunewright.metrics.scorer import ItemScore, Pair, Scorer, Unscored, mean_score


def accuracy(name: MetricName, choices: Sequence[str]) -> Scorer:
    """Return a scorer of accuracy over the choices; an answer outside them is wrong and counted.

    A reference outside the choices is a mistake in data or config: its item is unscored.
    """
    known = {normalised(choice) for choice in choices}

    def item(pair: Pair) -> ItemScore | Unscored:
        answer, reference = normalised(pair.answer), normalised(pair.reference)
        if reference not in known:
            return Unscored("the reference is none of the choices")
        return mean_score(float(answer == reference), outside=answer not in known)

    definition = f"the share of right answers among {', '.join(map(repr, choices))} (spelling as for exact_match)"
    return Scorer(name, "right or wrong", definition, 2, item)
