"""What each section of the evidence is built from; the sections import this, and ``evidence.py`` imports them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Any part of the evidence: frozen, finite, and of no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(Part):
    """A 95% interval, in the metric's own unit (shares from 0 to 1)."""

    low: float
    high: float


class Score(Part):
    """A value with its interval, as a share from 0 to 1 (a corpus BLEU of 43.2 is 0.432)."""

    value: float
    interval: Interval
    method: Annotated[str, Field(description="How the interval was made, e.g. 'Wilson'.")]


class References(Part):
    """How many references the items have, where an input stands in several rows with different outputs."""

    items: int
    inputs: Annotated[int, Field(description="Distinct inputs, case and white space set aside.")]
    several: Annotated[int, Field(description="Of these inputs, those with more than one reference.")]
    references: Annotated[int, Field(description="Distinct outputs of all inputs together.")]

    @property
    def text(self) -> str:
        """As in ``30 test items``: ``5 distinct inputs with 6.0 references each``."""
        inputs = f"{self.inputs:,} distinct input{'' if self.inputs == 1 else 's'}"
        if self.several == self.inputs:
            return f"{inputs} with {self.references / self.inputs:.1f} references each"
        return f"{inputs} with {self.references / self.inputs:.1f} references on average"


class ArmScore(Score):
    """One arm's score by one metric, and the items that it is of."""

    scored: Annotated[int, Field(description="Items that the value is of.")]
    unscored: Annotated[
        dict[str, int], Field(description="Why the other items are left out, and how many for each reason.")
    ]
    outside: Annotated[
        int, Field(description="Answers that are none of the declared choices, counted wrong; 0 by other metrics.")
    ] = 0
