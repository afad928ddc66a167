"""Sections that are measured after `evaluate`: synthetic and consistent."""

from __future__ import annotations

import math

from making.evidence import make_evidence, make_items, scored_items
from tunewright.core.io import digest
from tunewright.evidence.benchmarks import Benchmarks, Suite
from tunewright.evidence.benchmarks import Control as SuiteControl
from tunewright.evidence.common import Interval, NoiseFloor, Score
from tunewright.evidence.human_eval import AnswerReview, PredictionPowered, RaterAgreement, Reviewer, ReviewStratum
from tunewright.evidence.judge import (
    Control,
    JudgedArm,
    JudgedContrast,
    Judgement,
    JudgeUsage,
    LengthControlled,
    Preference,
    WinRate,
)
from tunewright.evidence.learning_curve import Curve, Point
from tunewright.evidence.logged_access import Declared, EarlierAccess, LoggedAccess
from tunewright.evidence.schema import Evidence, LeftOut, Narrowing, SeedSpread
from tunewright.evidence.scoring import scores_by_distance, scores_by_template


def _suite(name: str, base: float, tuned: float, margin: float | None, *, passed: bool = True) -> Suite:
    drop = base - tuned
    return Suite(
        name=name,
        kind="choices",
        unit="share",
        metric="acc_norm",
        items=500,
        base=base,
        tuned=tuned,
        drop=drop,
        interval=Interval(low=drop - 0.021, high=drop + 0.021),
        limit=drop + 0.0177,
        method="Bonett-Price",
        margin=margin,
        changed=0.043,
        items_needed=None if margin is None else 660,
        controls=(SuiteControl(name="guessing", score=0.61, items=500, wanted="above 25%", passed=passed),),
        result="can't tell" if margin is None else "not worse",
    )


GENERAL = Benchmarks(
    id="abcdef012345",
    adapter="0" * 64,
    suites=(
        _suite("questions", 0.613, 0.607, 0.03),
        _suite("reasoning", 0.421, 0.433, None),
        _suite("trivia", 0.512, 0.498, 0.03, passed=False),
        Suite(
            name="samples",
            kind="samples",
            unit="nats per token",
            metric="negative log-likelihood",
            items=64,
            base=0.871,
            tuned=0.934,
            drop=0.063,
            interval=Interval(low=0.041, high=0.085),
            limit=0.0815,
            method="bootstrap",
            margin=None,
            changed=None,
            items_needed=None,
            divergence=0.071,
            divergence_interval=Interval(low=0.052, high=0.09),
            controls=(),
            result="can't tell",
        ),
    ),
    not_measured=("gsm8k: needs the extra lm-eval",),
    lineage={},
)


def _rate(wins: int, ties: int, losses: int) -> WinRate:
    value = (wins + ties / 2) / (wins + ties + losses)
    return WinRate(
        wins=wins,
        ties=ties,
        losses=losses,
        value=value,
        interval=Interval(low=value - 0.087, high=value + 0.083),
        method="percentile bootstrap over clusters",
    )


def _control(name: str, passed: int) -> Control:
    return Control(
        name=name,  # type: ignore[arg-type]
        expected="correct",
        items=20,
        passed=passed,
        unscored={},
        limit=passed / 20 - 0.07 if passed > 2 else 0.0,
        required=0.8,
    )


JUDGE = Judgement(
    model="fair-judge-70b",
    url="http://127.0.0.1:9/v1",
    parameters={"temperature": 0},
    prompts="1" * 64,
    criteria=None,
    created="2026-11-03T10:00:00+00:00",
    same_family="llama",
    reference_model=None,
    controls=(_control("gold is correct", 19), _control("swapped reference", 20)),
    vetoed=(),
    arms=(
        JudgedArm(
            name="tuned",
            items=59,
            correct=53,
            exact=50,
            share=Score(value=53 / 59, interval=Interval(low=0.795, high=0.953), method="Wilson"),
            unscored={"no readable verdict": 1},
        ),
    ),
    contrast=JudgedContrast(
        treatment="tuned",
        control="retrieved-4",
        items=58,
        difference=0.276,
        interval=Interval(low=0.131, high=0.421),
        interval_method="bootstrap",
        p_value=0.0012,
        test="exact McNemar",
        fixed=21,
        broken=5,
        effective_items=57.0,
        minimum_detectable_effect=0.15,
    ),
    preferences=(
        Preference(
            treatment="tuned",
            opponent="retrieved-4",
            pairs=60,
            equal=14,
            flips=6,
            flip_rate=6 / 46,
            rate=_rate(31, 20, 9),
            p_value=0.0007,
            test="sign test",
            stripped=_rate(30, 20, 10),
            stripped_texts=4,
            length_controlled=LengthControlled(
                value=0.662, interval=Interval(low=0.561, high=0.751), slope=0.31, matched=22, method="logistic"
            ),
            length_note=None,
            unscored={},
        ),
    ),
    spent=JudgeUsage(calls=412, prompt_tokens=90_211, completion_tokens=4_120, estimated=0, cost=0.0512),
)


def vetoed(judge: Judgement) -> Judgement:
    """The same judge with a control failed, and so without findings."""
    return judge.model_copy(
        update={
            "controls": (_control("gold is correct", 3), *judge.controls[1:]),
            "vetoed": ("gold is correct: 3 of 20",),
            "arms": (),
            "contrast": None,
            "preferences": (),
        }
    )


REVIEW = AnswerReview(
    treatment="tuned",
    control="retrieved-4",
    items=60,
    same=14,
    asked=40,
    answered=38,
    reviewers=(
        Reviewer(name="ann", answered=38, skipped=2, both=3, neither=4, reference_shown=5),
        Reviewer(name="ben", answered=20, skipped=0, both=1, neither=2, reference_shown=0),
    ),
    strata=(
        ReviewStratum(name="fixed", items=25, asked=22, answered=21, treatment=19, control=1),
        ReviewStratum(name="broken", items=4, asked=4, answered=4, treatment=1, control=3),
    ),
    preferred=(23, 8),
    p_value=0.0107,
    test="exact sign test",
    win_rate=Score(value=0.641, interval=Interval(low=0.552, high=0.73), method="stratified"),
    powered=PredictionPowered(
        win_rate=Score(value=0.652, interval=Interval(low=0.578, high=0.726), method="PPI++"), tuning=0.61, judged=46
    ),
    agreements=(
        RaterAgreement(
            raters=("ann", "ben"), items=20, agreed=17, kappa=0.713, interval=Interval(low=0.431, high=0.921)
        ),
    ),
)

ITEMS = make_items(60)
_SIMILAR = [(7 * n % 60) / 60 for n in range(60)]
_NEW_TEMPLATE = [n % 4 == 0 for n in range(len(ITEMS))]


def _point(share: float, seed: int, rows: int, score: float) -> Point:
    return Point(share=share, seed=seed, rows=rows, score=score, dev_loss=0.5, adapter="a" * 64)


CURVE = Curve(
    id="0c0c0c0c0c0c",
    project="court-citations",
    metric="exact_match",
    margin=0.02,
    items=120,
    clusters=80,
    shares=(0.25, 0.5, 1.0),
    seeds=(0, 1),
    points=[
        _point(share, seed, round(1782 * share), 0.55 + 0.1 * (2 + math.log2(share)) + 0.02 * seed)
        for seed in (0, 1)
        for share in (0.25, 0.5, 1.0)
    ],
    slope=0.1,
    interval=Interval(low=0.061, high=0.139),
    method="bootstrap over dev clusters",
    lineage={"created": "2026-11-01T10:00:00+00:00", "dataset": digest("version"), "base": "base"},
)

_DECLARED = (
    Declared(treatment="tuned", control="retrieved-4", metric="exact_match", margin=0.02),
    Declared(treatment="tuned", control="zero-shot", metric="exact_match", margin=None),
)

OPENING = LoggedAccess(
    number=3,
    time="2026-11-02T09:58:00+00:00",
    author="ann",
    evaluation="0123456789ab",
    design="held-out",
    dataset=digest("version"),
    test_split=digest("split"),
    items=60,
    adapter="legal-1",
    adapter_digest=digest("adapter"),
    base=digest("base"),
    declared=_DECLARED,
    previous=digest("line 2"),
    digest=digest("line 3"),
)


def full_evidence() -> Evidence:
    """Evidence with every section."""
    evidence = make_evidence(ITEMS, also=["bleu"])
    arms = [arm.model_copy(update={"shared_tokens": 41, "answer_tokens": 17.25}) for arm in evidence.arms]
    return evidence.model_copy(
        update={
            "arms": arms,
            "regressions": GENERAL,
            "judge": JUDGE,
            "human_eval": REVIEW,
            "train_similarity": scores_by_distance(
                scored_items(ITEMS), _SIMILAR, evidence.contrasts[0], seed=0, resamples=500
            ),
            "output_templates": scores_by_template(
                scored_items(ITEMS), _NEW_TEMPLATE, evidence.contrasts[0], seed=0, resamples=500
            ),
            "noise_floor": NoiseFloor(items=50, changed=3, score_difference=-0.02, how="batches of 8, then of 5"),
            "opening": OPENING,
            "openings": (
                EarlierAccess(
                    number=1,
                    time="2026-10-28T16:02:00+00:00",
                    author="ben",
                    evaluation="fedcba987654",
                    adapter="legal-0",
                    shared_items=60,
                ),
            ),
            "static": (SeedSpread(name="static-4", shots=4, items=30, scores=(0.41, 0.52, 0.48)),),
            "left_out": (LeftOut(name="retrieved-16", why="12 of 30 prompts do not fit the base's context"),),
            "narrowing": Narrowing(
                items=20,
                clusters=18,
                rule="The two best advanced.",
                arms=evidence.dev_arms,
                finalists=("retrieved-4",),
                fates={"zero-shot": "far behind the best"},
            ),
        }
    )
