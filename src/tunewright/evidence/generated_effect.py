"""The evidence's section ``generated_effect``: an adapter against one trained without the generated rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright.config import MetricName
from tunewright.evidence.common import ArmScore, Interval, Part
from tunewright.metrics.labels import p_text, points_text, score_text


class GeneratedEffect(Part):
    """Two adapters of one dataset version, of which one was trained without the generated rows, on people's test items.

    The comparison is not a declared one: it decides nothing, and its p-value is not adjusted.
    """

    generated: Annotated[int, Field(description="Generated rows that the first adapter was trained on.")]
    accepted: Annotated[int, Field(description="Those that a person had accepted when this was measured.")]
    people: Annotated[int, Field(description="Training rows of people, which both adapters were trained on.")]
    without: Annotated[str, Field(description="Evaluation of the adapter trained without the generated rows.")]
    adapter: Annotated[str, Field(description="Name of that adapter.")]
    metric: MetricName
    items: Annotated[int, Field(description="Test items of people, scored in both.")]
    score_with: ArmScore
    score_without: ArmScore
    difference: Annotated[float, Field(description="Score with the generated rows minus the score without them.")]
    interval: Interval
    interval_method: str
    p_value: float
    test: str

    @property
    def line(self) -> str:
        """The finding in one sentence."""
        low, high = points_text(self.interval.low), points_text(self.interval.high)
        ours, theirs = (score_text(self.metric, each.value) for each in (self.score_with, self.score_without))
        return (
            f"{self.generated:,} of {self.generated + self.people:,} training rows are generated ({self.accepted:,} "
            f"accepted by people). With them the adapter scores {ours}, and {theirs} without them, on {self.items:,} "
            f"test items of people: {points_text(self.difference)} points, 95% interval {low} to {high}, "
            f"{p_text(self.p_value)} ({self.test}; not a declared contrast)."
        )
