"""Arms: their names and their order, and which of them meet on held-out items."""

from __future__ import annotations

from tunewright.config import EvaluateConfig
from tunewright.evaluation.arms import ZERO_SHOT, ArmPlan, other_instructions, prompting_arms, tuned_retrieved


def test_arms_are_named_and_the_cheapest_is_first() -> None:
    settings = EvaluateConfig(
        num_fewshot=(8, 1, 8), static_seeds=2, retrievers=("bm25", "tfidf"), instructions=("Do it.",)
    )
    assert [arm.name for arm in prompting_arms(settings)] == [
        "zero-shot",
        "zero-shot-instruction-1",
        "static-1-seed-1",
        "static-1-seed-2",
        "static-8-seed-1",
        "static-8-seed-2",
        "retrieved-1",
        "retrieved-8",
        "retrieved-1-tfidf",
        "retrieved-8-tfidf",
    ]
    assert prompting_arms(settings)[0] == ZERO_SHOT


def test_kinds_of_arms_can_be_switched_off() -> None:
    settings = EvaluateConfig(num_fewshot=(4,), static_seeds=0, retrievers=())
    assert prompting_arms(settings) == [ZERO_SHOT]


def test_arms_include_every_other_instruction() -> None:
    settings = EvaluateConfig(instructions=("Do it.", "Please."))
    found = other_instructions(ArmPlan("static", 4, seed=2), settings)
    assert [arm.name for arm in found] == ["static-4-seed-2-instruction-1", "static-4-seed-2-instruction-2"]


def test_tuned_arm_keeps_its_trained_instruction() -> None:
    with_shots = tuned_retrieved(ArmPlan("retrieved", 8, retriever="tfidf", instruction=2))
    assert (with_shots.name, with_shots.instruction, with_shots.adapted) == ("tuned+retrieved-8-tfidf", 0, True)
