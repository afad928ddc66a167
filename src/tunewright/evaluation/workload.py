"""The answers that a command still has to compute: which arms, on which items, and which of them are kept."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

from tunewright.adapters.registry import Adapter
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.arm_runner import MOST_ITEMS, NOISE, ArmRunner
from tunewright.evaluation.arms import (
    PARENT,
    TUNED,
    TUNED_CONSTRAINED,
    TUNED_RETRIEVED,
    ZERO_SHOT,
    ArmPlan,
    always_answered,
    by_value,
    other_instructions,
    tuned_optimized,
)
from tunewright.evaluation.frozen_answers import Split
from tunewright.evaluation.prompt_search import advice_file, first_rows, known_advice, prepare
from tunewright.evaluation.runner import parent_of, plan_comparison
from tunewright.evaluation.time_limit import TimeLimit, Work
from tunewright.evidence.files import EVIDENCE_FILE
from tunewright.evidence.schema import Advice

Contest = tuple[Adapter, Split]
"""The comparison of an adapter with the prompting arms on a split."""


@dataclass(frozen=True)
class AnswersEstimate:
    """The number of answers that a command has to compute, at most."""

    text: str
    """The whole in words."""
    answers: int
    """All of them, including the kept ones."""
    kept: int
    """Those that are in the journal already."""

    @property
    def missing(self) -> int:
        """The number of answers to compute."""
        return self.answers - self.kept


def estimated_answers(runner: ArmRunner, contest: Contest) -> AnswersEstimate:
    """Count the answers of an evaluation; none is computed."""
    chosen = known_advice(runner, advice_file(runner)) is not None
    if not chosen:
        prepare(runner)
    works = Workload(runner, contest).remaining((), chosen)
    missing, kept = sum(work.answers for work in works), sum(work.kept for work in works)
    text = "All answers are there."
    if missing:
        others = "; the others are kept from before" if kept else ""
        text = f"To answer: at most {missing:,} of {missing + kept:,} answers{others}."
    if contest[1] == "test" and runner.project.config.regressions.measures:
        text += " Not counted: the suites of the regressions section."
    return AnswersEstimate(text, missing + kept, kept)


def time_limit(
    runner: ArmRunner, minutes: float | None, contest: Contest | None = None, *, pilots: int = 0
) -> TimeLimit | None:
    """Return a command's time limit, if there is one; its decision is kept for the same command."""
    if minutes is None:
        return None
    if not (math.isfinite(minutes) and minutes > 0):
        raise UserError(f"Must be greater than 0 (got {minutes:g})", where="--minutes")
    decides = {
        "advice": advice_file(runner).name,
        "minutes": minutes,
        "contest": None if contest is None else [contest[0].digest, contest[1]],
        "tuned_retrieved": runner.settings.tuned_retrieved,
        "pilots": pilots,
    }
    file = runner.project.work / "budgets" / f"{digest(decides)[:16]}.json"
    remaining = Workload(runner, contest, pilots).remaining
    return TimeLimit(minutes, file, runner.generator.rate, remaining, runner.reporter)


class Workload:
    """The answers of one command: of the choice of a prompt, of a contest, if any, and of ``pilots`` new adapters.

    Finalists and the contest are planned once, since they are answered after the last count.
    """

    def __init__(self, runner: ArmRunner, contest: Contest | None, pilots: int = 0) -> None:
        self._runner = runner
        self._contest = contest
        self._pilots = pilots

    def remaining(self, without: Collection[str], chosen: bool) -> list[Work]:
        """Return the work that a command still has to do, one entry per arm in the order of answering, except for the
        arms in ``without``.

        A choice of a prompt that is ``chosen`` already is not counted.
        """
        dev = len(self._runner.version.examples("dev"))
        works = [] if chosen else self._choice(without)
        works += [*self._contest_works, *[Work(TUNED.name, dev, tokens=self._short) for _ in range(self._pilots)]]
        return [work for work in works if work.arm not in without]

    @cached_property
    def _short(self) -> float | None:
        """The work of an answer to a prompt without demonstrations."""
        return self._runner.work(ZERO_SHOT, first_rows(self._runner)).tokens

    def _choice(self, without: Collection[str]) -> list[Work]:
        """Return all entrants on the first items, zero-shot on all of dev, and the finalists with the most work."""
        runner, dev, first = self._runner, self._runner.version.examples("dev"), first_rows(self._runner)
        always = always_answered(runner.prompting_arms)
        entrants = [plan for plan in self._unanswered_rest if plan.name not in without]
        works = [
            replace(runner.work(plan, dev if plan == ZERO_SHOT else first), optional=plan not in always)
            for plan in entrants
        ]
        if any(plan.shots for plan in entrants):
            others = other_instructions(ZERO_SHOT, runner.settings, runner.optimized)
            works += [Work("another instruction", len(first)) for _ in others]
        left: dict[ArmPlan, int] = {}
        for plan in entrants:
            if plan != ZERO_SHOT:  # of the draws of a static arm, one may become a finalist
                left[plan.any_seed] = max(left.get(plan.any_seed, 0), self._unanswered_rest[plan])
        most = sorted(left.values(), reverse=True)[: runner.settings.finalists]
        return [*works, *(Work("a finalist", answers, len(dev) - len(first) - answers) for answers in most)]

    @cached_property
    def _unanswered_rest(self) -> dict[ArmPlan, int]:
        """Each entrant, by value, with the number of its unanswered items of dev after the first items."""
        runner, dev, first = self._runner, self._runner.version.examples("dev"), first_rows(self._runner)
        found: dict[ArmPlan, int] = {}
        for plan in by_value(runner.prompting_arms):
            if runner.infeasible_reason(plan, first) is not None:
                continue
            work, found[plan] = runner.work(plan, first), len(dev) - len(first)
            # Finalists answered the first items before, so the other prompts are made only if such answers are kept.
            if work.kept and runner.infeasible_reason(plan, dev) is None:
                found[plan] = runner.work(plan, dev).answers - work.answers
        return found

    @cached_property
    def _contest_works(self) -> list[Work]:
        """The contest's arms; while the test split is closed or the best prompting arm unknown, by their number."""
        if self._contest is None:
            return []
        runner, (adapter, split) = self._runner, self._contest
        rows = runner.version.examples(split)
        works: list[Work] = []
        advice = known_advice(runner, advice_file(runner))
        if advice is not None:
            comparison = plan_comparison(runner, adapter, advice, split)
            if (comparison.folder / EVIDENCE_FILE).exists():
                return []
            # While the test split is closed, its prompts may not be made.
            if split == "dev" or comparison.identity in {each.evaluation for each in AccessLog(runner.folder).openings}:
                works = [
                    replace(runner.work(plan, rows, by), optional=plan.adapted and plan not in (TUNED, PARENT))
                    for plan, by in comparison.arms
                    # On dev, the base's arms were answered while a prompt was chosen.
                    if plan.adapted or split == "test"
                ]
        works = works or self._planned_arms(adapter, split, len(rows), advice)
        if split == "test":
            items = min(MOST_ITEMS, len({m.example.input_key for m in rows}))
            works.append(Work(NOISE, 2 * items, tokens=self._short))
        return works

    def _planned_arms(self, adapter: Adapter, split: Split, rows: int, advice: Advice | None) -> list[Work]:
        """Return the contest's arms by their number, without their prompts."""
        runner = self._runner
        if split == "dev":
            works = [runner.work(TUNED, runner.version.examples("dev"), adapter)]
        else:  # prompts with demonstrations are as long as the longest of the other arms
            works = [Work(ZERO_SHOT.name, rows, tokens=self._short), Work("the best prompting arm", rows)]
            works.append(Work(TUNED.name, rows, tokens=self._short))
        if parent_of(runner, adapter) is not None:
            works.append(Work(PARENT.name, rows, tokens=self._short))
        optional = [TUNED_CONSTRAINED] if runner.settings.structured_outputs is not None else []
        if (optimized := tuned_optimized(runner.optimized)) is not None:
            optional.append(optimized)
        works += [Work(plan.name, rows, tokens=self._short, optional=True) for plan in optional]
        retrieved = any(plan.kind == "retrieved" for plan in runner.prompting_arms)
        if runner.settings.tuned_retrieved and (retrieved if advice is None else advice.best_retrieved is not None):
            works.append(Work(TUNED_RETRIEVED, rows, optional=True))
        return works
