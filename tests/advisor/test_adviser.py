"""Signals from answers: the context budget, counted another way, and the parts that pilots are trained on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from making.command_line import tiny_project, tunewright
from tunewright.advisor.adviser import Answers, Items, cheapest_enough, context_budget, pilot_parts
from tunewright.advisor.signals import ContextBudget
from tunewright.config import AdviseConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.examples import Example, Message
from tunewright.data.versions import DatasetVersion, load_version
from tunewright.evaluation.arms import ArmPlan
from tunewright.evidence.scoring import score_arm
from tunewright.metrics import score_all, scorer_of

COUNT = 300
CLUSTERS = [str(n) for n in range(COUNT)]
ITEMS = Items(clusters=CLUSTERS, metric="exact_match", margin=0.02, seed=0)
EXAMPLES = [Example((Message("user", "what?"), Message("assistant", "right")))] * COUNT
SCORER = scorer_of("exact_match", Path())


def _arm(plan: ArmPlan, right: int, tokens: int) -> Answers:
    """An arm that answers the first ``right`` items correctly, after prompts of this length."""
    texts = ["right"] * right + ["wrong"] * (COUNT - right)
    scores = score_all(SCORER, texts, EXAMPLES)
    arm = score_arm(
        name=plan.name,
        kind=plan.kind,
        shots=plan.shots,
        scores=[scores],
        clusters=CLUSTERS,
        truncated=0,
        prompt_tokens=tokens,
        seed=0,
        resamples=50,
    ).model_copy(update=asdict(plan))
    return Answers(arm, texts, [(1,) * tokens] * COUNT, [False] * COUNT, scores)


def _arms(*right: int) -> list[Answers]:
    """Zero-shot, and retrieved demonstrations 1, 2, 4, … with these counts of right answers; each adds 30 tokens."""
    plans = [ArmPlan("zero-shot"), *(ArmPlan("retrieved", 2**n, retriever="bm25") for n in range(len(right) - 1))]
    return [_arm(plan, count, 40 + 30 * plan.shots) for plan, count in zip(plans, right, strict=True)]


def _budget(*right: int, context: int = 2048) -> ContextBudget:
    return context_budget(_arms(*right), ITEMS, context, list(range(1, 101)), [10] * 99 + [50])


def test_enough_is_the_smallest_k_that_is_not_worse_by_the_margin() -> None:
    (curve,) = _budget(0, 100, 199, 200, 200).curves
    assert (curve.best, curve.enough) == (4, 2)
    (curve,) = _budget(0, 100, 150, 190, 200).curves
    assert (curve.best, curve.enough) == (8, 8)
    (curve,) = _budget(200, 200, 200, 190, 190).curves
    assert (curve.best, curve.enough) == (0, 0)


def test_smallest_sufficient_k_is_chosen_by_the_interval() -> None:
    """Three of 300 items are a point, within the margin; that many more or fewer are not ruled out."""
    (curve,) = _budget(0, 100, 150, 197, 200).curves
    low = ITEMS.difference(_arms(0, 100, 150, 197, 200)[3], _arms(0, 100, 150, 197, 200)[4])[1].low
    assert low < -0.02
    assert curve.enough == 8


def test_max_demonstrations_fill_the_context_left_by_query_and_answer() -> None:
    budget = _budget(0, 1, 2)
    assert budget.query_p99 == np.percentile(range(1, 101), 99, method="higher")
    assert budget.output_p99 == 50
    (curve,) = budget.curves
    assert curve.tokens_per_example == 30
    assert curve.most == (2048 - 100 - 50) // 30
    assert curve.room
    assert not _budget(0, 1, 2, context=250).curves[0].room
    assert _budget(0, 1, 2, context=120).curves[0].most == 0


@pytest.mark.parametrize(
    ("right", "expected"),
    [((0, 50, 100, 150), "yes"), ((0, 50, 147, 150), "unclear"), ((0, 50, 180, 150), "no")],
)
def test_rising_is_what_the_last_doubling_shows(right: tuple[int, ...], expected: str) -> None:
    (curve,) = _budget(*right).curves
    assert curve.last is not None
    assert (curve.last.before, curve.last.after) == (2, 4)
    assert curve.last.difference == pytest.approx((right[3] - right[2]) / COUNT)
    assert curve.rising == expected


def test_curve_with_one_k_has_no_doubling() -> None:
    (curve,) = _budget(0, 100).curves
    assert (curve.last, curve.rising) == (None, "unclear")


def test_cheapest_sufficient_arm_is_found_among_all() -> None:
    arms = _arms(0, 100, 200, 200, 200)
    assert cheapest_enough(arms, arms[4], ITEMS) is arms[2]
    assert cheapest_enough(arms[:2], arms[1], ITEMS) is arms[1]


def test_each_kind_has_a_curve_of_its_best_draws() -> None:
    draws = [
        _arm(ArmPlan("static", k, seed=seed), right, 40 + 30 * k)
        for k, seed, right in [(1, 1, 30), (1, 2, 60), (2, 1, 80), (2, 2, 50)]
    ]
    other = _arm(ArmPlan("retrieved", 2, retriever="bm25", instruction=1), 300, 100)
    budget = context_budget([*_arms(0, 100, 200), *draws, other], ITEMS, 2048, [40], [10])
    by_name = {curve.name: [(p.arm, p.shots) for p in curve.points] for curve in budget.curves}
    assert by_name == {
        "retrieved by bm25": [("zero-shot", 0), ("retrieved-1", 1), ("retrieved-2", 2)],
        "static": [("zero-shot", 0), ("static-1-seed-2", 1), ("static-2-seed-1", 2)],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProjectFolder, DatasetVersion]:
    """A version of 400 pairs, 320 of them to train on."""
    folder = tiny_project(tmp_path_factory.mktemp("pilot") / "project", Path("no-base"), 400)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    project = ProjectFolder(folder)
    return project, load_version(project.dataset)


def _parts(whole: tuple[ProjectFolder, DatasetVersion], **settings: Any) -> list[set[str]]:
    project, version = whole
    config = project.config.model_copy(update={"advise": AdviseConfig(**settings)})
    parts = pilot_parts(ProjectFolder(project.root, config), version)
    for part in parts:
        assert part.examples("dev") == version.examples("dev")
    return [{m.key for m in part.examples("train")} for part in parts]


def test_smaller_part_is_a_nested_half_of_the_pilot(
    whole: tuple[ProjectFolder, DatasetVersion],
) -> None:
    count = len(whole[1].domain_of("train"))
    half, pilot = _parts(whole, pilot_fraction=0.5)
    assert half < pilot < {m.key for m in whole[1].examples("train")}
    assert len(pilot) == pytest.approx(count / 2, abs=2)
    assert len(half) == pytest.approx(count / 4, abs=2)


def test_pilot_size_respects_minimum_and_config(
    whole: tuple[ProjectFolder, DatasetVersion],
) -> None:
    (pilot,) = _parts(whole, pilot_fraction=0.01)
    assert len(pilot) == pytest.approx(50, abs=2)
    half, pilot = _parts(whole, pilot_fraction=1, pilot_max_samples=120)
    assert len(half) == pytest.approx(60, abs=2)
    assert len(pilot) == pytest.approx(120, abs=2)


def test_pilot_of_all_rows_is_the_version(whole: tuple[ProjectFolder, DatasetVersion]) -> None:
    project, version = whole
    config = project.config.model_copy(update={"advise": AdviseConfig(pilot_fraction=1)})
    assert pilot_parts(ProjectFolder(project.root, config), version)[-1] is version


def test_pilot_is_refused_below_fifty_training_pairs(tmp_path: Path) -> None:
    folder = tiny_project(tmp_path / "project", Path("no-base"), 40)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    project = ProjectFolder(folder)
    with pytest.raises(UserError, match="A pilot needs at least 50 training pairs"):
        pilot_parts(project, load_version(project.dataset))
