"""Items of an evaluation by the effect of training on them, and by their distance from the training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tunewright.core.errors import UserError
from tunewright.evidence.schema import Contrast, Evidence, Item

Change = Literal["broken", "fixed", "both right", "both wrong", "not scored"]
CHANGES: tuple[Change, ...] = get_args(Change)
"""Effects of the treatment on an item, by the deciding metric. With graded scores, *fixed* and *broken* mean a higher
and a lower score, *both right* the full score twice, and *both wrong* the same lower score."""


def change_of(item: Item, treatment: str, control: str, metric: str) -> Change:
    """Return the treatment's effect on the item's score."""
    scores = item.scores.get(metric, {})
    ours, theirs = scores.get(treatment), scores.get(control)
    if ours is None or theirs is None:
        return "not scored"
    if ours != theirs:
        return "fixed" if ours > theirs else "broken"
    return "both right" if ours == 1 else "both wrong"


@dataclass(frozen=True)
class ItemFilter:
    """A choice of items, by the scores of two arms and by the similarity of the nearest training input."""

    treatment: str
    control: str
    change: Change | None = None
    """None: any."""
    nearest: tuple[float, float] | None = None
    """The lowest and highest similarity; None: any, also items without it."""

    @classmethod
    def of(cls, contrast: Contrast) -> ItemFilter:
        """Return the filter that keeps all items of a contrast."""
        return cls(contrast.treatment, contrast.control)


def chosen_items(evidence: Evidence, items: Sequence[Item], kept: ItemFilter) -> list[tuple[int, Item, Change]]:
    """Return the items that a filter keeps: number from 1 in the evidence's order, item, effect of the treatment.

    Raises:
        UserError: the evidence has no such arm.
    """
    names = [arm.name for arm in evidence.arms]
    for arm in (kept.treatment, kept.control):
        if arm not in names:
            raise UserError(
                f"The evaluation has no arm {arm!r}", where=evidence.id, fix=f"Its arms: {', '.join(names)}."
            )
    found = []
    for number, item in enumerate(items, start=1):
        change = change_of(item, kept.treatment, kept.control, evidence.metric)
        if kept.change not in (None, change):
            continue
        if kept.nearest is not None and not _within(item.nearest, kept.nearest):
            continue
        found.append((number, item, change))
    return found


def _within(value: float | None, limits: tuple[float, float]) -> bool:
    low, high = limits
    # As bands are: from low up to but excluding high; the last one includes 1.
    return value is not None and low <= value and (value < high or value == high == 1)
