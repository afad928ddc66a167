"""Results of all reviewers, and estimates for all test items: the evidence's section ``human_eval``.

One estimator serves both: stratified prediction-powered inference. For items i of strata h, with a verdict y where
people gave one and a judge's f everywhere, it is

    theta = sum_h W_h ( mean of y - L f over reviewed items of h  +  L times the mean of f over all items of h )

which is unbiased whatever the judge's errors, since reviewed items are a random part of their
stratum. The judge's mean error on them corrects its mean. L = 0 is the classical stratified mean; L
is tuned to make the variance small (PPI++). After Angelopoulos et al. 2023, "Prediction-powered
inference" (arXiv 2301.09633); Angelopoulos, Duchi and Zrnic 2023, "PPI++" (arXiv 2311.01453); Fisch
et al. 2024, "Stratified prediction-powered inference" (arXiv 2406.04291).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.evaluation.human_eval.sample import ReviewSample, comparison, load_sample, stratify, treatment_is_a
from tunewright.evaluation.human_eval.session import Journal, read_journals
from tunewright.evaluation.judge.questions import Outcome, load_judged
from tunewright.evidence.common import Interval, Score
from tunewright.evidence.files import load_evidence, load_items
from tunewright.evidence.human_eval import AnswerReview, PredictionPowered, RaterAgreement, Reviewer, ReviewStratum
from tunewright.evidence.schema import Evidence, Item
from tunewright.evidence.statistics import RESAMPLES, bootstrap_sums, cluster_sums, exact_mcnemar, percentiles

_PREFERENCES: dict[Outcome, int] = {"win": 1, "tie": 0, "loss": -1}


@dataclass(frozen=True)
class JudgePreferences:
    """A judge's name, and pair key to 1 (the treatment is better), -1 (the control is) or 0.

    Items that the judge could not score are left out.
    """

    name: str
    preferences: Mapping[str, int]


def accepted_judge(folder: Path, evidence: Evidence, reporter: Reporter) -> JudgePreferences | None:
    """Return the evaluation's judge on its deciding contrast, or None without a judge or with a vetoed one."""
    judgement = evidence.judge
    if judgement is None:
        return None
    if judgement.vetoed:
        reporter.warn(
            f"The judge {judgement.model} is vetoed: its verdicts are neither compared with people's nor used."
        )
        return None
    control = evidence.contrasts[0].control
    found = {}
    for row in load_judged(folder):
        outcome = row.pairs[control].plain.outcome if control in row.pairs else None
        if outcome is not None:
            found[row.key] = _PREFERENCES[outcome]
    return JudgePreferences(f"judge {judgement.model}", found)


CLASSICAL = "stratified mean, linearised over clusters, Bonett-Price adjusted"
POWERED = "stratified PPI++, linearised over clusters, Bonett-Price adjusted"
_SAME = "same"

Preferences = Mapping[str, int]
"""Pair key to 1 (treatment preferred), -1 (control) or 0 (both or neither)."""


def review_results(folder: Path, judge: JudgePreferences | None = None, *, against: str | None = None) -> AnswerReview:
    """Combine the reviewers' verdicts, weighted to all test items."""
    evidence = load_evidence(folder)
    compared = comparison(folder, evidence, against)
    items = compared.items(load_items(folder))
    sample = load_sample(compared.folder, evidence)
    if sample is None:
        option = "" if against is None else f" --against {against}"
        raise UserError(
            "The evaluation has no reviews", where=str(folder), fix=f"Review it first: tunewright human-eval{option}"
        )
    journals = read_journals(compared.folder)
    said = {journal.reviewer: preferences(journal, sample) for journal in journals}
    by_item = {key: [theirs[key] for theirs in said.values() if key in theirs] for key in sample.order}
    scores = {key: float(np.mean(each)) for key, each in by_item.items() if each}
    return _section(evidence, items, sample, journals, said, scores, judge)


def preferences(journal: Journal, sample: ReviewSample) -> dict[str, int]:
    """Return a reviewer's current verdicts on the sample, in terms of the arms; skipped items are left out."""
    found = {}
    for key in sample.order:
        judged = journal.standing.get(key)
        if judged is None or judged.verdict == "skip":
            continue
        if judged.verdict in ("both", "neither"):
            found[key] = 0
        else:
            found[key] = 1 if (judged.verdict == "A") == treatment_is_a(sample.seed, key) else -1
    return found


def _section(
    evidence: Evidence,
    items: Sequence[Item],
    sample: ReviewSample,
    journals: Sequence[Journal],
    said: Mapping[str, Preferences],
    scores: Mapping[str, float],
    judge: JudgePreferences | None,
) -> AnswerReview:
    stratum_of = stratify(items, sample.treatment, sample.control, evidence.metric)
    strata = tuple(
        ReviewStratum(
            name=size.name,
            items=size.items,
            asked=size.asked,
            answered=sum(stratum_of[key] == size.name for key in scores),
            treatment=sum(stratum_of[key] == size.name and score > 0 for key, score in scores.items()),
            control=sum(stratum_of[key] == size.name and score < 0 for key, score in scores.items()),
        )
        for size in sample.strata
    )
    # The variance of an estimate takes two verdicts in each stratum.
    short = [s.name for s in strata if s.answered < min(2, s.items)]
    lacking = f"fewer than two verdicts on items of the kind {' and '.join(short)}" if short else None
    clusters = {item.key: item.cluster for item in items}
    classical = powered = None
    if lacking is None:
        classical, powered = _estimates(items, stratum_of, scores, judge)
    signs = np.array([np.sign(score) for score in scores.values()])
    of = [clusters[key] for key in scores]
    return AnswerReview(
        treatment=sample.treatment,
        control=sample.control,
        items=sample.items,
        same=sample.same,
        asked=len(sample.order),
        answered=len(scores),
        reviewers=tuple(_reviewer(journal, sample) for journal in journals),
        strata=strata,
        preferred=(int((signs > 0).sum()), int((signs < 0).sum())),
        p_value=exact_mcnemar(signs, of) if scores else 1.0,
        test="exact sign test" if len(set(of)) == len(of) else "exact sign test by cluster",
        win_rate=None if classical is None else _win_rate(classical, CLASSICAL),
        powered=powered,
        agreements=tuple(_agreements(said, judge, clusters, sample.seed)),
        lacking=lacking,
    )


def _estimates(
    items: Sequence[Item],
    stratum_of: Mapping[str, str],
    scores: Mapping[str, float],
    judge: JudgePreferences | None,
) -> tuple[PreferenceEstimate, PredictionPowered | None]:
    keys = [item.key for item in items]
    certain = np.array([key not in stratum_of for key in keys])
    verdicts = np.array([scores.get(key, 0.0) for key in keys])
    design = Design(
        [stratum_of.get(key, _SAME) for key in keys],
        np.array([key in scores for key in keys]) | certain,
        certain,
        [item.cluster for item in items],
    )
    classical = estimate(design, verdicts)
    if judge is None:
        return classical, None
    # A tie replaces a missing judge verdict: any value will do that does not look at people's verdicts.
    judged = np.array([0.0 if key not in stratum_of else float(judge.preferences.get(key, 0)) for key in keys])
    covered = sum(key in judge.preferences for key in stratum_of)
    found = estimate(design, verdicts, judged)
    return classical, PredictionPowered(win_rate=_win_rate(found, POWERED), tuning=found.tuning, judged=covered)


def _win_rate(found: PreferenceEstimate, method: str) -> Score:
    """Convert the mean of -1, 0 and 1 to the win rate, with ties counting half."""
    interval = Interval(low=(1 + found.interval.low) / 2, high=(1 + found.interval.high) / 2)
    return Score(value=(1 + found.value) / 2, interval=interval, method=method)


def _reviewer(journal: Journal, sample: ReviewSample) -> Reviewer:
    stands = [judged for key in sample.order if (judged := journal.standing.get(key))]
    verdicts = [judged.verdict for judged in stands]
    return Reviewer(
        name=journal.reviewer,
        answered=len(verdicts) - verdicts.count("skip"),
        skipped=verdicts.count("skip"),
        both=verdicts.count("both"),
        neither=verdicts.count("neither"),
        reference_shown=sum(judged.reference and judged.verdict != "skip" for judged in stands),
    )


def _agreements(
    said: Mapping[str, Preferences], judge: JudgePreferences | None, clusters: Mapping[str, str], seed: int
) -> list[RaterAgreement]:
    raters = [*said.items(), *([(judge.name, judge.preferences)] if judge else [])]
    found = []
    for (a, of_a), (b, of_b) in combinations(raters, 2):
        both = sorted(of_a.keys() & of_b.keys())
        if both:
            firsts, seconds = [of_a[key] for key in both], [of_b[key] for key in both]
            found.append(agreement((a, b), firsts, seconds, [clusters[key] for key in both], seed))
    return found


# Estimates

_KINDS = (-1, 0, 1)
_DEFINED = 0.5  # share of the resamples: with fewer, an interval would describe something else.


def agreement(
    raters: tuple[str, str],
    first: Sequence[int],
    second: Sequence[int],
    clusters: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> RaterAgreement:
    """Return Cohen's kappa (1960) of two raters on the same items, with a 95% percentile bootstrap over clusters.

    Resamples in which both raters give all items the same verdict have no kappa and are left out. If these are half of
    them or more, there is no interval.
    """
    cells = np.zeros((len(first), len(_KINDS) ** 2), dtype=np.int64)
    places = [(_KINDS.index(a), _KINDS.index(b)) for a, b in zip(first, second, strict=True)]
    cells[np.arange(len(first)), [len(_KINDS) * a + b for a, b in places]] = 1
    agreed = sum(a == b for a, b in places)
    kappa = float(kappas(cells.sum(axis=0)[None, :])[0])
    interval: Interval | None = None
    if agreed < len(first) and not np.isnan(kappa):
        drawn = kappas(bootstrap_sums(cluster_sums(cells, clusters), seed, resamples))
        drawn = drawn[~np.isnan(drawn)]
        interval = percentiles(drawn) if len(drawn) > _DEFINED * resamples else None
    return RaterAgreement(
        raters=raters,
        items=len(first),
        agreed=agreed,
        kappa=None if np.isnan(kappa) else kappa,
        interval=interval,
    )


def kappas(tables: NDArray[Any]) -> NDArray[np.float64]:
    """Return Cohen's kappa of each table of counts, [tables, kinds * kinds]; NaN where chance agreement is full."""
    kinds = len(_KINDS)
    shares = tables.reshape(-1, kinds, kinds) / tables.sum(axis=1)[:, None, None]
    observed = np.trace(shares, axis1=1, axis2=2)
    chance = (shares.sum(axis=2) * shares.sum(axis=1)).sum(axis=1)
    alike = chance > 1 - 1e-12
    return np.asarray(np.where(alike, np.nan, (observed - chance) / np.where(alike, 1.0, 1 - chance)))


_Z = float(norm.ppf(0.975))

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PreferenceEstimate:
    """The mean of y over all items, from -1 to 1, with its 95% interval and the L in use."""

    value: float
    interval: Interval
    tuning: float


@dataclass(frozen=True)
class _Term:
    """A mean by strata: its value, the influence of each item ([items]) and of two artificial clusters ([2])."""

    value: float
    influence: Floats
    made_up: Floats


class Design:
    """The design of the sample: reviewed items, their strata and clusters.

    Args:
        strata: each item's stratum, [items].
        reviewed: mask of items with a verdict, [items]; at least one of each stratum.
        certain: mask of items known without review (equal answers), as separate reviewed strata, [items].
        clusters: each item's cluster, [items].
    """

    def __init__(
        self, strata: Sequence[str], reviewed: NDArray[np.bool_], certain: NDArray[np.bool_], clusters: Sequence[str]
    ) -> None:
        names, self.stratum = np.unique(np.asarray(strata, dtype=str), return_inverse=True)
        self.clusters = list(clusters)
        self.reviewed = reviewed
        count = len(names)
        self.sizes = np.bincount(self.stratum, minlength=count).astype(float)
        self.answered = np.bincount(self.stratum[reviewed], minlength=count).astype(float)
        assert (self.answered > 0).all(), "a stratum without a verdict says nothing"
        asked = reviewed & ~certain
        # One artificial cluster in which all are preferred and one in which none is, of mean size,
        # spread over the reviewed strata.
        drawn = np.bincount(self.stratum[asked], minlength=count).astype(float)
        self.extra = drawn / max(len({self.clusters[i] for i in np.flatnonzero(asked)}), 1)

    def term(self, values: Floats, made_up: float, adjusted: bool = True) -> _Term:
        """Return the stratified mean of ``values`` ([items], read where reviewed), with the artificial clusters."""
        held = self.answered + (2 * self.extra if adjusted else 0)
        seen = np.where(self.reviewed, values, 0.0)
        means = np.bincount(self.stratum, weights=seen, minlength=len(self.sizes)) / held
        value = float(self.sizes @ means / self.sizes.sum())
        weight = self.sizes / held
        deviation = np.where(self.reviewed, values - means[self.stratum], 0.0)
        # Two phases: the choice of test items (strata off the mean), and the choice of reviewed items.
        influence = means[self.stratum] - value + weight[self.stratum] * deviation
        signs = np.array([made_up, -made_up])
        return _Term(value, influence, (self.extra * weight) @ (signs[None, :] - means[:, None]))

    def centred(self, values: Floats) -> Floats:
        """Return ``values`` ([items]) minus their mean over all items of the stratum."""
        means = np.bincount(self.stratum, weights=values, minlength=len(self.sizes)) / self.sizes
        return np.asarray(values - means[self.stratum], dtype=np.float64)

    def by_cluster(self, influence: Floats) -> Floats:
        """Return influences summed within clusters, [clusters]."""
        sums: NDArray[Any] = cluster_sums(influence[:, None], self.clusters)
        return np.asarray(sums[:, 0], dtype=np.float64)


def estimate(
    design: Design, verdicts: Floats, judged: Floats | None = None, tuning: float | None = None
) -> PreferenceEstimate:
    """Estimate the mean verdict over all items, for a population of such clusters.

    The interval is normal, with the linearised variance over clusters in both phases (test items, reviewed items).
    Bonett and Price's (2012) adjustment for small samples adds two artificial clusters, one preferring the treatment
    and one the control. Without it, 50 verdicts of one kind would give an interval of no width.

    Args:
        design: the design of the sample.
        verdicts: y from -1 to 1, [items]; not read where an item was not reviewed.
        judged: f, the judge's verdicts, [items] (None: no judge); any value where missing.
        tuning: L (None: the one of least variance, within 0 and 1).
    """
    plain = design.term(verdicts, 0.0, adjusted=False)
    people = design.term(verdicts, 1.0)
    if judged is None:
        return _bounded(design, plain.value, people, 0.0)
    f = design.centred(judged)
    judge = design.term(f, 0.0)
    # The judge's part: its mean over all items minus its mean over the reviewed ones.
    moved = judge.influence - f
    if tuning is None:
        ours, theirs = design.by_cluster(people.influence), design.by_cluster(moved)
        spread = float(theirs @ theirs + judge.made_up @ judge.made_up)
        together = float(ours @ theirs + people.made_up @ judge.made_up)
        # As in a regression: the covariance over the judge's variance leaves the least variance.
        tuning = min(max(together / spread, 0.0), 1.0) if spread > 1e-12 else 0.0
    value = plain.value - tuning * design.term(f, 0.0, adjusted=False).value
    both = _Term(
        people.value - tuning * judge.value,
        people.influence - tuning * moved,
        people.made_up - tuning * judge.made_up,
    )
    return _bounded(design, value, both, tuning)


def _bounded(design: Design, value: float, term: _Term, tuning: float) -> PreferenceEstimate:
    moves = np.concatenate([design.by_cluster(term.influence), term.made_up])
    count = len(moves)
    error = np.sqrt(np.square(moves).sum() * count / (count - 1)) / design.sizes.sum()
    low, high = term.value - _Z * error, term.value + _Z * error
    return PreferenceEstimate(
        min(max(value, -1.0), 1.0), Interval(low=float(max(low, -1.0)), high=float(min(high, 1.0))), tuning
    )
