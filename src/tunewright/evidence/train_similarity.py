"""The evidence's sections of scores by how near the evaluated items are to what was trained on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright.evidence.base import Interval, Part, Score


class BandScore(Score):
    """One arm on the items of a band, by the deciding metric."""

    scored: Annotated[int, Field(description="Items of the band that are scored for this arm.")]


class Subset(Part):
    """Some of the items, and what each arm scores on them."""

    items: int
    clusters: int
    scores: Annotated[dict[str, BandScore], Field(description="By arm; without those that have no scored item here.")]
    difference: Annotated[
        float | None, Field(description="Of the contrast that decides, on these items; null: none is scored in both.")
    ] = None
    interval: Annotated[Interval | None, Field(description="95%, of the difference; not adjusted for the bands.")] = (
        None
    )


class Band(Subset):
    """Items by the similarity of their nearest training input: from low to below high; the last one has 1 in it.

    The farther half has its high in it.
    """

    low: float
    high: float


class TrainSimilarity(Part):
    """How near the items are to the training rows, and what each arm scores by that."""

    similarity: Annotated[str, Field(description="What is compared, and how.")]
    treatment: str
    control: str
    farther: Annotated[
        Band, Field(description="The farther half of the items: those up to the median similarity, which is its high.")
    ]
    bands: Annotated[tuple[Band, ...], Field(description="Those with items in them, the farthest first.")]


class OutputTemplates(Part):
    """Scores on items whose output template (quoted strings and numbers masked) is, or is not, in training."""

    treatment: str
    control: str
    seen: Annotated[Subset | None, Field(description="Items whose template training rows have; null: there are none.")]
    new: Annotated[Subset | None, Field(description="Items whose template no training row has; null: there are none.")]
