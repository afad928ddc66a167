"""Scores by distance from the training data: a gain that near copies alone bring was learnt by heart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tunewright.data.neighbours.leak import BANDS, band_of
from tunewright.evaluation.evidence import Contrast
from tunewright.evaluation.nearness import Band, BandScore, Nearness
from tunewright.evaluation.scoring import ScoredArms, contrast, score_of
from tunewright.evaluation.statistics import RESAMPLES
from tunewright.metrics import Scores

SIMILARITY = "Jaccard similarity of the inputs' character 4-grams, without what all inputs begin and end with"


def scores_by_distance(
    scored: ScoredArms, nearest: Sequence[float], deciding: Contrast, seed: int, resamples: int = RESAMPLES
) -> Nearness:
    """Each arm's score by the deciding metric, and the difference that decides, in bands of similarity.

    Args:
        scored: the arms on the test items.
        nearest: of each item the similarity of its nearest training input, from 0 to 1.
        deciding: the contrast that decides; says which two arms are compared, and by what metric.
        seed: decides the resamples.
        resamples: how many.
    """
    place = np.array([band_of(similarity) for similarity in nearest])
    median = float(np.median(nearest))
    return Nearness(
        similarity=SIMILARITY,
        treatment=deciding.treatment,
        control=deciding.control,
        farther=_band((0.0, median), np.array(nearest) <= median, scored, deciding, seed, resamples),
        bands=tuple(
            _band(ends, place == number, scored, deciding, seed, resamples)
            for number, ends in enumerate(BANDS)
            if (place == number).any()
        ),
    )


def _band(
    ends: tuple[float, float],
    here: NDArray[np.bool_],
    scored: ScoredArms,
    deciding: Contrast,
    seed: int,
    resamples: int,
) -> Band:
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
    low, high = ends
    return Band(
        low=low,
        high=high,
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
    """The scores of some of the items; how many of them are outside the choices is not known."""
    places = np.flatnonzero(here).tolist()
    unscored = {new: scores.unscored[old] for new, old in enumerate(places) if old in scores.unscored}
    return Scores(scores.scorer, scores.values[here], scores.statistics[here], unscored, 0)
