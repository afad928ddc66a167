"""Scorers: each item's own score, and the statistics that score any set of items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunewright.config import MetricName
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.examples import INSTRUCTIONS, Example

Floats = NDArray[np.float64]

Kind = Literal["right or wrong", "mean", "corpus"]
"""right or wrong: each item scores 0 or 1, and the metric is their mean. mean: each item scores from 0 to 1. corpus:
the metric is of the items' counts together (BLEU), and is not the mean of the items' scores."""


@dataclass(frozen=True)
class AnsweredItem:
    """One item: the answer and the references."""

    answer: str
    example: Example
    references: tuple[str, ...]
    """The ideal answers, the example's own first; one, unless the metric takes several at once."""

    @property
    def reference(self) -> str:
        """The ideal answer that is compared."""
        return self.references[0]


@dataclass(frozen=True)
class ItemScore:
    """One item's own score from 0 to 1, and its contribution to the statistics of a set of items."""

    value: float
    statistics: tuple[float, ...]
    outside: bool = False
    """The answer is outside the declared choices."""


@dataclass(frozen=True)
class Unscored:
    """The reason for an item without a score: it is left out and counted, never taken as zero."""

    reason: str


def mean_score(value: float, *, outside: bool = False) -> ItemScore:
    """Return one item's score, for a metric that is the mean of its items' scores."""
    return ItemScore(value, (value, 1.0), outside)


def mean_of(sums: Floats) -> Floats:
    """Return the mean from summed statistics; [..., 2] to [...]."""
    mean: Floats = sums[..., 0] / sums[..., 1]
    return mean


@dataclass(frozen=True)
class Scorer:
    """A metric of the config, ready to score answers."""

    name: MetricName
    kind: Kind
    definition: str
    """The exact definition in words; for sacrebleu's metrics, also its signature."""
    columns: int
    """The function that computes the statistics of one item."""
    item: Callable[[AnsweredItem], ItemScore | Unscored]
    corpus: Callable[[Floats], Floats] = field(default=mean_of)
    """The function that scores summed statistics: [..., columns] to [...], from 0 to 1."""
    of_several: str | None = None
    """The definition for several references per item, if the metric takes them at once (None: the best one's score)."""

    def definition_for(self, several: bool) -> str:
        """Return the definition, for items with or without several references."""
        if not several:
            return self.definition
        return self.of_several or f"{self.definition}; an item's best over all references of its input"

    def score(self, pair: AnsweredItem) -> ItemScore | Unscored:
        """Score an answer by all its references at once, or by the best reference (the first of equals)."""
        if self.of_several or len(pair.references) == 1:
            return self.item(pair)
        each = [self.item(replace(pair, references=(reference,))) for reference in pair.references]
        scored = [score for score in each if isinstance(score, ItemScore)]
        return max(scored, key=lambda score: score.value) if scored else each[0]


@dataclass(frozen=True)
class Scores:
    """Every item's score by one metric, in the items' order."""

    scorer: Scorer
    values: Floats
    """Each item's own score, [items]; NaN where it is unscored."""
    statistics: Floats
    """[items, columns]; zeros where an item is unscored."""
    unscored: dict[int, str]
    """Position to reason."""
    outside: int
    """Number of answers outside the declared choices."""

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Mask of the scored items; [items]."""
        return ~np.isnan(self.values)

    @property
    def reasons(self) -> dict[str, int]:
        """The reasons for unscored items, with their counts."""
        return dict(Counter(self.unscored.values()))

    def total(self) -> float:
        """Return the metric of all scored items together, from 0 to 1."""
        if not self.scored.any():
            why = "; ".join(f"{reason} ({count})" for reason, count in self.reasons.items())
            raise UserError(f"No item can be scored by {self.scorer.name}: {why}", where="evaluate.metric")
        return float(self.scorer.corpus(self.statistics[self.scored].sum(axis=0)))


def references_of(examples: Sequence[Example], among: Sequence[Example] | None = None) -> list[tuple[str, ...]]:
    """Return each example's references: its own output, then the other outputs of the same input and system turn.

    Inputs are the same as in ``Example.prompt_key``; outputs that differ only in outer white space count once.
    ``among`` are all rows of their split, whose outputs count as references (None: the examples themselves).
    """
    outputs: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for example in examples if among is None else among:
        outputs.setdefault(_same_input(example), {}).setdefault(example.output.strip(), example.output)
    return [
        tuple(({example.output.strip(): example.output} | outputs.get(_same_input(example), {})).values())
        for example in examples
    ]


def _same_input(example: Example) -> tuple[str, tuple[str, ...]]:
    return example.prompt_key, tuple(m.content for m in example.prompt if m.role in INSTRUCTIONS)


def score_all(
    scorer: Scorer, answers: Sequence[str], examples: Sequence[Example], among: Sequence[Example] | None = None
) -> Scores:
    """Score every answer, one for each example, by all references of its input (see `references_of`)."""
    values = np.full(len(answers), np.nan)
    statistics = np.zeros((len(answers), scorer.columns))
    unscored: dict[int, str] = {}
    outside = 0
    items = zip(answers, examples, references_of(examples, among), strict=True)
    for place, (answer, example, references) in enumerate(items):
        result = scorer.score(AnsweredItem(answer, example, references))
        if isinstance(result, Unscored):
            unscored[place] = result.reason
            continue
        values[place], statistics[place] = result.value, result.statistics
        outside += result.outside
    return Scores(scorer, values, statistics, unscored, outside)


def check_references(scorers: Sequence[Scorer], examples: Sequence[Example], split: str, reporter: Reporter) -> None:
    """Score the references as answers: a metric that they cannot win measures nothing."""
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
