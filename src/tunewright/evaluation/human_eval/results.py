"""Results of all reviewers, and estimates for all test items: the evidence's section ``human_eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.evaluation.human_eval.estimates import Design, Estimate, agreement, estimate
from tunewright.evaluation.human_eval.journal import Journal, read_journals
from tunewright.evaluation.human_eval.sample import Sample, comparison, load_sample, stratify, treatment_is_a
from tunewright.evaluation.judge.rows import Outcome, load_judged
from tunewright.evidence.common import Interval, Score
from tunewright.evidence.files import load_evidence, load_items
from tunewright.evidence.human_eval import AnswerReview, PredictionPowered, RaterAgreement, Reviewer, ReviewStratum
from tunewright.evidence.schema import Evidence, Item
from tunewright.evidence.statistics import exact_mcnemar

_PREFERENCES: dict[Outcome, int] = {"win": 1, "tie": 0, "loss": -1}


@dataclass(frozen=True)
class JudgePreferences:
    """A judge's name, and pair key to 1 (the treatment is better), -1 (the control is) or 0.

    Items that the judge could not score are not in it.
    """

    name: str
    preferences: Mapping[str, int]


def accepted_judge(folder: Path, evidence: Evidence, reporter: Reporter) -> JudgePreferences | None:
    """Return the evaluation's judge on its deciding contrast, or None without a judge or with a vetoed one.

    Raises:
        UserError: the judge's rows cannot be read.
    """
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
    """Combine the reviewers' verdicts, weighted to all test items.

    Raises:
        UserError: there is no evaluation or incumbent, or nobody has started to review it.
    """
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


def preferences(journal: Journal, sample: Sample) -> dict[str, int]:
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
    sample: Sample,
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
    lacking = _lacking(strata)
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


def _lacking(strata: Sequence[ReviewStratum]) -> str | None:
    """Return why there is no estimate yet: each stratum needs two verdicts for its variance."""
    short = [s.name for s in strata if s.answered < min(2, s.items)]
    if not short:
        return None
    return f"fewer than two verdicts on items of the kind {' and '.join(short)}"


def _estimates(
    items: Sequence[Item],
    stratum_of: Mapping[str, str],
    scores: Mapping[str, float],
    judge: JudgePreferences | None,
) -> tuple[Estimate, PredictionPowered | None]:
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


def _win_rate(found: Estimate, method: str) -> Score:
    """Convert the mean of -1, 0 and 1 to the win rate, with ties counting half."""
    interval = Interval(low=(1 + found.interval.low) / 2, high=(1 + found.interval.high) / 2)
    return Score(value=(1 + found.value) / 2, interval=interval, method=method)


def _reviewer(journal: Journal, sample: Sample) -> Reviewer:
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
