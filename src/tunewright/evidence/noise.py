"""The evidence's word on how much answers move although nothing was changed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright.evidence.base import Part


class NoiseFloor(Part):
    """The base answered the same items twice, in other company each time: what differs is noise of the measurement.

    In low precision the rows of a batch decide in which order numbers are added up, and so which of two all but equal
    tokens wins (Yuan et al. 2025, arXiv 2506.09501). A difference between arms that is no larger says nothing.
    """

    items: Annotated[int, Field(description="Test items of distinct prompts, drawn by the seed.")]
    changed: Annotated[int, Field(description="Items whose second answer is another text.")]
    score_difference: Annotated[float, Field(description="Second score minus the first, by the deciding metric.")]
    how: Annotated[str, Field(description="What was changed between the two.")]
