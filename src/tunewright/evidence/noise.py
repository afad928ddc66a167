"""The evidence's noise floor: changes between two runs of the same arm."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright.evidence.base import Part


class NoiseFloor(Part):
    """Differences between two runs of the base on the same items in different batches.

    In low precision the batch affects the order of additions, and so which of two nearly tied tokens wins (Yuan et al.
    2025, arXiv 2506.09501). A difference between arms that is not larger than this noise shows nothing.
    """

    items: Annotated[int, Field(description="Test items with distinct prompts, sampled by the seed.")]
    changed: Annotated[int, Field(description="Items whose second answer differs from the first.")]
    score_difference: Annotated[float, Field(description="Second score minus the first, by the deciding metric.")]
    how: Annotated[str, Field(description="The difference between the two runs.")]
