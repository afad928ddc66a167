"""A check before any answer: whether a metric suits the references."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.core.progress import Reporter
from tunewright.data.examples import Example
from tunewright.metrics.scorer import Scorer, score_all


def check_references(scorers: Sequence[Scorer], examples: Sequence[Example], split: str, reporter: Reporter) -> None:
    """Score the references as answers: a metric that they cannot win measures nothing.

    Args:
        scorers: the config's metrics.
        examples: examples of the split.
        split: name of the split.
        reporter: warns of references that cannot be scored, or that score less than 1.

    Raises:
        UserError: a metric can score none of them, or a custom function fails.
    """
    for scorer in scorers:
        scores = score_all(scorer, [example.output for example in examples], examples)
        scores.total()
        if scores.unscored:
            why = "; ".join(f"{reason} ({count:,})" for reason, count in scores.reasons.items())
            reporter.warn(
                f"{len(scores.unscored):,} of {len(examples):,} {split} items cannot be scored by {scorer.name} and "
                f"are left out: {why}"
            )
        below = int((scores.values < 1).sum())
        if below:
            reporter.warn(
                f"By {scorer.name} {below:,} of {len(examples):,} {split} references score less than 1 themselves: no "
                "answer can be right there. Look at the metric's settings, or at the data."
            )
