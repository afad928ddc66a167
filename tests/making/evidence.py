"""Small, realistic evidence for tests: a legal citation task measured by the real statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunewright.config import Metric, metric_name
from tunewright.core.io import digest
from tunewright.data.examples import Example, Message
from tunewright.evidence.common import Interval
from tunewright.evidence.logged_access import Declared, LoggedAccess
from tunewright.evidence.schema import Arm, Evidence, Fold, Item
from tunewright.evidence.scoring import ScoredArms, declared_contrasts, measured_metrics, score_arm, score_arms
from tunewright.metrics import Scorer, scorer_of

COUNTIES = ("Baldwin", "Mobile", "Shelby", "Fulton", "Cobb", "Clay", "Duval", "Orange", "Polk", "Lee", "Knox", "Wayne")
STATES = {"Alabama": "Ala.", "Georgia": "Ga.", "Florida": "Fla.", "Tennessee": "Tenn.", "Michigan": "Mich."}
RESAMPLES = 500


def make_items(count: int = 60, *, tuned: float = 0.85, retrieved: float = 0.5) -> list[Item]:
    """Items whose answers are right in about the given shares, decided by a digest and so always the same."""
    items = []
    for index in range(count):
        county = COUNTIES[index % len(COUNTIES)]
        state, short = list(STATES.items())[(index // 3) % len(STATES)]
        court = f"{state} Circuit Court No. {index}, {county} County"
        reference = f"{short} Cir. Ct. {index}, {county} Cty."
        answers = {
            "zero-shot": f"The citation is {state} Circuit Court, {county} County.",
            "retrieved-4": reference if _luck(f"r{index}") < retrieved else f"{short} Cir. Ct., {county} County",
            "tuned": reference if _luck(f"t{index}") < tuned else f"{short} Cir. Ct. {county}",
        }
        items.append(
            Item(
                key=digest(court),
                cluster=f"c{index // 2}",
                input=f"{court}\nLocation: {county} County, {state}, United States",
                reference=reference,
                answers=answers,
                scores={},
            )
        )
    return with_scores(items)


def with_scores(items: Sequence[Item], metrics: Sequence[Metric] = ("exact_match", "bleu")) -> list[Item]:
    """The items with their scores by these metrics, as `evaluate` writes them."""
    scored = scored_items(items, metrics)
    return [
        item.model_copy(update={"scores": scored.of_item(place), "unscored": scored.why_not(place)})
        for place, item in enumerate(items)
    ]


def scored_items(items: Sequence[Item], metrics: Sequence[Metric] = ("exact_match", "bleu")) -> ScoredArms:
    """The items' answers scored."""
    names = list(items[0].answers)
    return score_arms(
        scorers(metrics),
        [pair(item.input, item.reference) for item in items],
        [item.cluster for item in items],
        {name: [item.answers[name] for item in items] for name in names},
    )


def scorers(metrics: Sequence[Metric]) -> list[Scorer]:
    """Metrics at work that need no project."""
    return [scorer_of(metric, Path("nowhere")) for metric in metrics]


def pair(asked: str, answered: str) -> Example:
    """An example of one question and its ideal answer."""
    return Example((Message("user", asked), Message("assistant", answered)))


def _luck(name: str) -> float:
    return int(digest(name)[:8], 16) / 16**8


def make_evidence(
    items: list[Item], *, metric: Metric = "exact_match", also: Sequence[Metric] = (), margin: float = 0.02
) -> Evidence:
    """Evidence measured on ``items``; the dev arms are the first half of them."""
    metrics = [metric, *also]
    on_dev, on_test = scored_items(items[: max(len(items) // 2, 1)], metrics), scored_items(items, metrics)
    return Evidence(
        id="0123456789ab",
        project="court-citations",
        metric=metric_name(metric),
        metrics=measured_metrics(scorers(metrics), several=False),
        margin=margin,
        items=len(items),
        clusters=len({i.cluster for i in items}),
        train_items=1782,
        dev_arms=[_arm("zero-shot", on_dev), _arm("retrieved-4", on_dev)],
        best_prompting="retrieved-4",
        arms=[_arm(name, on_test) for name in ("zero-shot", "retrieved-4", "tuned")],
        contrasts=declared_contrasts(
            on_test, [("tuned", "retrieved-4"), ("tuned", "zero-shot")], seed=0, resamples=RESAMPLES
        ),
        lineage={
            "created": "2026-11-02T10:00:00+00:00",
            "dataset": digest("version"),
            "base": {"spec": "smollm2-135m-instruct", "digest": digest("base")},
            "adapter": {"name": "legal-1", "digest": digest("adapter"), "lineage": {"training": {"metric": metric}}},
            "config": {"lora_r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "learning_rate": 0.0002},
            "packages": {"torch": "2.13.0", "transformers": "5.24.0", "peft": "0.21.2"},
        },
    )


def _arm(name: str, scored: ScoredArms) -> Arm:
    return score_arm(
        name=name,
        kind="tuned" if name == "tuned" else "zero-shot" if name == "zero-shot" else "retrieved",
        shots=4 if name == "retrieved-4" else 0,
        scores=scored.of_arm(name),
        clusters=scored.clusters,
        truncated=0,
        prompt_tokens=412.5 if name == "retrieved-4" else 71.2,
        seed=0,
        resamples=RESAMPLES,
    )


def cross_fitted(evidence: Evidence, folds: int = 5) -> Evidence:
    """The same numbers as if they came from this many folds."""
    message = [
        Fold(
            number=number,
            train_items=144,
            dev_items=20,
            items=evidence.items // folds,
            best_prompting=evidence.best_prompting,
            scores={arm.name: arm.score(evidence.metric).value for arm in evidence.arms},
            dev_losses=[0.9, 0.412],
            adapter=digest(f"adapter {number}"),
        )
        for number in range(1, folds + 1)
    ]
    return evidence.model_copy(
        update={"design": "cross-fitted", "folds": tuple(message), "train_items": 144, "dev_arms": []}
    )


def make_history(steps: int = 40) -> list[dict[str, Any]]:
    """A training history whose loss falls, with a dev loss and exact match every tenth step: the best at step 30."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.25 + 2.2 / (1 + step / 5) + 0.1 * _luck(f"loss{step}")
        rows.append({"step": step, "epoch": step / 20, "loss": loss, "learning_rate": 2e-4 * (1 - step / steps)})
        if step % 10 == 0:
            rows.append({"step": step, "epoch": step / 20, "eval_loss": loss + 0.08})
            rows[-1]["eval_metric"] = min(step, 60 - step) / 40
    return rows


def with_contrast(evidence: Evidence, **changes: Any) -> Evidence:
    """The evidence with fields of its deciding contrast replaced (``low`` and ``high`` for the interval).

    A ``p_value`` is taken for adjusted already.
    """
    first = evidence.contrasts[0]
    if "p_value" in changes:
        changes.setdefault("p_adjusted", changes["p_value"])
    low, high = changes.pop("low", first.interval.low), changes.pop("high", first.interval.high)
    changed = first.model_copy(update={**changes, "interval": Interval(low=low, high=high)})
    return evidence.model_copy(update={"contrasts": [changed, *evidence.contrasts[1:]]})


def fixed_and_broken(items: list[Item], treatment: str, control: str) -> Mapping[str, int]:
    """Count, the plain way, what `contrast` has to count of exact match."""
    right = [tuple(i.answers[arm].strip() == i.reference.strip() for arm in (treatment, control)) for i in items]
    return {"fixed": right.count((True, False)), "broken": right.count((False, True))}


def make_opening(number: int = 1, previous: str = "", **changes: Any) -> LoggedAccess:
    """A line of an access log with its true digest."""
    facts: dict[str, Any] = {
        "number": number,
        "time": f"2026-01-{number:02}T10:00:00+00:00",
        "author": "ann",
        "evaluation": digest(f"evaluation {number}")[:12],
        "design": "held-out",
        "dataset": digest("version"),
        "test_split": digest("split"),
        "items": 60,
        "adapter": f"court-citations-{number}",
        "adapter_digest": digest(f"adapter {number}"),
        "base": digest("base"),
        "declared": (Declared(treatment="tuned", control="retrieved-4", metric="exact_match", margin=0.02),),
    }
    opening = LoggedAccess(**(facts | changes), previous=previous, digest="")
    return opening.model_copy(update={"digest": opening.true_digest})
