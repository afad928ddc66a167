"""The answers that a command has to compute: which arms, on which items, and which of them are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tunewright.adapters.registry import Adapter
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.text import count_of
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
from tunewright.evaluation.countdown import TimeLimit, Work
from tunewright.evaluation.prompt_search import advice_file, first_rows, known_advice, prepare
from tunewright.evaluation.runner import parent_of, plan_comparison
from tunewright.evidence.files import EVIDENCE_FILE
from tunewright.evidence.schema import Advice

Contest = tuple[Adapter, Literal["test", "dev"]]
"""The comparison of an adapter with the prompting arms on a split."""


@dataclass(frozen=True)
class AnswersEstimate:
    """The number of answers that a command has to compute."""

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


def limit_time(
    arm_runner: ArmRunner, minutes: float | None, contest: Contest | None = None, *, pilots: int = 0
) -> None:
    """Set a command's time limit, if there is one; its decision is kept for the same command.

    Raises:
        UserError: ``minutes`` is not above 0.
    """
    if minutes is None:
        return
    if not (math.isfinite(minutes) and minutes > 0):
        raise UserError(f"Must be greater than 0 (got {minutes:g})", where="--minutes")
    decides = {
        "advice": advice_file(arm_runner).name,
        "minutes": minutes,
        "contest": None if contest is None else [contest[0].digest, contest[1]],
        "tuned_retrieved": arm_runner.settings.tuned_retrieved,
        "pilots": pilots,
    }
    file = arm_runner.project.work / "budgets" / f"{digest(decides)[:16]}.json"
    arm_runner.time_limit = TimeLimit(minutes, file, arm_runner.generator.countdown, arm_runner.reporter)


class Workload:
    """The answers of one command: of a contest, if any, and of ``pilots`` adapters that are still to be trained."""

    def __init__(self, arm_runner: ArmRunner, contest: Contest | None = None, *, pilots: int = 0) -> None:
        self._arm_runner = arm_runner
        self._contest = contest
        self._pilots = pilots

    def announce(self, advice: Advice | None) -> None:
        """Report the answers to compute, if any, and plan the progress display and the time limit."""
        reporter, limit = self._arm_runner.reporter, self._arm_runner.time_limit
        stages = self._stages(advice)
        for stage, planned in stages.items():
            self._arm_runner.generator.countdown.plan(stage, planned)
        if (estimate := self._estimated(stages)).missing:
            reporter.say(estimate.text)
        optional = any(work.optional and work.answers for planned in stages.values() for work in planned)
        if limit is not None and advice is not None and limit.decision is None and optional:
            reporter.warn(
                f"--minutes {limit.minutes:g} leaves no arm out: the best prompting arm was chosen before, and without "
                "an answer of this command the speed is unknown."
            )

    def estimate(self) -> AnswersEstimate:
        """Return the work that :meth:`announce` would report."""
        advice = known_advice(self._arm_runner, advice_file(self._arm_runner))
        if advice is None:
            prepare(self._arm_runner)
        return self._estimated(self._stages(advice))

    def _stages(self, advice: Advice | None) -> dict[str, list[Work]]:
        """Return what each arm of each stage has to answer; without advice, the finalists with the most work."""
        runner = self._arm_runner
        dev, zero_shot = runner.version.examples("dev"), runner.work(ZERO_SHOT, first_rows(runner), "dev")
        stages = self._choosing(zero_shot) if advice is None else {}
        if self._contest is not None:
            stages["contest"] = self._contest_works(*self._contest, advice, zero_shot)
            if stages["contest"] and self._contest[1] == "test":
                test = runner.version.examples("test")
                items = min(MOST_ITEMS, len({m.example.input_key for m in test}))
                stages["noise"] = [Work(NOISE, "", 2 * items, 0, zero_shot.tokens)]
        if self._pilots:
            stages["pilots"] = [Work(TUNED.name, "dev", len(dev), 0, zero_shot.tokens) for _ in range(self._pilots)]
        return stages

    def _choosing(self, zero_shot: Work) -> dict[str, list[Work]]:
        """Return all entrants on the first items, then the finalists with the most work on the rest of dev."""
        runner, settings = self._arm_runner, self._arm_runner.settings
        dev, first = runner.version.examples("dev"), first_rows(runner)
        left_out = runner.budget.left_out if runner.budget else ()
        always = always_answered(runner.prompting_arms)
        entrants = {
            plan: replace(runner.work(plan, first, "dev"), optional=plan not in always)
            for plan in by_value(runner.prompting_arms)
            if plan.name not in left_out and runner.infeasible_reason(plan, first) is None
        }
        works = list(entrants.values())
        if any(plan.shots for plan in entrants):
            others = other_instructions(ZERO_SHOT, settings, runner.optimized)
            works += [Work(f"another instruction {n}", "dev", len(first), 0, None) for n in range(len(others))]
        rest = len(dev) - len(first)
        if not rest:
            return {"entrants": works}
        left: dict[ArmPlan, tuple[float, int]] = {}
        for plan, work in entrants.items():
            fits = runner.infeasible_reason(plan, dev) is None
            answers = runner.work(plan, dev, "dev").answers - work.answers if fits else rest
            # Of the draws of a static arm, one may become a finalist.
            left[plan.any_seed] = (answers * (work.tokens or 0), answers)
        _, zero_left = left.pop(ZERO_SHOT)
        most = sorted(left.values(), reverse=True)[: settings.finalists]
        finalists = [Work("a finalist", "dev", answers, rest - answers, None) for _, answers in most]
        on_dev = [work for work in works if work.optional and work.answers]
        # Fewer arms than finalists remain if most are left out; zero-shot answers all of dev in any case.
        for needed, finalist in zip(on_dev, finalists[len(works) - len(on_dev) - 1 :], strict=False):
            finalist.needs = needed
        on_all = Work(ZERO_SHOT.name, "dev", zero_left, rest - zero_left, zero_shot.tokens)
        return {"entrants": works, "finalists": [on_all, *finalists]}

    def _contest_works(
        self, adapter: Adapter, split: Literal["test", "dev"], advice: Advice | None, zero_shot: Work
    ) -> list[Work]:
        """Return the contest's arms; while the split is closed or the best prompting arm unknown, by their number."""
        runner = self._arm_runner
        if advice is not None:
            comparison = plan_comparison(runner, adapter, advice, split)
            if (comparison.folder / EVIDENCE_FILE).exists():
                return []
            # While the test split is closed, its prompts may not be made.
            opened = {opening.evaluation for opening in AccessLog(runner.folder).openings}
            if split == "dev" or comparison.identity in opened:
                return comparison.work(runner)
        members = runner.version.examples(split)

        def arm(name: str, tokens: float | None = zero_shot.tokens, *, optional: bool = False) -> Work:
            return Work(name, split, len(members), 0, tokens, optional)

        if split == "test":
            works = [arm(ZERO_SHOT.name), arm("the best prompting arm", None), arm(TUNED.name)]
        else:
            works = [runner.work(TUNED, members, split, adapter)]
        if parent_of(runner, adapter) is not None:
            works.append(arm(PARENT.name))
        if runner.settings.structured_outputs is not None:
            works.append(arm(TUNED_CONSTRAINED.name, optional=True))
        if (optimized := tuned_optimized(runner.optimized)) is not None:
            works.append(arm(optimized.name, optional=True))
        retrieved = any(plan.kind == "retrieved" for plan in runner.prompting_arms)
        if runner.settings.tuned_retrieved and (retrieved if advice is None else advice.best_retrieved is not None):
            works.append(arm(TUNED_RETRIEVED, None, optional=True))
        left_out = runner.budget.left_out if runner.budget else ()
        return [work for work in works if work.arm not in left_out]

    def _estimated(self, stages: Mapping[str, Sequence[Work]]) -> AnswersEstimate:
        """Return the number of answers, with the arms and items of each stage and the command's other work in words."""
        version, settings = self._arm_runner.version, self._arm_runner.project.config.regressions
        split = None if self._contest is None else self._contest[1]
        parts, besides = [], ["the suites of the regressions section"] if split == "test" and settings.measures else []
        if "entrants" in stages:
            items, dev = len(first_rows(self._arm_runner)), len(version.examples("dev"))
            screened = f"{count_of(len(stages['entrants']), 'prompting arm')} on {items:,}"
            parts.append(
                f"{screened} of {dev:,} dev items, at most {len(stages['finalists'])} of them on all"
                if "finalists" in stages
                else f"{screened} dev items"
            )
        if split is not None and stages["contest"]:
            arms = count_of(len(stages["contest"]), "arm" if split == "test" else "more arm")
            noise = f" and the {NOISE}" if "noise" in stages else ""
            parts.append(f"{arms} on {len(version.examples(split)):,} {split} items{noise}")
        if "pilots" in stages:
            parts.append(f"{count_of(self._pilots, 'pilot')} on all dev items")
            besides.append("training the pilots")
        works = [work for planned in stages.values() for work in planned]
        missing, kept = sum(work.answers for work in works), sum(work.kept for work in works)
        text = "All answers are there"
        if missing:
            there = f", {kept:,} of them kept from before" if kept else ""
            text = f"To answer: {'; '.join(parts)}. {missing + kept:,} answers{there}"
        other = f" Not counted: {', '.join(besides)}." if besides else ""
        return AnswersEstimate(f"{text}.{other}", missing + kept, kept)
