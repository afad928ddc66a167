"""The items of a split that authors made: how many are theirs, and if a gain holds without items near training rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright.config import Overlap
from tunewright.core.text import count_of
from tunewright.evidence.common import Contrast, Part
from tunewright.metrics import p_text, points_text


class AuthorsSplit(Part):
    """The split that the authors of the rows made, as far as it concerns these items."""

    source: Annotated[str, Field(description="Column or files that gave the rows their split.")]
    on_overlap: Annotated[Overlap, Field(description="data.on_overlap of the dataset version.")]
    items: int
    given: Annotated[int, Field(description="Items that the authors gave to this split; the rest was drawn or moved.")]
    missing: Annotated[
        int, Field(description="Rows that the authors gave to this split, in an earlier version and not in this one.")
    ] = 0
    near: Annotated[
        int, Field(description="Items that share a cluster with a training row; only data.on_overlap: keep allows it.")
    ]
    far: Annotated[
        Contrast | None, Field(description="The contrast on the other items; null: near is 0, or none is scored.")
    ] = None

    def whose(self, split: str) -> str:
        """Return the sentence that says whose split it is."""
        text = (
            f"The split is its authors' ({self.source}): they gave {self.given:,} of the "
            f"{count_of(self.items, f'{split} item')} to {split}."
        )
        if not self.missing:
            return text
        return f"{text} {count_of(self.missing, 'row')} of theirs left out: the score compares with no published one."

    def near_text(self, *, holds: bool) -> str:
        """Return the sentence on the items near a training row, and the difference without them."""
        text = f"{count_of(self.near, 'item')} share a cluster with a training row (data.on_overlap: {self.on_overlap})"
        if self.far is None:
            return f"{text}, and no other item is scored: the split cannot show a gain on new inputs."
        return (
            f"{text}. On the other {self.far.scored:,}: {points_text(self.far.difference)} points, 95% interval "
            f"{self.far.interval.points}, {p_text(self.far.p_value)} ({self.far.test}). The gain "
            f"{'holds' if holds else 'is not shown'} there."
        )
