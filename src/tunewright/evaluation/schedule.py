"""The schedule of a command's answers: announced in minutes, counted down, and trimmed to a budget."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from tunewright.adapters.registry import Adapter
from tunewright.chat.answers import answer_length
from tunewright.core.clock import seconds_since, without_milliseconds
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.core.progress import minutes_text
from tunewright.data.versions import Member
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.arms import TUNED_CONSTRAINED, ZERO_SHOT, ArmPlan
from tunewright.evaluation.eta import Work
from tunewright.evaluation.generations import Prompt
from tunewright.evaluation.prompt_search import advice_file, first_rows, known_advice, prepare
from tunewright.evaluation.speed import TIMED_TOKENS, AnswerSpeed, adapted_factor, answer_speed, kept_factor, kept_speed
from tunewright.evaluation.workload import BEST, TUNED_RETRIEVED, Contest, Load, Workload
from tunewright.evidence.common import RULE, Budget
from tunewright.evidence.schema import Advice

_SAMPLED = 200
"""Number of training rows that stand for the length of all answers."""
_FRESH = 300
"""Seconds: an older timing is repeated before it makes a budget fail."""


@dataclass(frozen=True)
class AnswersEstimate:
    """The answers that a command has to compute, and their expected time."""

    text: str
    """The whole in words."""
    answers: int
    """All of them, including the kept ones."""
    kept: int
    """Those that are in the journal already."""
    seconds: float | None
    """Expected time of the missing ones; None: this machine's speed has not been measured."""

    @property
    def missing(self) -> int:
        """The number of answers to compute."""
        return self.answers - self.kept


class Schedule:
    """The schedule of one command's answers.

    Args:
        arm_runner: answers the prompts.
        minutes: time limit; None: no limit.
        contest: the comparison of an adapter with the prompting arms, if any.
        pilots: number of adapters that are still to be trained and will answer dev.
        turns: turns of the base's own samples that the command writes besides answers; 0: none.
        known: returns True for an advice file whose pilots have already answered.

    Raises:
        UserError: ``minutes`` is not above 0.
    """

    def __init__(
        self,
        arm_runner: ArmRunner,
        *,
        minutes: float | None = None,
        contest: Contest | None = None,
        pilots: int = 0,
        turns: int = 0,
        known: Callable[[Path], bool] = lambda _advice: False,
    ) -> None:
        if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
            raise UserError(f"Must be greater than 0 (got {minutes:g})", where="--minutes")
        # Weak, since the arm runner holds the schedule: in a cycle, only the garbage collector would free the base.
        self._arm_runner: ArmRunner = weakref.proxy(arm_runner)
        self._minutes = minutes
        self._contest = contest
        self._pilots = pilots
        self._turns = turns
        self._known = known
        self._workload = Workload(arm_runner, contest=contest, pilots=pilots, turns=turns, known=known)
        self._speed: AnswerSpeed | None = None
        self._slower = 1.0
        self.budget: Budget | None = None
        """None: no arm was left out."""

    # Planning

    def settle(self) -> None:
        """Decide which arms are left out, and report the work to do, if any.

        Raises:
            UserError: ``minutes`` is too small for the arms that are never left out, or choosing a prompt failed.
        """
        self.budget = self._earlier_decision()
        advice = self._known_advice()
        if advice is None:
            prepare(self._arm_runner)
        stages = self._workload.stages(advice, self._left_out)
        if not any(load.answers for loads in stages.values() for load in loads):
            if self._turns and not self._known(advice_file(self._arm_runner, self._left_out)):
                self._arm_runner.reporter.say(f"All answers are there.{self._workload.not_counted(stages)}")
            return
        self._measure()
        if self._minutes is not None and self.budget is None and not self._decision.exists():
            self.budget = self._trimmed(advice, self._minutes)
            # With fewer arms, the choice may have been made before.
            advice = self._known_advice()
            stages = self._workload.stages(advice, self._left_out)
        for stage, loads in stages.items():
            self._plan(stage, loads)
        self._arm_runner.reporter.say(self._announcement(stages))

    def estimate(self, *, measure: bool) -> AnswersEstimate:
        """Return the work that :meth:`settle` would report.

        Args:
            measure: time two batches if no speed is kept.

        Raises:
            UserError: choosing a prompt failed.
        """
        advice = self._known_advice()
        if advice is None:
            prepare(self._arm_runner)
        stages = self._workload.stages(advice, ())
        loads = [load for loads in stages.values() for load in loads]
        kept, missing = sum(load.kept for load in loads), sum(load.answers for load in loads)
        if not missing:
            text = f"All answers are there.{self._workload.not_counted(stages)}"
            return AnswersEstimate(text, kept, kept, 0.0)
        if measure:
            self._measure()
            stages = self._workload.stages(advice, ())  # the timed answers are kept now
        elif not self._use_kept_speed():
            text = f"{self._workload.text(stages)}.{self._workload.not_counted(stages)}"
            return AnswersEstimate(text, kept + missing, kept, None)
        loads = [load for loads in stages.values() for load in loads]
        kept = sum(load.kept for load in loads)
        answers = kept + sum(load.answers for load in loads)
        return AnswersEstimate(self._announcement(stages), answers, kept, self._total(stages))

    def expect(
        self,
        stage: str,
        plans: Sequence[ArmPlan],
        members: Sequence[Member],
        split: str,
        adapter: Adapter | None = None,
        counted: int = 0,
    ) -> None:
        """Replace the expected work of a stage, now that its arms are known.

        Args:
            stage: name of the stage that :meth:`settle` planned.
            plans, members, split, adapter: the arms and the items that they answer.
            counted: the items that an earlier stage counts for each arm.
        """
        if self._speed is not None:
            self._workload.forget()
            loads = [self._workload.of_arm(plan, members, split, adapter) for plan in plans]
            self._plan(stage, [replace(load, kept=max(load.kept - counted, 0)) for load in loads])

    def _plan(self, stage: str, loads: Sequence[Load]) -> None:
        countdown = self._arm_runner.generator.countdown
        countdown.plan(stage, [Work(x.title, x.answers, x.kept, self._seconds(x)) for x in loads])

    @property
    def _left_out(self) -> tuple[str, ...]:
        return self.budget.left_out if self.budget else ()

    def _known_advice(self) -> Advice | None:
        return known_advice(self._arm_runner, advice_file(self._arm_runner, self._left_out))

    # Timing

    def _measure(self, *, again: bool = False) -> None:
        """Use the kept speeds, or time two batches of dev prompts: the shortest and the longest arm's.

        Answers are short, and a budget limits the prompts, so that the timing takes about a tenth of it.

        Args:
            again: time them even if speeds are kept.
        """
        arm_runner, keyed = self._arm_runner, self._keyed
        first = first_rows(arm_runner)

        def short() -> Sequence[Prompt]:
            return arm_runner.prompts(ZERO_SHOT, first)[0]

        def long() -> Sequence[Prompt]:
            fits = [load for load in self._workload.entrants(()) if load.plan.shots and not load.plan.constrained]
            return arm_runner.prompts(max(fits, key=lambda load: load.read).plan, first)[0] if fits else []

        generator, limit = arm_runner.generator, self._timed_limit
        if again or not self._use_kept_speed(adapted=self._contest is not None):
            arm_runner.reporter.say(f"Timing answers of at most {limit} tokens, to estimate the minutes")
            if self._minutes is not None:
                alone, _ = generator.timed((long() or short())[:1], limit)
                first = first[: max(1, int(2 * self._minutes / alone))]  # of each of three batches, 2 s for a minute
        self._speed = answer_speed(generator, limit, short, long, keyed, again=again)
        if self._contest is not None:
            adapter = self._contest.adapter
            self._slower = adapted_factor(generator, limit, short, adapter, self._speed, keyed, again=again)
        self._workload.forget()  # the timed answers are in the journal now

    def _use_kept_speed(self, *, adapted: bool = False) -> bool:
        """Use the kept speeds; return False if the base's (if ``adapted``, the adapter's too) is not kept."""
        generator, limit, keyed = self._arm_runner.generator, self._timed_limit, self._keyed
        self._speed = kept_speed(generator, limit, keyed)
        if self._speed is not None and self._contest is not None:
            factor = kept_factor(generator, limit, self._contest.adapter, self._speed, keyed)
            self._slower = factor or 1.0
            adapted = adapted and factor is None
        return self._speed is not None and not adapted

    @property
    def _timed_limit(self) -> int:
        return min(self._arm_runner.limit, TIMED_TOKENS)

    @property
    def _keyed(self) -> dict[str, Any]:
        """Names of the dataset and arms, which decide the prompts of the timed batches."""
        arm_runner = self._arm_runner
        return {"dataset": arm_runner.version.digest, "arms": [p.name for p in arm_runner.prompting_arms]}

    def _seconds(self, load: Load) -> float:
        assert self._speed is not None
        plain, shown = self._speed.answer_tokens(self._arm_runner.limit)
        at_once = self._arm_runner.generator.workers_at_once
        if load.plan.adapted:
            return self._slower * self._speed.seconds(load.read, self._trained_length) / at_once
        return self._speed.seconds(load.read, shown if load.plan.shots else plain) / at_once

    @cached_property
    def _trained_length(self) -> float:
        """Mean token count of training answers, the expected length of an adapter's answers."""
        chat = self._arm_runner.generator.chat
        rows = self._arm_runner.version.domain_of("train")[:_SAMPLED]
        lengths = [
            answer_length(row.loss_mask)
            for row in chat.tokens([chat.rendered_rows(m.example.messages)[-1] for m in rows])
        ]
        return min(fmean(lengths), self._arm_runner.limit)

    def _total(self, stages: Mapping[str, Sequence[Load]]) -> float:
        return sum(load.answers * self._seconds(load) for loads in stages.values() for load in loads)

    # The budget

    @cached_property
    def _identity(self) -> str:
        contest = self._contest
        decides = {
            "advice": advice_file(self._arm_runner).name,
            "minutes": self._minutes,
            "contest": None if contest is None else [contest.adapter.digest, contest.split],
            "tuned_retrieved": self._arm_runner.settings.tuned_retrieved,
            "pilots": self._pilots,
        }
        return digest(decides)[:16]

    @property
    def _decision(self) -> Path:
        return self._arm_runner.project.work / "budgets" / f"{self._identity}.json"

    def _earlier_decision(self) -> Budget | None:
        """Return the earlier decision for this budget: a resumed run must not choose again by another speed."""
        if self._minutes is None or not self._decision.exists():
            return None
        found = Budget.model_validate_json(self._decision.read_text(encoding="utf-8"))
        return found if found.left_out else None

    def _trimmed(self, advice: Advice | None, minutes: float, *, again: bool = True) -> Budget | None:
        assert self._speed is not None
        left_out: list[str] = []
        stages = self._workload.stages(advice, left_out)
        order = self._droppable(advice, stages)
        while (total := self._total(stages)) > 60 * minutes:
            if not order and again and seconds_since(self._speed.measured) > _FRESH:
                # The machine may have been busy then.
                timed = without_milliseconds(self._speed.measured)
                self._arm_runner.reporter.say(f"Timed at {timed}, {minutes:g} minutes are too few. Timing again.")
                self._measure(again=True)
                return self._trimmed(advice, minutes, again=False)
            if not order:
                raise UserError(
                    f"{minutes:g} minutes are too few: the arms that are never left out take about "
                    f"{math.ceil(total / 60)} ({_names(stages)}), as timed at "
                    f"{without_milliseconds(self._speed.measured)}: {self._speed.text}",
                    where="--minutes",
                    fix=f"Give --minutes {math.ceil(total / 60)} or more. If the machine was busy when it was timed, "
                    f"wait {_FRESH // 60} minutes: the same command then times again before it refuses.",
                )
            without = [*left_out, order.pop(0)]
            fewer = self._workload.stages(advice, without)
            if self._total(fewer) < total:  # else its answers already exist
                left_out, stages = without, fewer
        budget = Budget(minutes=minutes, expected=round(total / 60, 2), left_out=tuple(left_out))
        write_json(self._decision, budget.model_dump(mode="json"))
        if not left_out:
            return None
        self._arm_runner.reporter.warn(f"--minutes {minutes:g}: left out {', '.join(left_out)}. The rule: {RULE}.")
        return budget

    def _droppable(self, advice: Advice | None, stages: Mapping[str, Sequence[Load]]) -> list[str]:
        """Return the arms in the order in which they are left out."""
        meeting = [load.plan for load in stages.get("contest", ())]
        extra = [TUNED_RETRIEVED] if any(plan.kind == "tuned-retrieved" for plan in meeting) else []
        extra += [plan.name for plan in meeting if plan.kind == "tuned" and plan.optimized]
        extra += [TUNED_CONSTRAINED.name] if TUNED_CONSTRAINED in meeting else []
        if advice is not None:
            return extra
        plans = [load.plan for load in self._workload.entrants(())]
        retrieved = [plan for plan in self._arm_runner.prompting_arms if plan.kind == "retrieved"]
        kept = {ZERO_SHOT, *sorted(retrieved, key=lambda plan: plan.shots)[:1]}
        order = sorted(enumerate(plans), key=lambda at: (-at[1].shots, at[1].kind != "static", -at[0]))
        return [*extra, *(plan.name for _, plan in order if plan not in kept)]

    # Messages

    def _announcement(self, stages: Mapping[str, Sequence[Load]]) -> str:
        assert self._speed is not None
        return (
            f"{self._workload.text(stages)}: {minutes_text(self._total(stages))} "
            f"(timed: {self._speed.text}).{self._workload.not_counted(stages)}"
        )


def _names(stages: Mapping[str, Sequence[Load]]) -> str:
    loads = [load for loads in stages.values() for load in loads]
    return ", ".join(dict.fromkeys(BEST if load.title.startswith(BEST) else load.plan.name for load in loads))
