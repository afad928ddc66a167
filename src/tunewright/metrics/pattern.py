"""Format validity: whether a pattern matches the answer."""

from __future__ import annotations

import re

from tunewright.config import MetricName
from tunewright.metrics.exact import normalised
from tunewright.metrics.scorer import ItemScore, Pair, Scorer, mean_score


def matches(name: MetricName, pattern: str) -> Scorer:
    """Return a scorer: 1 if the pattern matches the whole answer (stripped), else 0; the reference is ignored."""
    compiled = re.compile(pattern)

    def item(pair: Pair) -> ItemScore:
        return mean_score(float(compiled.fullmatch(normalised(pair.answer)) is not None))

    definition = f"the share of answers that {pattern!r} matches whole (Python's re; outer white space stripped)"
    return Scorer(name, "right or wrong", definition, 2, item)
