"""The schedule of a command's answers: announced in minutes, counted down, and trimmed to a budget."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from tunewright.adapters.registry import Adapter
from tunewright.chat.answers import answer_length
from tunewright.core.clock import seconds_since, without_milliseconds
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.core.progress import minutes_text
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
from tunewright.evaluation.eta import Work
from tunewright.evaluation.generations import Prompt
from tunewright.evaluation.prompt_search import advice_file, first_rows, known_advice, prepare
from tunewright.evaluation.repeats import MOST_ITEMS
from tunewright.evaluation.runner import evaluation_progress, parent_of
from tunewright.evaluation.speed import AnswerSpeed, adapted_factor, answer_speed, kept_factor, kept_speed
from tunewright.evidence.common import RULE, Budget
from tunewright.evidence.schema import Advice, Arm
from tunewright.training.packing.groups import common_prefix

_SAMPLED = 200
"""Number of training rows that stand for the length of all answers."""
TUNED_RETRIEVED = "tuned+retrieved"
"""Budget name of the arm before the number of its demonstrations is known."""
NOISE = "noise floor"
_BEST = "the best prompting arm"
"""Placeholder for the arm chosen on dev, before it is known."""
_FRESH = 300
"""Seconds: an older timing is repeated before it makes a budget fail."""


@dataclass(frozen=True)
class Contest:
    """The comparison of an adapter with the prompting arms on a split."""

    adapter: Adapter
    split: Literal["test", "dev"]


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


@dataclass(frozen=True)
class _Load:
    """One arm's answers to some items, and the unshared prompt tokens of each."""

    title: str
    plan: ArmPlan
    answers: int
    kept: int
    read: float


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
        self._speed: AnswerSpeed | None = None
        self._parents: tuple[Adapter | None] | None = None
        """The contest's parent, once it has been looked for."""
        self._slower = 1.0
        self._loads: dict[ArmPlan, _Load | None] = {}
        self._wholes: dict[ArmPlan, _Load | None] = {}
        self._journals: dict[tuple[str | None, bool], frozenset[str]] = {}
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
        stages = self._stages(advice, self._left_out)
        if not any(load.answers for loads in stages.values() for load in loads):
            if self._turns and not self._known(advice_file(self._arm_runner, self._left_out)):
                self._arm_runner.reporter.say(f"All answers are there.{self._not_counted(stages)}")
            return
        self._measure()
        if self._minutes is not None and self.budget is None and not self._decision.exists():
            self.budget = self._trimmed(advice, self._minutes)
            # With fewer arms, the choice may have been made before.
            advice = self._known_advice()
            stages = self._stages(advice, self._left_out)
        for stage, loads in stages.items():
            self._plan(stage, loads)
        self._arm_runner.reporter.say(self._announcement(stages))

    def estimate(self, *, measure: bool) -> AnswersEstimate:
        """Return the work that :meth:`settle` would report.

        Args:
            measure: time two batches if no speed is kept. Their answers are kept, so they are not computed twice.

        Raises:
            UserError: choosing a prompt failed.
        """
        advice = self._known_advice()
        if advice is None:
            prepare(self._arm_runner)
        stages = self._stages(advice, ())
        loads = [load for loads in stages.values() for load in loads]
        kept, missing = sum(load.kept for load in loads), sum(load.answers for load in loads)
        if not missing:
            text = f"All answers are there.{self._not_counted(stages)}"
            return AnswersEstimate(text, kept, kept, 0.0)
        if measure:
            self._measure()
            stages = self._stages(advice, ())  # the timed answers are kept now
        elif not self._use_kept_speed():
            text = f"{self._work_text(stages)}.{self._not_counted(stages)}"
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
            self._forget()
            loads = [self._exact(plan, members, split, self._adapter_of(plan, adapter)) for plan in plans]
            self._plan(stage, [replace(load, kept=max(load.kept - counted, 0)) for load in loads])

    def _plan(self, stage: str, loads: Sequence[_Load]) -> None:
        countdown = self._arm_runner.generator.countdown
        countdown.plan(stage, [Work(x.title, x.answers, x.kept, self._seconds(x)) for x in loads])

    @property
    def _left_out(self) -> tuple[str, ...]:
        return self.budget.left_out if self.budget else ()

    def _known_advice(self) -> Advice | None:
        return known_advice(self._arm_runner, advice_file(self._arm_runner, self._left_out))

    def _stages(self, advice: Advice | None, left_out: Sequence[str]) -> dict[str, list[_Load]]:
        stages: dict[str, list[_Load]] = {}
        if advice is None:
            stages |= self._choosing(left_out)
        if self._contest is not None:
            stages["contest"] = self._contest_arms(self._contest, advice, left_out)
            if stages["contest"] and self._contest.split == "test":
                test = self._arm_runner.version.examples("test")
                items = min(MOST_ITEMS, len({m.example.input_key for m in test}))
                zero = next(load for load in stages["contest"] if load.plan == ZERO_SHOT)
                stages["noise"] = [_Load(NOISE, ZERO_SHOT, 2 * items, 0, zero.read)]
        if self._pilots and not self._known(advice_file(self._arm_runner, left_out)):
            dev = self._arm_runner.version.examples("dev")
            stages["pilots"] = [
                _Load("tuned on dev", TUNED, len(dev), 0, self._entrant(ZERO_SHOT).read) for _ in range(self._pilots)
            ]
        return stages

    def _entrants(self, left_out: Sequence[str]) -> list[_Load]:
        """Return the prompting arms that fit the context, on the items that all of them answer."""
        plans = [plan for plan in self._arm_runner.prompting_arms if plan.name not in left_out]
        return [load for plan in plans if (load := self._fitting(plan)) is not None]

    def _fitting(self, plan: ArmPlan) -> _Load | None:
        if plan not in self._loads:
            first = first_rows(self._arm_runner)
            infeasible_reason = self._arm_runner.infeasible_reason(plan, first)
            self._loads[plan] = None if infeasible_reason else self._exact(plan, first, "dev")
        return self._loads[plan]

    def _entrant(self, plan: ArmPlan) -> _Load:
        found = self._fitting(plan)
        if found is None:
            raise UserError(
                "No prompt fits the base's context", fix="Shorten the examples or use a base with a longer context."
            )
        return found

    def _exact(self, plan: ArmPlan, members: Sequence[Member], split: str, adapter: Adapter | None = None) -> _Load:
        arm_runner = self._arm_runner
        prompts = sorted(set(arm_runner.prompts(plan, members)[0]))
        kept = self._kept(adapter if plan.adapted else None, constrained=plan.constrained)
        missing = [prompt for prompt in prompts if digest(prompt) not in kept]
        shared = common_prefix(prompts[0], prompts[-1]) if len(prompts) > 1 else 0
        read = fmean(map(len, prompts)) - shared
        return _Load(f"{plan.name} on {split}", plan, len(missing), len(prompts) - len(missing), read)

    def _kept(self, adapter: Adapter | None, *, constrained: bool) -> frozenset[str]:
        key = (None if adapter is None else adapter.digest, constrained)
        if key not in self._journals:
            arm_runner = self._arm_runner
            self._journals[key] = arm_runner.generator.kept(arm_runner.limit, adapter, constrained=constrained)
        return self._journals[key]

    def _forget(self) -> None:
        """Read the journals again at the next question: there are new answers."""
        self._loads.clear()
        self._wholes.clear()
        self._journals.clear()

    def _choosing(self, left_out: Sequence[str]) -> dict[str, list[_Load]]:
        """Return all entrants on the first items, then the costliest possible finalists on the rest of dev."""
        settings, dev = self._arm_runner.settings, self._arm_runner.version.examples("dev")
        entrants = self._entrants(left_out)
        shown = [load for load in entrants if load.plan.shots]
        other = other_instructions(ZERO_SHOT, settings, self._arm_runner.optimized)
        if shown and other:
            dearest = max(shown, key=lambda load: load.read)
            items = len(first_rows(self._arm_runner))
            entrants += [
                _Load(f"another instruction {n} on dev", dearest.plan, items, 0, dearest.read)
                for n in range(len(other))
            ]
        rest = len(dev) - len(first_rows(self._arm_runner))
        if rest <= 0:
            return {"entrants": entrants}
        zero_shot = self._exact(ZERO_SHOT, dev, "dev")
        others = {load.plan.any_seed: load for load in entrants if load.plan != ZERO_SHOT}
        # The finalists are not known yet: at most those with the most left to answer, and of those the costliest.
        left_of = {load.plan: self._left(load) for load in others.values()}
        most = sorted(others.values(), key=lambda load: (left_of[load.plan] * load.read, load.read), reverse=True)
        finalists = [
            _Load(f"finalist {n} on dev", load.plan, left_of[load.plan], rest - left_of[load.plan], load.read)
            for n, load in enumerate(most[: settings.finalists])
        ]
        left = zero_shot.answers - self._entrant(ZERO_SHOT).answers
        return {
            "entrants": entrants,
            "finalists": [_Load(zero_shot.title, ZERO_SHOT, left, rest - left, zero_shot.read), *finalists],
        }

    def _left(self, entrant: _Load) -> int:
        """Return the number of an arm's missing answers on the dev items that not all entrants answer."""
        dev = self._arm_runner.version.examples("dev")
        if entrant.plan not in self._wholes:
            infeasible_reason = self._arm_runner.infeasible_reason(entrant.plan, dev)
            self._wholes[entrant.plan] = None if infeasible_reason else self._exact(entrant.plan, dev, "dev")
        whole = self._wholes[entrant.plan]
        # An arm that does not fit all of dev is left out then: counted in full, it is an upper bound.
        return len(dev) - len(first_rows(self._arm_runner)) if whole is None else whole.answers - entrant.answers

    def _contest_arms(self, contest: Contest, advice: Advice | None, left_out: Sequence[str]) -> list[_Load]:
        """Return the contest's arms; dev prompts stand in for those of a test split that is still closed."""
        arm_runner = self._arm_runner
        members = arm_runner.version.examples(contest.split)
        if advice is not None:
            progress = evaluation_progress(arm_runner, contest.adapter, advice, contest.split)
            if progress.evaluated:
                return []
            if progress.opened:
                plans = [plan for plan in progress.plans if _budget_name(plan) not in left_out]
                if contest.split == "dev":  # the others are answered while a prompt is chosen
                    plans = [plan for plan in plans if plan.adapted]
                return [
                    self._exact(plan, members, contest.split, self._adapter_of(plan, contest.adapter)) for plan in plans
                ]
        items, on = len(members), f"on {contest.split}"
        reads = {arm.name: _read(arm) for arm in _arms(advice)} or {
            x.plan.name: x.read for x in self._entrants(left_out)
        }
        retrieved = [read for name, read in reads.items() if name.startswith("retrieved")]
        best = max(reads.values()) if advice is None else reads[advice.best]
        zero = reads[ZERO_SHOT.name]
        loads = []
        if contest.split == "test":
            loads += [
                _Load(f"{ZERO_SHOT.name} {on}", ZERO_SHOT, items, 0, zero),
                _Load(f"{_BEST} {on}", ArmPlan("retrieved", 1), items, 0, best),
            ]
            loads.append(_Load(f"{TUNED.name} {on}", TUNED, items, 0, zero))
        else:
            loads.append(self._exact(TUNED, members, contest.split, contest.adapter))
        if self._parent(contest.adapter) is not None:
            loads.append(_Load(f"{PARENT.name} {on}", PARENT, items, 0, zero))
        settings = arm_runner.settings
        if settings.tuned_retrieved and retrieved and TUNED_RETRIEVED not in left_out:
            read = max(retrieved) if advice is None or advice.best_retrieved is None else reads[advice.best_retrieved]
            loads.append(_Load(f"{TUNED_RETRIEVED} {on}", ArmPlan("tuned-retrieved", 1), items, 0, read))
        plan = tuned_optimized(arm_runner.optimized)
        if plan is not None and plan.name not in left_out:
            loads.append(_Load(f"{plan.name} {on}", plan, items, 0, zero))
        if settings.structured_outputs is not None and TUNED_CONSTRAINED.name not in left_out:
            loads.append(_Load(f"{TUNED_CONSTRAINED.name} {on}", TUNED_CONSTRAINED, items, 0, zero))
        return loads

    def _parent(self, adapter: Adapter) -> Adapter | None:
        """Return the adapter that the contest's one started from, if it is here."""
        if self._parents is None:
            self._parents = (parent_of(self._arm_runner, adapter),)
        return self._parents[0]

    def _adapter_of(self, plan: ArmPlan, adapter: Adapter | None) -> Adapter | None:
        return adapter if adapter is None or plan.kind != PARENT.kind else self._parent(adapter)

    # Timing

    def _measure(self, *, again: bool = False) -> None:
        """Use the kept speeds, or time two batches of dev prompts: the shortest and the longest arm's.

        Args:
            again: time them even if speeds are kept.
        """
        arm_runner, keyed = self._arm_runner, self._keyed
        first = first_rows(arm_runner)

        def short() -> Sequence[Prompt]:
            return arm_runner.prompts(ZERO_SHOT, first)[0]

        def long() -> Sequence[Prompt]:
            fits = [load for load in self._entrants(()) if load.plan.shots and not load.plan.constrained]
            return arm_runner.prompts(max(fits, key=lambda load: load.read).plan, first)[0] if fits else []

        generator, limit = arm_runner.generator, arm_runner.limit
        self._speed = answer_speed(generator, limit, short, long, keyed, again=again)
        if self._contest is not None:
            adapter = self._contest.adapter
            self._slower = adapted_factor(generator, limit, short, adapter, self._speed, keyed, again=again)
        self._forget()  # the timed answers are in the journal now

    def _use_kept_speed(self) -> bool:
        """Use the kept speeds, and return False if no speed is kept; an adapter without one counts as the base."""
        generator, limit, keyed = self._arm_runner.generator, self._arm_runner.limit, self._keyed
        self._speed = kept_speed(generator, limit, keyed)
        if self._speed is not None and self._contest is not None:
            self._slower = kept_factor(generator, limit, self._contest.adapter, self._speed, keyed) or 1.0
        return self._speed is not None

    @property
    def _keyed(self) -> dict[str, Any]:
        """Names of the dataset and arms, which decide the prompts of the timed batches."""
        arm_runner = self._arm_runner
        return {"dataset": arm_runner.version.digest, "arms": [p.name for p in arm_runner.prompting_arms]}

    def _seconds(self, load: _Load) -> float:
        assert self._speed is not None
        plain, shown = self._speed.answer_tokens
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

    def _total(self, stages: Mapping[str, Sequence[_Load]]) -> float:
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
        stages = self._stages(advice, left_out)
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
            fewer = self._stages(advice, without)
            if self._total(fewer) < total:  # else its answers already exist
                left_out, stages = without, fewer
        budget = Budget(minutes=minutes, expected=round(total / 60, 2), left_out=tuple(left_out))
        write_json(self._decision, budget.model_dump(mode="json"))
        if not left_out:
            return None
        self._arm_runner.reporter.warn(f"--minutes {minutes:g}: left out {', '.join(left_out)}. The rule: {RULE}.")
        return budget

    def _droppable(self, advice: Advice | None, stages: Mapping[str, Sequence[_Load]]) -> list[str]:
        """Return the arms in the order in which they are left out."""
        meeting = [load.plan for load in stages.get("contest", ())]
        extra = [TUNED_RETRIEVED] if any(plan.kind == "tuned-retrieved" for plan in meeting) else []
        extra += [plan.name for plan in meeting if plan.kind == "tuned" and plan.optimized]
        extra += [TUNED_CONSTRAINED.name] if TUNED_CONSTRAINED in meeting else []
        if advice is not None:
            return extra
        plans = [load.plan for load in self._entrants(())]
        retrieved = [plan for plan in self._arm_runner.prompting_arms if plan.kind == "retrieved"]
        kept = {ZERO_SHOT, *sorted(retrieved, key=lambda plan: plan.shots)[:1]}
        order = sorted(enumerate(plans), key=lambda at: (-at[1].shots, at[1].kind != "static", -at[0]))
        return [*extra, *(plan.name for _, plan in order if plan not in kept)]

    # Messages

    def _announcement(self, stages: Mapping[str, Sequence[_Load]]) -> str:
        assert self._speed is not None
        return (
            f"{self._work_text(stages)}: {minutes_text(self._total(stages))} "
            f"(timed: {self._speed.text}).{self._not_counted(stages)}"
        )

    def _work_text(self, stages: Mapping[str, Sequence[_Load]]) -> str:
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

    def _not_counted(self, stages: Mapping[str, Sequence[_Load]]) -> str:
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


def _budget_name(plan: ArmPlan) -> str:
    return TUNED_RETRIEVED if plan.kind == "tuned-retrieved" else plan.name


def _arms(advice: Advice | None) -> Sequence[Arm]:
    if advice is None:
        return []
    return [*(advice.narrowing.arms if advice.narrowing else []), *advice.arms]


def _read(arm: Arm) -> float:
    return arm.prompt_tokens - arm.shared_tokens


def _arms_text(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _names(stages: Mapping[str, Sequence[_Load]]) -> str:
    loads = [load for loads in stages.values() for load in loads]
    return ", ".join(dict.fromkeys(_BEST if load.title.startswith(_BEST) else load.plan.name for load in loads))
