"""Scores and contrasts of arms, computed from their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunewright.config import MetricName
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.dedup.leakage import BANDS, band_of
from tunewright.data.examples import Example
from tunewright.evidence.common import (
    ArmScore,
    Band,
    BandScore,
    OutputTemplates,
    References,
    Subset,
    TrainSimilarity,
)
from tunewright.evidence.power import detectable, minimum_detectable_effect
from tunewright.evidence.schema import Arm, ArmKind, Contrast, Measured
from tunewright.evidence.statistics import (
    RESAMPLES,
    Floats,
    bootstrap_sums,
    cluster_sums,
    difference_interval,
    effective_items,
    exact_mcnemar,
    holm,
    largest_item_change,
    percentiles,
    permutation_test,
    wilson,
)
from tunewright.metrics import Scorer, Scores, references_of, score_all


def measured_metrics(scorers: Sequence[Scorer], *, several: bool) -> dict[str, Measured]:
    """Return the metrics' definitions for the evidence; ``several``: some items have several references."""
    return {s.name: Measured(kind=s.kind, definition=s.definition_for(several)) for s in scorers}


def count_references(examples: Sequence[Example]) -> References | None:
    """Count the items' inputs and references; None if no input has several references."""
    of_input = {e.prompt_key: references for e, references in zip(examples, references_of(examples), strict=True)}
    counts = [len(references) for references in of_input.values()]
    several = sum(count > 1 for count in counts)
    found = References(items=len(examples), inputs=len(counts), several=several, references=sum(counts))
    return found if several else None


def report_references(examples: Sequence[Example], what: str, reporter: Reporter) -> None:
    """Report the number of references if some inputs have several; ``what`` names one item."""
    found = count_references(examples)
    if found is not None:
        reporter.say(f"{found.items:,} {what}s, {found.text}: an answer is scored by all references of its input.")


@dataclass(frozen=True)
class ScoredArms:
    """The answers of several arms to the same items, each scored once by every metric."""

    clusters: tuple[str, ...]
    by_metric: Mapping[MetricName, Mapping[str, Scores]]
    """Metric (the deciding one first) to arm name to scores."""

    def among(self, here: NDArray[np.bool_]) -> ScoredArms:
        """Return the scores of some of the items."""
        clusters = tuple(name for name, inside in zip(self.clusters, here, strict=True) if inside)
        return ScoredArms(
            clusters,
            {
                metric: {arm: _scores_of(scores, here) for arm, scores in arms.items()}
                for metric, arms in self.by_metric.items()
            },
        )

    def __or__(self, more: ScoredArms) -> ScoredArms:
        """Return the scores together with those of other arms on the same items."""
        found = {metric: {**arms, **more.by_metric[metric]} for metric, arms in self.by_metric.items()}
        return replace(self, by_metric=found)

    def of_arm(self, arm: str) -> list[Scores]:
        """Return one arm's scores by every metric."""
        return [arms[arm] for arms in self.by_metric.values()]

    def of_item(self, place: int) -> dict[MetricName, dict[str, float]]:
        """Return one item's scores, for the arms in which it is scored."""
        return {
            metric: {arm: float(s.values[place]) for arm, s in arms.items() if place not in s.unscored}
            for metric, arms in self.by_metric.items()
        }

    def leaving_out(self, arm: str, gaps: Mapping[int, str]) -> ScoredArms:
        """Return the scores with some items of one arm unscored; ``gaps`` maps positions to reasons."""
        if not gaps:
            return self
        kept = {metric: {**arms, arm: leave_out(arms[arm], gaps)} for metric, arms in self.by_metric.items()}
        return replace(self, by_metric=kept)

    def why_not(self, place: int) -> dict[MetricName, dict[str, str]] | None:
        """Return the reasons why one item is unscored, by metric and arm; None if it is scored everywhere."""
        reasons = {
            metric: {arm: s.unscored[place] for arm, s in arms.items() if place in s.unscored}
            for metric, arms in self.by_metric.items()
        }
        return {metric: arms for metric, arms in reasons.items() if arms} or None


def leave_out(scores: Scores, gaps: Mapping[int, str]) -> Scores:
    """Return the scores with these items unscored, by position and reason."""
    values, statistics, places = scores.values.copy(), scores.statistics.copy(), list(gaps)
    values[places], statistics[places] = np.nan, 0.0
    return replace(scores, values=values, statistics=statistics, unscored={**scores.unscored, **gaps})


def score_arms(
    scorers: Sequence[Scorer],
    examples: Sequence[Example],
    clusters: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    among: Sequence[Example] | None = None,
) -> ScoredArms:
    """Score every arm's answers; ``examples`` are the items' rows, ``among`` all rows of their split."""
    return ScoredArms(
        tuple(clusters),
        {s.name: {arm: score_all(s, given, examples, among) for arm, given in answers.items()} for s in scorers},
    )


# An arm


def score_arm(
    *,
    name: str,
    kind: ArmKind,
    shots: int,
    scores: Sequence[Scores],
    clusters: Sequence[str],
    truncated: int,
    prompt_tokens: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> Arm:
    """Measure one arm by every metric; ``clusters`` are per item."""
    return Arm(
        name=name,
        kind=kind,
        shots=shots,
        items=len(clusters),
        scores={each.scorer.name: score_of(each, clusters, seed, resamples) for each in scores},
        truncated=truncated,
        prompt_tokens=prompt_tokens,
    )


def score_of(scores: Scores, clusters: Sequence[str], seed: int, resamples: int = RESAMPLES) -> ArmScore:
    """Return the score of all scored items: Wilson's interval for right and wrong, else a bootstrap over clusters."""
    value = scores.total()
    values, names = scores.values[scores.scored], _of(clusters, scores.scored)
    worth = effective_items(values, names)
    if scores.scorer.kind == "right or wrong" or (scores.scorer.kind == "mean" and np.ptp(values) == 0):
        # Resampling equal graded scores gives no width; Wilson's interval assumes the widest distribution with that
        # mean.
        interval = wilson(value, worth)
        method = "Wilson" if round(worth) == len(values) else f"Wilson, {worth:.0f} effective items"
    else:
        sums = cluster_sums(scores.statistics[scores.scored], names)
        interval = percentiles(scores.scorer.corpus(bootstrap_sums(sums, seed, resamples)))
        method = _bootstrap_name(resamples)
    return ArmScore(
        value=value,
        interval=interval,
        method=method,
        scored=len(values),
        unscored=scores.reasons,
        outside=scores.outside,
    )


# A contrast


def contrast(
    *,
    treatment: str,
    control: str,
    ours: Scores,
    theirs: Scores,
    clusters: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> Contrast:
    """Compare two arms by one metric, on the items that are scored in both."""
    assert ours.scorer.name == theirs.scorer.name
    both = ours.scored & theirs.scored
    if not both.any():
        raise UserError(
            f"No item is scored by {ours.scorer.name} in both {treatment} and {control}: {_left_out(ours, theirs)}",
            where="evaluate.metric",
        )
    names = _of(clusters, both)
    changes = ours.values[both] - theirs.values[both]
    sums = cluster_sums(ours.statistics[both], names), cluster_sums(theirs.statistics[both], names)
    if ours.scorer.kind == "corpus":
        measured = _corpus_contrast(*sums, ours.scorer, seed, resamples)
    else:
        measured = _mean_contrast(changes, *sums, names, ours.scorer, seed, resamples)
    return Contrast(
        treatment=treatment,
        control=control,
        metric=ours.scorer.name,
        scored=int(both.sum()),
        left_out=_left_out(ours, theirs),
        clusters=len(set(names)),
        fixed=int((changes > 0).sum()),
        broken=int((changes < 0).sum()),
        p_adjusted=None,
        **measured,
    )


def declared_contrasts(
    scored: ScoredArms, pairs: Sequence[tuple[str, str]], seed: int, resamples: int = RESAMPLES
) -> list[Contrast]:
    """Return each treatment against its control by every metric; the first one decides.

    Contrasts by the first metric are the declared contrasts, with p-values adjusted for multiple
    tests. Contrasts by the other metrics follow.
    """
    measured: list[Contrast] = []
    for metric in scored.by_metric:
        found = [scored_contrast(scored, metric, *pair, seed, resamples) for pair in pairs]
        measured += found if measured else adjusted(found)
    return measured


def scored_contrast(
    scored: ScoredArms, metric: MetricName, treatment: str, control: str, seed: int, resamples: int = RESAMPLES
) -> Contrast:
    """Return the contrast of two of the arms by one metric."""
    arms = scored.by_metric[metric]
    return contrast(
        treatment=treatment,
        control=control,
        ours=arms[treatment],
        theirs=arms[control],
        clusters=scored.clusters,
        seed=seed,
        resamples=resamples,
    )


def adjusted(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Return the declared contrasts with p-values adjusted by Holm's method."""
    return [
        each.model_copy(update={"p_adjusted": p_value})
        for each, p_value in zip(contrasts, holm([c.p_value for c in contrasts]), strict=True)
    ]


def _mean_contrast(
    changes: Floats, ours: Floats, theirs: Floats, names: Sequence[str], scorer: Scorer, seed: int, resamples: int
) -> dict[str, Any]:
    """Return the statistics of a contrast of right/wrong or graded items."""
    worth = effective_items(changes, names)
    binary = scorer.kind == "right or wrong"
    reach = 1.0 if binary else largest_item_change(changes)
    by_cluster = "" if len(set(names)) == len(names) else " by cluster"
    spread = float(changes.std())
    # Right or wrong: the variance follows from the share that changed. Grades have a spread.
    if binary or spread == 0:
        effect = minimum_detectable_effect(worth, float(np.abs(changes).mean()))
    else:
        effect = detectable(spread / worth**0.5)
    return {
        "difference": float(changes.mean()),
        "interval": difference_interval(changes, names, seed, resamples, reach=reach),
        "interval_method": f"{_bootstrap_name(resamples)}, Bonett-Price adjusted",
        "p_value": exact_mcnemar(changes, names)
        if binary
        else permutation_test(ours, theirs, scorer.corpus, seed, resamples),
        "test": f"exact McNemar{by_cluster}" if binary else _swapping_name(resamples),
        "effective_items": worth,
        "minimum_detectable_effect": effect,
    }


def _corpus_contrast(ours: Floats, theirs: Floats, scorer: Scorer, seed: int, resamples: int) -> dict[str, Any]:
    # Both arms in one draw: separate draws would lose their correlation.
    drawn = bootstrap_sums(np.hstack([ours, theirs]), seed, resamples)
    differences = scorer.corpus(drawn[:, : scorer.columns]) - scorer.corpus(drawn[:, scorer.columns :])
    error = float(differences.std())
    return {
        "difference": float(scorer.corpus(ours.sum(axis=0)) - scorer.corpus(theirs.sum(axis=0))),
        "interval": percentiles(differences),
        "interval_method": _bootstrap_name(resamples),
        "p_value": permutation_test(ours, theirs, scorer.corpus, seed, resamples),
        "test": _swapping_name(resamples),
        "effective_items": None,
        # Without any change: the share of clusters that would have had to change to be noticed.
        "minimum_detectable_effect": detectable(error) if error > 1e-12 else minimum_detectable_effect(len(ours), 0.0),
    }


def _left_out(ours: Scores, theirs: Scores) -> dict[str, int]:
    """Return reasons with numbers of items that are unscored in at least one arm."""
    return dict(Counter((theirs.unscored | ours.unscored).values()))


def _of(clusters: Sequence[str], places: Any) -> list[str]:
    return [name for name, here in zip(clusters, places, strict=True) if here]


def _bootstrap_name(resamples: int) -> str:
    return f"percentile bootstrap over clusters, {resamples:,} resamples"


def _swapping_name(trials: int) -> str:
    return f"paired randomisation by cluster, {trials:,} trials"


# By distance from the training data: a gain only on near copies is memorization


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
    """Return each arm's score by the deciding metric, for new and for known output templates."""
    here = np.array(new, dtype=bool)
    seen, unseen = (_subset(part, scored, deciding, seed, resamples) if part.any() else None for part in (~here, here))
    return OutputTemplates(treatment=deciding.treatment, control=deciding.control, seen=seen, new=unseen)


def _subset(here: NDArray[np.bool_], scored: ScoredArms, deciding: Contrast, seed: int, resamples: int) -> Subset:
    part = scored.among(here)
    arms, clusters = part.by_metric[deciding.metric], part.clusters
    measured = None
    if (arms[deciding.treatment].scored & arms[deciding.control].scored).any():
        measured = scored_contrast(part, deciding.metric, deciding.treatment, deciding.control, seed, resamples)
    return Subset(
        items=len(clusters),
        clusters=len(set(clusters)),
        scores={
            name: BandScore(value=own.value, interval=own.interval, method=own.method, scored=own.scored)
            for name, scores in arms.items()
            if scores.scored.any() and (own := score_of(scores, clusters, seed, resamples))
        },
        difference=measured.difference if measured else None,
        interval=measured.interval if measured else None,
    )


def _scores_of(scores: Scores, here: NDArray[np.bool_]) -> Scores:
    """Return the scores of some items, without their count of answers outside the choices."""
    places = np.flatnonzero(here).tolist()
    unscored = {new: scores.unscored[old] for new, old in enumerate(places) if old in scores.unscored}
    return Scores(scores.scorer, scores.values[here], scores.statistics[here], unscored, 0)
