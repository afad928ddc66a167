"""Signals made up for tests: every number can be chosen, the rest is plausible."""

from __future__ import annotations

from typing import Any, Literal

from tunewright.advisor.signals import (
    BreakEven,
    Call,
    ContextBudget,
    Doubling,
    OneOffCost,
    PilotPart,
    ShotCurve,
    ShotPoint,
    Signals,
    TuningGain,
)
from tunewright.evidence.common import ArmScore, Interval
from tunewright.evidence.schema import Advice, Arm, ArmKind, Contrast, Measured

ITEMS = 200


def interval(low: float, high: float) -> Interval:
    """From points to shares."""
    return Interval(low=low / 100, high=high / 100)


def score(points: float, half: float = 5.0) -> ArmScore:
    """A score in points with an interval about it."""
    low, high = max(points - half, 0), min(points + half, 100)
    return ArmScore(value=points / 100, interval=interval(low, high), method="Wilson", scored=ITEMS, unscored={})


def arm(name: str, kind: ArmKind, shots: int, points: float, tokens: float, half: float = 5.0) -> Arm:
    """Return an arm with this score in points."""
    return Arm(
        name=name,
        kind=kind,
        shots=shots,
        items=ITEMS,
        scores={"exact_match": score(points, half)},
        truncated=0,
        prompt_tokens=tokens,
    )


def contrast(
    difference: float, low: float, high: float, p_value: float = 0.001, clusters: int = 150, mde: float = 8.0
) -> Contrast:
    """The pilot against the best prompting arm, in points."""
    return Contrast(
        treatment="pilot-100",
        control="retrieved-4",
        metric="exact_match",
        scored=ITEMS,
        left_out={},
        clusters=clusters,
        p_adjusted=None,
        difference=difference / 100,
        interval=interval(low, high),
        interval_method="percentile bootstrap",
        p_value=p_value,
        test="exact McNemar",
        fixed=30,
        broken=10,
        effective_items=190.0,
        minimum_detectable_effect=mde / 100,
    )


def doubling(before: int, after: int, difference: float, low: float, high: float) -> Doubling:
    """Return the gain of a doubling, in points."""
    return Doubling(before=before, after=after, difference=difference / 100, interval=interval(low, high))


def gain(
    difference: float,
    low: float,
    high: float,
    *,
    slope: Doubling | None,
    rows: int = 100,
    p_value: float = 0.001,
    clusters: int = 150,
) -> TuningGain:
    """A pilot on ``rows`` of 400."""
    parts = [
        PilotPart(rows=n, score=score(50), adapter=f"{n:064x}", seconds=60.0)
        for n in ((rows // 2, rows) if slope is not None else (rows,))
    ]
    return TuningGain(
        parts=parts, all_rows=400, contrast=contrast(difference, low, high, p_value, clusters), slope=slope
    )


def break_even(
    calls: tuple[float | None, float | None, float | None],
    *,
    per_month: float | None = None,
    saving: float = 0.001,
    unit: Literal["money", "machine hours"] = "money",
) -> BreakEven:
    """Return a break-even with these call counts: low end, V*, high end."""
    low, middle, high = calls
    return BreakEven(
        unit=unit,
        prompting=Call(arm="retrieved-4", input_tokens=160, cached_tokens=20, output_tokens=12, cost=0.002),
        tuned=Call(arm="pilot-100", input_tokens=40, cached_tokens=20, output_tokens=12, cost=0.002 - saving),
        speed={},
        saving=saving,
        saving_interval=Interval(low=saving * 0.9, high=saving * 1.1),
        once=OneOffCost(training=40, evaluation=1, labelling=9, hosting=0),
        calls=middle,
        calls_low=low,
        calls_high=high,
        calls_per_month=per_month,
        months=12,
    )


def curve(*, last: Doubling | None = None, rising: Literal["yes", "no", "unclear"] = "no", most: int = 40) -> ShotCurve:
    """Retrieved demonstrations, of which four are best."""
    points = [
        ShotPoint(arm="zero-shot", shots=0, score=score(1), prompt_tokens=40),
        ShotPoint(arm="retrieved-2", shots=2, score=score(38), prompt_tokens=100),
        ShotPoint(arm="retrieved-4", shots=4, score=score(40), prompt_tokens=160),
    ]
    return ShotCurve(
        name="retrieved by bm25",
        points=points,
        best=4,
        enough=4,
        tokens_per_example=30,
        most=most,
        last=last or doubling(2, 4, 2, -1, 5),
        rising=rising,
    )


def make_signals(**changes: Any) -> Signals:
    """Signals in which retrieved-4 is the best prompting arm, with fields replaced."""
    arms = [
        arm("zero-shot", "zero-shot", 0, 1, 40),
        arm("retrieved-2", "retrieved", 2, 38, 100),
        arm("retrieved-4", "retrieved", 4, 40, 160),
    ]
    values: dict[str, Any] = {
        "id": "0123456789ab",
        "project": "courts",
        "metric": "exact_match",
        "margin": 0.02,
        "items": ITEMS,
        "clusters": 150,
        "pairs": 600,
        "prompting": Advice(
            metric="exact_match",
            metrics={"exact_match": Measured(kind="right or wrong", definition="exact match")},
            items=ITEMS,
            clusters=150,
            arms=arms,
            best="retrieved-4",
            best_retrieved="retrieved-4",
            narrowing=None,
            static=(),
            left_out=(),
            max_new_tokens=20,
        ),
        "cheapest": "retrieved-4",
        "context": ContextBudget(items=ITEMS, context=2048, query_p99=60, output_p99=20, curves=[curve()]),
        "break_even": break_even((45_000, 50_000, 56_000)),
        "gain": gain(10, 5, 15, slope=doubling(50, 100, 3, -1, 7)),
        "left_out": {},
        "lineage": {},
    }
    return Signals(**{**values, **changes})
