"""Scores by distance from the training data: a gain on near copies alone is memorization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunewright.data.dedup.leakage import BANDS, band_of
from tunewright.evidence.common import Band, BandScore, OutputTemplates, Subset, TrainSimilarity
from tunewright.evidence.schema import Contrast
from tunewright.evidence.scoring import ScoredArms, contrast, score_of
from tunewright.evidence.statistics import RESAMPLES
from tunewright.metrics import Scores


@dataclass(frozen=True)
class Distances:
    """Similarity of items to the training rows, by pair key."""

    nearest: Mapping[str, float]
    """The similarity of the nearest training input."""
    new_template: Mapping[str, bool] | None
    """True if no training row has the item's output template; None where templates carry no information."""


SIMILARITY = "Jaccard similarity of the inputs' character 4-grams, without what all inputs begin and end with"


def scores_by_distance(
    scored: ScoredArms, nearest: Sequence[float], deciding: Contrast, seed: int, resamples: int = RESAMPLES
) -> TrainSimilarity:
    """Return each arm's score by the deciding metric, and the deciding difference, by bands of similarity."""
    place = np.array([band_of(similarity) for similarity in nearest])
    median = float(np.median(nearest))
    far = np.array(nearest) <= median
    return TrainSimilarity(
        similarity=SIMILARITY,
        treatment=deciding.treatment,
        control=deciding.control,
        farther=Band(low=0.0, high=median, **dict(_subset(far, scored, deciding, seed, resamples))),
        bands=tuple(
            Band(low=low, high=high, **dict(_subset(place == number, scored, deciding, seed, resamples)))
            for number, (low, high) in enumerate(BANDS)
            if (place == number).any()
        ),
    )


def scores_by_template(
    scored: ScoredArms, new: Sequence[bool], deciding: Contrast, seed: int, resamples: int = RESAMPLES
) -> OutputTemplates:
    """Return each arm's score by the deciding metric, for new output templates and for known ones."""
    here = np.array(new, dtype=bool)
    seen, unseen = (_subset(part, scored, deciding, seed, resamples) if part.any() else None for part in (~here, here))
    return OutputTemplates(treatment=deciding.treatment, control=deciding.control, seen=seen, new=unseen)


def _subset(
    here: NDArray[np.bool_],
    scored: ScoredArms,
    deciding: Contrast,
    seed: int,
    resamples: int,
) -> Subset:
    clusters = [name for name, inside in zip(scored.clusters, here, strict=True) if inside]
    arms = {name: _part(scores, here) for name, scores in scored.by_metric[deciding.metric].items()}
    ours, theirs = arms[deciding.treatment], arms[deciding.control]
    difference = interval = None
    if (ours.scored & theirs.scored).any():
        measured = contrast(
            treatment=deciding.treatment,
            control=deciding.control,
            ours=ours,
            theirs=theirs,
            clusters=clusters,
            seed=seed,
            resamples=resamples,
        )
        difference, interval = measured.difference, measured.interval
    return Subset(
        items=len(clusters),
        clusters=len(set(clusters)),
        scores={
            name: BandScore(value=own.value, interval=own.interval, method=own.method, scored=own.scored)
            for name, part in arms.items()
            if part.scored.any() and (own := score_of(part, clusters, seed, resamples))
        },
        difference=difference,
        interval=interval,
    )


def _part(scores: Scores, here: NDArray[np.bool_]) -> Scores:
    """Return the scores of some of the items, without their count of answers outside the choices."""
    places = np.flatnonzero(here).tolist()
    unscored = {new: scores.unscored[old] for new, old in enumerate(places) if old in scores.unscored}
    return Scores(scores.scorer, scores.values[here], scores.statistics[here], unscored, 0)
