"""Building blocks of the evidence's sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A part of the evidence: frozen, with finite numbers and no extra keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(Part):
    """A 95% interval in the metric's own unit (shares from 0 to 1)."""

    low: float
    high: float


class Score(Part):
    """A value with its interval, as a share from 0 to 1 (a corpus BLEU of 43.2 is 0.432)."""

    value: float
    interval: Interval
    method: Annotated[str, Field(description="Method of the interval, e.g. 'Wilson'.")]


class References(Part):
    """Counts of references, for inputs that occur in several rows with different outputs."""

    items: int
    inputs: Annotated[int, Field(description="Distinct inputs, ignoring case and white space.")]
    several: Annotated[int, Field(description="Inputs with more than one reference.")]
    references: Annotated[int, Field(description="Distinct outputs, summed over inputs.")]

    @property
    def text(self) -> str:
        """Text such as ``5 distinct inputs with 6.0 references each``, to follow ``30 test items``."""
        inputs = f"{self.inputs:,} distinct input{'' if self.inputs == 1 else 's'}"
        if self.several == self.inputs:
            return f"{inputs} with {self.references / self.inputs:.1f} references each"
        return f"{inputs} with {self.references / self.inputs:.1f} references on average"


class ArmScore(Score):
    """One arm's score by one metric, with the number of scored items."""

    scored: Annotated[int, Field(description="Items that were scored.")]
    unscored: Annotated[dict[str, int], Field(description="Reason to number of unscored items.")]
    outside: Annotated[
        int, Field(description="Answers outside the declared choices, counted as wrong; 0 with other metrics.")
    ] = 0
