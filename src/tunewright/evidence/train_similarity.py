"""The evidence's scores by similarity of the items to the training data."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright.evidence.common import Interval, Part, Score


class BandScore(Score):
    """One arm's score on the items of a band, by the deciding metric."""

    scored: Annotated[int, Field(description="Items of the band that are scored for this arm.")]


class Subset(Part):
    """A subset of the items, with each arm's score on it."""

    items: int
    clusters: int
    scores: Annotated[
        dict[str, BandScore], Field(description="Scores by arm, without arms that have no scored item here.")
    ]
    difference: Annotated[
        float | None,
        Field(description="Difference of the deciding contrast on these items; null: none is scored in both arms."),
    ] = None
    interval: Annotated[
        Interval | None, Field(description="95% interval of the difference, not adjusted for the number of bands.")
    ] = None


class Band(Subset):
    """Items by similarity to their nearest training input: from low up to but excluding high; the last band includes 1.

    The farther half includes its high.
    """

    low: float
    high: float


class TrainSimilarity(Part):
    """Similarity of the items to the training rows, and each arm's score by it."""

    similarity: Annotated[str, Field(description="The compared texts, and the similarity measure.")]
    treatment: str
    control: str
    farther: Annotated[
        Band,
        Field(
            description="The farther half of the items: up to and including the median similarity, which is its high."
        ),
    ]
    bands: Annotated[tuple[Band, ...], Field(description="Bands that contain items, the farthest first.")]


class OutputTemplates(Part):
    """Scores on items whose output template (quoted strings and numbers masked) is known from training, or new."""

    treatment: str
    control: str
    seen: Annotated[
        Subset | None,
        Field(description="Items with a template that training rows have; null: there are no such items."),
    ]
    new: Annotated[
        Subset | None,
        Field(description="Items with a template that no training row has; null: there are no such items."),
    ]
