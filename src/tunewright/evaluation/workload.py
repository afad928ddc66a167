"""The answers that a command has to compute: which arms, on which items, and which of them are kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from tunewright.adapters.registry import Adapter
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.data.versions import Member
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.arms import (
    PARENT,
    TUNED,
    TUNED_CONSTRAINED,
    ZERO_SHOT,
    ArmPlan,
    other_instructions,
    tuned_optimized,
)
from tunewright.evaluation.prompt_search import advice_file, first_rows
from tunewright.evaluation.repeats import MOST_ITEMS
from tunewright.evaluation.runner import evaluation_progress, parent_of
from tunewright.evidence.schema import Advice, Arm
from tunewright.training.packing.groups import common_prefix

TUNED_RETRIEVED = "tuned+retrieved"
"""Budget name of the arm before the number of its demonstrations is known."""
BEST = "the best prompting arm"
"""Placeholder for the arm chosen on dev, before it is known."""
NOISE = "noise floor"


@dataclass(frozen=True)
class Contest:
    """The comparison of an adapter with the prompting arms on a split."""

    adapter: Adapter
    split: Literal["test", "dev"]


@dataclass(frozen=True)
class Load:
    """One arm's answers to some items, and the unshared prompt tokens of each."""

    title: str
    plan: ArmPlan
    answers: int
    """Those that are missing."""
    kept: int
    """Those that are in the journal."""
    read: float


class Workload:
    """The answers of one command.

    Args:
        arm_runner: answers the prompts. The reference to it is weak: it holds the schedule, which holds this, and in
            a cycle only the garbage collector would free the base.
        contest: the comparison of an adapter with the prompting arms, if any.
        pilots: number of adapters that are still to be trained and will answer dev.
        turns: turns of the base's own samples that the command writes besides answers; 0: none.
        known: returns True for an advice file whose pilots have already answered.
    """

    def __init__(
        self,
        arm_runner: ArmRunner,
        *,
        contest: Contest | None,
        pilots: int,
        turns: int,
        known: Callable[[Path], bool],
    ) -> None:
        self._arm_runner: ArmRunner = weakref.proxy(arm_runner)
        self._contest = contest
        self._pilots = pilots
        self._turns = turns
        self._known = known
        self._parents: tuple[Adapter | None] | None = None
        """The contest's parent, once it has been looked for."""
        self._loads: dict[ArmPlan, Load | None] = {}
        self._wholes: dict[ArmPlan, Load | None] = {}
        self._journals: dict[tuple[str | None, bool], frozenset[str]] = {}

    def stages(self, advice: Advice | None, left_out: Sequence[str]) -> dict[str, list[Load]]:
        """Return what each arm of each stage has to answer; without advice, the costliest finalists are assumed.

        Raises:
            UserError: no prompt fits the base's context.
        """
        stages: dict[str, list[Load]] = {}
        if advice is None:
            stages |= self._choosing(left_out)
        if self._contest is not None:
            stages["contest"] = self._contest_arms(self._contest, advice, left_out)
            if stages["contest"] and self._contest.split == "test":
                test = self._arm_runner.version.examples("test")
                items = min(MOST_ITEMS, len({m.example.input_key for m in test}))
                zero = next(load for load in stages["contest"] if load.plan == ZERO_SHOT)
                stages["noise"] = [Load(NOISE, ZERO_SHOT, 2 * items, 0, zero.read)]
        if self._pilots and not self._known(advice_file(self._arm_runner, left_out)):
            dev = self._arm_runner.version.examples("dev")
            stages["pilots"] = [
                Load("tuned on dev", TUNED, len(dev), 0, self._entrant(ZERO_SHOT).read) for _ in range(self._pilots)
            ]
        return stages

    def entrants(self, left_out: Sequence[str]) -> list[Load]:
        """Return the prompting arms that fit the context, on the items that all of them answer."""
        plans = [plan for plan in self._arm_runner.prompting_arms if plan.name not in left_out]
        return [load for plan in plans if (load := self._fitting(plan)) is not None]

    def _fitting(self, plan: ArmPlan) -> Load | None:
        if plan not in self._loads:
            first = first_rows(self._arm_runner)
            infeasible_reason = self._arm_runner.infeasible_reason(plan, first)
            self._loads[plan] = None if infeasible_reason else self.of_arm(plan, first, "dev")
        return self._loads[plan]

    def _entrant(self, plan: ArmPlan) -> Load:
        found = self._fitting(plan)
        if found is None:
            raise UserError(
                "No prompt fits the base's context", fix="Shorten the examples or use a base with a longer context."
            )
        return found

    def of_arm(self, plan: ArmPlan, members: Sequence[Member], split: str, adapter: Adapter | None = None) -> Load:
        """Return what one arm has to answer, by its prompts and the journal."""
        if adapter is not None and plan.kind == PARENT.kind:
            adapter = self._parent(adapter)
        prompts = sorted(set(self._arm_runner.prompts(plan, members)[0]))
        kept = self._kept(adapter if plan.adapted else None, constrained=plan.constrained)
        missing = [prompt for prompt in prompts if digest(prompt) not in kept]
        shared = common_prefix(prompts[0], prompts[-1]) if len(prompts) > 1 else 0
        read = fmean(map(len, prompts)) - shared
        return Load(f"{plan.name} on {split}", plan, len(missing), len(prompts) - len(missing), read)

    def _kept(self, adapter: Adapter | None, *, constrained: bool) -> frozenset[str]:
        key = (None if adapter is None else adapter.digest, constrained)
        if key not in self._journals:
            arm_runner = self._arm_runner
            self._journals[key] = arm_runner.generator.kept(arm_runner.limit, adapter, constrained=constrained)
        return self._journals[key]

    def forget(self) -> None:
        """Read the journals again at the next question: there are new answers."""
        self._loads.clear()
        self._wholes.clear()
        self._journals.clear()

    def _choosing(self, left_out: Sequence[str]) -> dict[str, list[Load]]:
        """Return all entrants on the first items, then the costliest possible finalists on the rest of dev."""
        settings, dev = self._arm_runner.settings, self._arm_runner.version.examples("dev")
        entrants = self.entrants(left_out)
        shown = [load for load in entrants if load.plan.shots]
        other = other_instructions(ZERO_SHOT, settings, self._arm_runner.optimized)
        if shown and other:
            dearest = max(shown, key=lambda load: load.read)
            items = len(first_rows(self._arm_runner))
            entrants += [
                Load(f"another instruction {n} on dev", dearest.plan, items, 0, dearest.read) for n in range(len(other))
            ]
        rest = len(dev) - len(first_rows(self._arm_runner))
        if rest <= 0:
            return {"entrants": entrants}
        zero_shot = self.of_arm(ZERO_SHOT, dev, "dev")
        others = {load.plan.any_seed: load for load in entrants if load.plan != ZERO_SHOT}
        # The finalists are not known yet: at most those with the most left to answer, and of those the costliest.
        left_of = {load.plan: self._left(load) for load in others.values()}
        most = sorted(others.values(), key=lambda load: (left_of[load.plan] * load.read, load.read), reverse=True)
        finalists = [
            Load(f"finalist {n} on dev", load.plan, left_of[load.plan], rest - left_of[load.plan], load.read)
            for n, load in enumerate(most[: settings.finalists])
        ]
        left = zero_shot.answers - self._entrant(ZERO_SHOT).answers
        return {
            "entrants": entrants,
            "finalists": [Load(zero_shot.title, ZERO_SHOT, left, rest - left, zero_shot.read), *finalists],
        }

    def _left(self, entrant: Load) -> int:
        """Return the number of an arm's missing answers on the dev items that not all entrants answer."""
        dev = self._arm_runner.version.examples("dev")
        if entrant.plan not in self._wholes:
            infeasible_reason = self._arm_runner.infeasible_reason(entrant.plan, dev)
            self._wholes[entrant.plan] = None if infeasible_reason else self.of_arm(entrant.plan, dev, "dev")
        whole = self._wholes[entrant.plan]
        # An arm that does not fit all of dev is left out then: counted in full, it is an upper bound.
        return len(dev) - len(first_rows(self._arm_runner)) if whole is None else whole.answers - entrant.answers

    def _contest_arms(self, contest: Contest, advice: Advice | None, left_out: Sequence[str]) -> list[Load]:
        """Return the contest's arms; dev prompts stand in for those of a test split that is still closed."""
        arm_runner = self._arm_runner
        members = arm_runner.version.examples(contest.split)
        if advice is not None:
            progress = evaluation_progress(arm_runner, contest.adapter, advice, contest.split)
            if progress.evaluated:
                return []
            if progress.opened:
                plans = [plan for plan in progress.plans if budget_name(plan) not in left_out]
                if contest.split == "dev":  # the others are answered while a prompt is chosen
                    plans = [plan for plan in plans if plan.adapted]
                return [self.of_arm(plan, members, contest.split, contest.adapter) for plan in plans]
        items, on = len(members), f"on {contest.split}"
        reads = {arm.name: _read(arm) for arm in _arms(advice)} or {
            x.plan.name: x.read for x in self.entrants(left_out)
        }
        retrieved = [read for name, read in reads.items() if name.startswith("retrieved")]
        best = max(reads.values()) if advice is None else reads[advice.best]
        zero = reads[ZERO_SHOT.name]
        loads = []
        if contest.split == "test":
            loads += [
                Load(f"{ZERO_SHOT.name} {on}", ZERO_SHOT, items, 0, zero),
                Load(f"{BEST} {on}", ArmPlan("retrieved", 1), items, 0, best),
            ]
            loads.append(Load(f"{TUNED.name} {on}", TUNED, items, 0, zero))
        else:
            loads.append(self.of_arm(TUNED, members, contest.split, contest.adapter))
        if self._parent(contest.adapter) is not None:
            loads.append(Load(f"{PARENT.name} {on}", PARENT, items, 0, zero))
        settings = arm_runner.settings
        if settings.tuned_retrieved and retrieved and TUNED_RETRIEVED not in left_out:
            read = max(retrieved) if advice is None or advice.best_retrieved is None else reads[advice.best_retrieved]
            loads.append(Load(f"{TUNED_RETRIEVED} {on}", ArmPlan("tuned-retrieved", 1), items, 0, read))
        plan = tuned_optimized(arm_runner.optimized)
        if plan is not None and plan.name not in left_out:
            loads.append(Load(f"{plan.name} {on}", plan, items, 0, zero))
        if settings.structured_outputs is not None and TUNED_CONSTRAINED.name not in left_out:
            loads.append(Load(f"{TUNED_CONSTRAINED.name} {on}", TUNED_CONSTRAINED, items, 0, zero))
        return loads

    def _parent(self, adapter: Adapter) -> Adapter | None:
        """Return the adapter that the contest's one started from, if it is here."""
        if self._parents is None:
            self._parents = (parent_of(self._arm_runner, adapter),)
        return self._parents[0]

    def text(self, stages: Mapping[str, Sequence[Load]]) -> str:
        """Return arms and items of each stage, and the number of answers."""
        parts = []
        if "entrants" in stages:
            items, dev = len(first_rows(self._arm_runner)), len(self._arm_runner.version.examples("dev"))
            screened = f"{_arms_text(len(stages['entrants']), 'prompting arm')} on {items:,}"
            parts.append(
                f"{screened} of {dev:,} dev items, at most {len(stages['finalists'])} of them on all"
                if "finalists" in stages
                else f"{screened} dev items"
            )
        if stages.get("contest"):
            assert self._contest is not None
            items = len(self._arm_runner.version.examples(self._contest.split))
            more = "arm" if self._contest.split == "test" else "more arm"
            text = f"{_arms_text(len(stages['contest']), more)} on {items:,} {self._contest.split} items"
            parts.append(f"{text} and the {NOISE}" if "noise" in stages else text)
        if "pilots" in stages:
            parts.append(f"{_arms_text(self._pilots, 'pilot')} on all dev items")
        everything = [load for loads in stages.values() for load in loads]
        kept = sum(load.kept for load in everything)
        answers = kept + sum(load.answers for load in everything)
        there = f", {kept:,} of them kept from before" if kept else ""
        return f"To answer: {'; '.join(parts)}. {answers:,} answers{there}"

    def not_counted(self, stages: Mapping[str, Sequence[Load]]) -> str:
        """Return a description of the command's other work, whose time is not known beforehand."""
        besides = []
        if (
            self._contest is not None
            and self._contest.split == "test"
            and self._arm_runner.project.config.regressions.measures
        ):
            besides.append("the suites of the regressions section")
        if "pilots" in stages:
            besides.append("training the pilots")
        if self._turns:
            besides.append(
                f"{self._turns:,} turns or more of the base's own samples (regressions.samples: 0 leaves them out)"
            )
        return f" Not counted: {', '.join(besides)}." if besides else ""


def budget_name(plan: ArmPlan) -> str:
    """Return the name by which a budget leaves an arm out."""
    return TUNED_RETRIEVED if plan.kind == "tuned-retrieved" else plan.name


def _arms(advice: Advice | None) -> Sequence[Arm]:
    if advice is None:
        return []
    return [*(advice.narrowing.arms if advice.narrowing else []), *advice.arms]


def _read(arm: Arm) -> float:
    return arm.prompt_tokens - arm.shared_tokens


def _arms_text(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
