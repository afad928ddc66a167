"""The plan of an evaluation: the arms to compare, and the contrasts that are declared before any answer exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunewright.adapters.compatibility import require_compatible
from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.config import Config, MetricName
from tunewright.core.io import digest
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.arms import (
    PARENT,
    TUNED,
    TUNED_CONSTRAINED,
    ZERO_SHOT,
    ArmPlan,
    plan_of,
    tuned_optimized,
    tuned_retrieved,
)
from tunewright.evaluation.countdown import Work
from tunewright.evaluation.frozen_answers import Split
from tunewright.evaluation.incumbents import declared_incumbents, incumbent_inputs
from tunewright.evidence.common import Budget
from tunewright.evidence.files import DEV_PREFIX
from tunewright.evidence.logged_access import Declared
from tunewright.evidence.schema import Advice


@dataclass(frozen=True)
class Comparison:
    """A planned evaluation: everything that decides it, before any answer exists."""

    split: Split
    arms: Sequence[tuple[ArmPlan, Adapter]]
    """Each arm with the adapter that answers it, if it is an adapted one."""
    declared: tuple[Declared, ...]
    identity: str
    folder: Path
    """The folder of its evidence."""

    def work(self, arm_runner: ArmRunner) -> list[Work]:
        """Return the answers of each arm, those that are kept included."""
        rows = arm_runner.version.examples(self.split)
        return [
            replace(arm_runner.work(plan, rows, self.split, by), optional=plan.adapted and plan not in (TUNED, PARENT))
            for plan, by in self.arms
            # On dev, the base's arms were answered while a prompt was chosen.
            if plan.adapted or self.split == "test"
        ]


def plan_comparison(arm_runner: ArmRunner, adapter: Adapter, advice: Advice, split: Split) -> Comparison:
    """Return the arms to compare and the contrasts to declare. Nothing is opened or answered.

    Raises:
        UserError: the files of the adapter's parent have changed.
    """
    settings, metric = arm_runner.settings, arm_runner.scorers[0].name
    budget, parent = arm_runner.budget, parent_of(arm_runner, adapter)
    plans = contest(
        advice,
        with_retrieved=settings.tuned_retrieved,
        held=settings.structured_outputs is not None,
        parent=parent is not None,
        optimized=arm_runner.optimized,
        budget=budget,
    )
    with_retrieved = next((plan.name for plan in plans if plan.kind == "tuned-retrieved"), None)
    optimized = next((plan.name for plan in plans if plan.kind == "tuned" and plan.optimized), None)
    decides = arm_runner.inputs(arm_runner.limit) | {
        "adapter": adapter.digest,
        "arms": [plan.name for plan in plans],
        "instructions": settings.instructions,
        "margin": settings.margin,
        **({"left_out": sorted(budget.left_out)} if budget else {}),
        **({"optimized": arm_runner.optimization.id} if arm_runner.optimization else {}),
        **({"parent": parent.digest} if parent else {}),
        **incumbent_inputs(arm_runner, split),
    }
    identity = digest(decides)[:12]
    declared = declare(
        arm_runner.project.config, metric, advice.best, with_retrieved, parent=parent is not None, optimized=optimized
    )
    return Comparison(
        split=split,
        arms=[(plan, parent if parent and plan.kind == PARENT.kind else adapter) for plan in plans],
        declared=declared + declared_incumbents(arm_runner, metric),
        identity=identity,
        folder=arm_runner.folder / (identity if split == "test" else f"{DEV_PREFIX}{identity}"),
    )


def contest(
    advice: Advice,
    *,
    with_retrieved: bool,
    held: bool = False,
    parent: bool = False,
    optimized: str | None = None,
    budget: Budget | None = None,
) -> list[ArmPlan]:
    """Return the arms compared on held-out items: zero-shot, the best on dev, tuned, and tuned with demonstrations.

    With ``parent``, the adapter that tuned started from is added, with ``held``, tuned constrained by the grammar, and
    with ``optimized``, tuned with the optimized instruction of this digest. A ``budget`` may have left out tuned with
    demonstrations, constrained or with the optimized instruction.
    """
    left_out = budget.left_out if budget else ()
    with_retrieved = with_retrieved and "tuned+retrieved" not in left_out
    held = held and TUNED_CONSTRAINED.name not in left_out
    every = [*advice.arms, *(advice.narrowing.arms if advice.narrowing else [])]
    known = {arm.name: plan_of(arm) for arm in every}
    plans = [ZERO_SHOT, known[advice.best], TUNED, *([PARENT] if parent else [])]
    if with_retrieved and advice.best_retrieved is not None:
        plans.append(tuned_retrieved(known[advice.best_retrieved]))
    if (plan := tuned_optimized(optimized)) is not None and plan.name not in left_out:
        plans.append(plan)
    if held:
        plans.append(TUNED_CONSTRAINED)
    return list(dict.fromkeys(plans))


def declare(
    config: Config,
    metric: MetricName,
    best: str,
    with_retrieved: str | None,
    *,
    parent: bool = False,
    optimized: str | None = None,
) -> tuple[Declared, ...]:
    """Declare the contrasts to measure: tuned against the best prompting arm (decides), zero-shot and its parent.

    Args:
        config: holds the margin.
        metric: the deciding metric.
        best: name of the best prompting arm.
        with_retrieved: name of the tuned arm with demonstrations, if it is measured.
        parent: the adapter that tuned started from is measured.
        optimized: name of the tuned arm with the optimized instruction, if it is measured.
    """
    pairs = [(TUNED.name, control) for control in dict.fromkeys([best, ZERO_SHOT.name])]
    if parent:
        pairs.append((TUNED.name, PARENT.name))
    pairs += [(name, TUNED.name) for name in (with_retrieved, optimized) if name is not None]
    margin = config.evaluate.margin
    return tuple(
        Declared(treatment=treatment, control=control, metric=metric, margin=margin if number == 0 else None)
        for number, (treatment, control) in enumerate(pairs)
    )


def parent_of(arm_runner: ArmRunner, adapter: Adapter) -> Adapter | None:
    """Return the adapter that another one started from; None if there is none, or, with a warning, if it is gone.

    Raises:
        UserError: its files have changed.
    """
    named = adapter.lineage.get("parent")
    if named is None:
        return None
    found = next((a for a in list_adapters(arm_runner.project.adapters) if a.digest == named["digest"]), None)
    if found is None:
        arm_runner.reporter.warn(
            f"{adapter.name} started from {named['name']}, which is not here: the two are not compared."
        )
        return None
    require_compatible(found, arm_runner.generator.base, arm_runner.generator.chat)
    return found
