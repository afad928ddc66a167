"""Before anything is answered: whether a metric suits the references at all."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.core.progress import Reporter
from tunewright.data.examples import Example
from tunewright.metrics.scorer import Scorer, score_all


def check_references(scorers: Sequence[Scorer], examples: Sequence[Example], split: str, reporter: Reporter) -> None:
    """Score the references as if they had been answered: a metric that cannot be won measures nothing.

    Args:
        scorers: the config's metrics.
        examples: of the split.
        split: its name.
        reporter: hears which references cannot be scored, and which score less than 1 themselves.

    Raises:
        UserError: a metric that can score none of them, or a function of the project's own that fails.
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
