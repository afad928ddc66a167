"""Arms: the ways of answering that are measured against each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tunewright.config import EvaluateConfig, RetrieverName
from tunewright.evidence.schema import Arm, ArmKind


@dataclass(frozen=True)
class ArmPlan:
    """One way of answering.

    Args:
        kind: ``mixed`` is no way of answering but stands for what folds did each in its own.
        shots: demonstrations in the prompt.
        seed: which draw of static demonstrations, from 1.
        retriever: what finds the demonstrations of each question.
        instruction: 0 for the pairs' own, else of evaluate.instructions, from 1.
        constrained: held to evaluate.structured_outputs while it decodes.
    """

    kind: ArmKind
    shots: int = 0
    seed: int | None = None
    retriever: RetrieverName | None = None
    instruction: int = 0
    constrained: bool = False

    @property
    def name(self) -> str:
        """Such as zero-shot, static-8-seed-2, retrieved-4, retrieved-4-tfidf, zero-shot-instruction-1 or tuned."""
        parts: list[str] = ["tuned+retrieved" if self.kind == "tuned-retrieved" else self.kind]
        if self.shots:
            parts.append(str(self.shots))
        if self.seed is not None:
            parts.append(f"seed-{self.seed}")
        if self.retriever == "tfidf":
            parts.append("tfidf")
        if self.instruction:
            parts.append(f"instruction-{self.instruction}")
        return "-".join(parts) + ("+constrained" if self.constrained else "")

    @property
    def adapted(self) -> bool:
        """True if the adapter answers, and not the base alone."""
        return self.kind in {"tuned", "tuned-retrieved"}

    @property
    def any_seed(self) -> ArmPlan:
        """The same arm whatever its draw of demonstrations."""
        return replace(self, seed=None)


ZERO_SHOT = ArmPlan("zero-shot")
TUNED = ArmPlan("tuned")
TUNED_CONSTRAINED = ArmPlan("tuned", constrained=True)


def plan_of(arm: Arm) -> ArmPlan:
    """Return the way of answering that was measured."""
    return ArmPlan(arm.kind, arm.shots, arm.seed, arm.retriever, arm.instruction, arm.constrained)


def prompting_arms(settings: EvaluateConfig) -> list[ArmPlan]:
    """Return every arm that needs no training, with the pairs' own instruction; then zero-shot with each other one.

    Zero-shot (with each instruction: one of them may name what the grammar allows) and retrieved arms also held to the
    grammar, where the config has one.

    Of arms of the same score an earlier one is taken: the cheaper is first.
    """
    shots = sorted(set(settings.num_fewshot))
    static = [ArmPlan("static", k, seed=seed) for k in shots for seed in range(1, settings.static_seeds + 1)]
    retrieved = [
        ArmPlan("retrieved", k, retriever=retriever) for retriever in dict.fromkeys(settings.retrievers) for k in shots
    ]
    zero_shot = _instructed(ZERO_SHOT, settings, own=True)
    free = [*zero_shot, *static, *retrieved]
    if settings.structured_outputs is None:
        return free
    return [*free, *(replace(plan, constrained=True) for plan in [*zero_shot, *retrieved])]


def other_instructions(plan: ArmPlan, settings: EvaluateConfig) -> list[ArmPlan]:
    """Return the same arm with each instruction of evaluate.instructions."""
    return _instructed(plan, settings, own=False)


def _instructed(plan: ArmPlan, settings: EvaluateConfig, *, own: bool) -> list[ArmPlan]:
    return [replace(plan, instruction=number) for number in range(0 if own else 1, len(settings.instructions) + 1)]


def tuned_retrieved(plan: ArmPlan) -> ArmPlan:
    """The adapter with the demonstrations of a retrieved arm, and with the instruction that it was trained on."""
    assert plan.kind == "retrieved"
    return ArmPlan("tuned-retrieved", plan.shots, retriever=plan.retriever)
