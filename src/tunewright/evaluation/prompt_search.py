"""The search for the best prompting arm on dev: all arms answer a part of it, the finalists all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.config import EvaluateConfig
from tunewright.core.errors import UserError
from tunewright.core.io import digest, json_document, write_text
from tunewright.core.progress import Reporter
from tunewright.data.examples import Example
from tunewright.data.versions import Member
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.arm_runner import ArmRunner, measured_arm, scored_arms
from tunewright.evaluation.arms import ZERO_SHOT, ArmPlan, by_value, other_instructions, plan_of, prompting_arms
from tunewright.evaluation.free_arms import free_on_dev, with_drops
from tunewright.evaluation.generations import ArmAnswer, Generator
from tunewright.evaluation.time_limit import TimeLimit
from tunewright.evidence.schema import Advice, Arm, LeftOut, Narrowing, SeedSpread
from tunewright.evidence.scoring import ScoredArms, count_references, measured_metrics, scored_contrast
from tunewright.metrics import check_references, points_text

_SHOWN = 3
_RULE = (
    "of static arms with the same number of demonstrations the best draw; of all arms those whose difference to the "
    "leader has a paired 95% interval that reaches 0, at most {}, by score; and zero-shot in any case"
)


def warn_of_unreachable(generator: Generator, members: Sequence[Member], reporter: Reporter) -> None:
    """Warn of rows whose reference holds a stop string or does not match the grammar of the answers."""

    def is_cut(example: Example) -> bool:
        return any(stop in example.output for stop in generator.stop)

    if generator.stop:
        _warn("evaluate.stop", "hold a stop string, so every answer ends before", is_cut, members, reporter)
    constraints = generator.constraints
    if constraints is not None:

        def differs(example: Example) -> bool:
            return not constraints.allow(example)

        what = "do not match the grammar, so no constrained answer can equal"
        _warn("evaluate.structured_outputs", what, differs, members, reporter)


def _warn(
    where: str, what: str, wrong: Callable[[Example], bool], members: Sequence[Member], reporter: Reporter
) -> None:
    found = [member for member in members if wrong(member.example)]
    if not found:
        return
    rows = "; ".join(f"{m.key[:12]} {m.example.output.strip().splitlines()[:1]}" for m in found[:_SHOWN])
    message = f"{len(found):,} of {len(members):,} references {what} them: {rows}"
    if len(found) > _SHOWN:
        message += f"; and {len(found) - _SHOWN:,} more"
    if len(found) == len(members):
        raise UserError(message, where=where, fix="Change it in tunewright.yaml, or the rows.")
    reporter.warn(f"{where}: {message}")


_RESAMPLES = 1_000
"""Number of resamples for the choice; the evidence of the test split has ten times as many."""


@dataclass(frozen=True)
class AdviseResult:
    """The result of `advise`."""

    file: Path
    advice: Advice
    measured: bool
    """False when the same arms had already been measured."""


def advise(arm_runner: ArmRunner, limit: TimeLimit | None = None) -> AdviseResult:
    """Measure the prompting arms on the dev split with the untuned base, and choose the best.

    The time limit, if any, leaves out the arms that do not fit.
    """
    arm_runner.budget = limit.budget if limit else None
    file = advice_file(arm_runner)
    known = known_advice(arm_runner, file)
    if known is None:
        prepare(arm_runner)
        with arm_runner.generator.rate.together(_most_answers(arm_runner)):
            advice = _Choice(arm_runner, limit).advice()
        file = advice_file(arm_runner)
        # Arms may have been left out meanwhile; the choice among the rest may be stored already.
        known = known_advice(arm_runner, file)
    elif limit is not None:
        limit.warn_of_no_speed()
    if known is not None:
        if known.free is None:  # advice of an earlier version
            known = known.model_copy(update={"free": free_on_dev(arm_runner, timed=limit is not None)[0]})
        return AdviseResult(file, known, measured=False)
    document = json_document(advice.model_dump(mode="json"))
    if (access_log := _access_log(arm_runner)) is not None:
        access_log.write(file, document)
    else:
        write_text(file, document)
    return AdviseResult(file, advice, measured=True)


def advice_file(arm_runner: ArmRunner) -> Path:
    """Return the path of the advice on all arms that are not left out, whether or not it exists."""
    decides = {**arm_runner.inputs, **choosing_inputs(arm_runner.settings, arm_runner.optimized)}
    left_out = arm_runner.budget.left_out if arm_runner.budget else ()
    decides["arms"] = [name for name in decides["arms"] if name not in left_out]
    return arm_runner.folder / f"advice-{digest(decides)[:12]}.json"


def known_advice(arm_runner: ArmRunner, file: Path) -> Advice | None:
    """Return stored advice, or None."""
    access_log = _access_log(arm_runner)
    if not file.exists():
        return None
    if access_log is not None:
        access_log.require(file)
    return Advice.model_validate_json(file.read_text(encoding="utf-8"))


def _access_log(arm_runner: ArmRunner) -> AccessLog | None:
    """Return the log that binds the advice; None for a fold's advice, which is a cache like its answers."""
    evaluations = arm_runner.project.evaluations
    return AccessLog(evaluations) if arm_runner.folder == evaluations else None


def prepare(arm_runner: ArmRunner) -> None:
    """Refuse what cannot be measured, and warn of low scores to come, before any answer."""
    if arm_runner.settings.instructions or arm_runner.optimized:
        _ = arm_runner.instruction
    warn_of_unreachable(arm_runner.generator, arm_runner.version.domain, arm_runner.reporter)
    dev = [m.example for m in arm_runner.version.examples("dev")]
    check_references(arm_runner.scorers, dev, "dev", arm_runner.reporter)
    arm_runner.warn_of_longer("dev")


def choosing_inputs(settings: EvaluateConfig, optimized: str | None = None) -> dict[str, Any]:
    """Return everything that decides the prompting arms and the choice among them: the config, an optimized prompt."""
    return {
        "arms": [plan.name for plan in prompting_arms(settings, optimized)],
        "instructions": settings.instructions,
        "screening_items": settings.screening_items,
        "finalists": settings.finalists,
        **({} if optimized is None else {"optimized": optimized}),
        **({"embedding_model": settings.embedding_model} if "sentence-transformers" in settings.retrievers else {}),
    }


def first_rows(arm_runner: ArmRunner) -> list[Member]:
    """Return the dev rows that every prompting arm answers: all of dev, if within screening_items."""
    dev, count = arm_runner.version.examples("dev"), arm_runner.settings.screening_items
    if count is None or count >= len(dev):
        return list(dev)
    return [dev[place] for place in first_items(dev, count, arm_runner.project.config.seed)]


def _most_answers(arm_runner: ArmRunner) -> int:
    """Return the number of answers that a choice looks up or computes, at most."""
    settings, dev, first = arm_runner.settings, arm_runner.version.examples("dev"), first_rows(arm_runner)
    arms = len(arm_runner.prompting_arms) + len(other_instructions(ZERO_SHOT, settings, arm_runner.optimized))
    finalists = min(settings.finalists, arms - 1) + 1 if len(first) < len(dev) else 0  # and zero-shot
    return arms * len(first) + finalists * len(dev)


class _Choice:
    """A choice in progress: the arms' answers so far, and the arms that were left out."""

    def __init__(self, arm_runner: ArmRunner, limit: TimeLimit | None) -> None:
        self._arm_runner = arm_runner
        self._limit = limit
        self._config = arm_runner.project.config
        self._settings = arm_runner.settings
        self._metric = arm_runner.scorers[0].name
        self._dev = arm_runner.version.examples("dev")
        self._left_out: dict[str, str] = {}

    def advice(self) -> Advice:
        dev, first = self._dev, first_rows(self._arm_runner)
        free = free_on_dev(self._arm_runner, timed=self._limit is not None)
        narrow = len(first) < len(dev)
        answered = self._entrants(first)
        scored, entrants = self._scored(first, answered)
        arms, narrowing = entrants, None
        if narrow:
            fates = self._fates(scored, entrants)
            going_on = [plan for plan in entrants if plan.name not in fates]
            narrowing = Narrowing(
                items=len(first),
                clusters=len({m.cluster for m in first}),
                rule=_RULE.format(self._settings.finalists),
                arms=list(entrants.values()),
                finalists=tuple(plan.name for plan in going_on),
                fates=fates,
            )
            self._arm_runner.reporter.say(
                f"{len(going_on)} of {len(entrants)} prompting arms advance from {len(first)} dev items to all "
                f"{len(dev)}: {', '.join(narrowing.finalists)}"
            )
            scored, arms = self._scored(dev, self._answers(going_on, dev))
        if not arms:
            raise UserError(
                "No prompt fits the base's context", fix="Shorten the examples or use a base with a longer context."
            )
        if self._limit is not None:
            self._limit.settle()
            self._arm_runner.budget = self._limit.budget
        if (budget := self._arm_runner.budget) is not None:
            self._left_out = dict.fromkeys(budget.prompting, budget.why) | self._left_out
        # If none of the finalists retrieves, the first items decide the best retrieved arm.
        retrieving = _of_kind("retrieved", arms) or _of_kind("retrieved", entrants)
        best = self._best(arms).name
        return Advice(
            metric=self._metric,
            metrics=measured_metrics(
                self._arm_runner.scorers, several=count_references([m.example for m in self._dev]) is not None
            ),
            items=len(dev),
            clusters=len({m.cluster for m in dev}),
            arms=list(arms.values()),
            best=best,
            best_retrieved=self._best(retrieving).name if retrieving else None,
            narrowing=narrowing,
            static=self._spreads(entrants),
            left_out=tuple(LeftOut(name=name, why=why) for name, why in self._left_out.items()),
            max_new_tokens=self._arm_runner.limit,
            engine=self._arm_runner.generator.used,
            budget=budget,
            free=with_drops(free[0], scored | free[1], self._config, prompting=best),
        )

    def _entrants(self, first: Sequence[Member]) -> dict[ArmPlan, list[ArmAnswer]]:
        """Return all arms' answers to the first items, and the best arm's with the other instructions."""
        plans, limit = self._arm_runner.prompting_arms, self._limit
        found: dict[ArmPlan, list[ArmAnswer]] = {}
        if limit is None:
            found = self._answers(by_value(plans), first)
        else:  # each arm waits for the estimate of its time
            for plan in by_value(plans):
                if limit.allows(plan.name):
                    found |= self._answers([plan], first)
        # Ties go to the arm that the config names first, whatever the order of answering.
        answered = {plan: found[plan] for plan in plans if plan in found}
        with_shots = {plan: given for plan, given in answered.items() if plan.shots}
        optimized = self._arm_runner.optimized
        if with_shots and (self._settings.instructions or optimized):
            _, arms = self._scored(first, with_shots)
            others = other_instructions(plan_of(self._best(arms)), self._settings, optimized)
            answered |= self._answers(others, first)
        return answered

    def _answers(self, plans: Sequence[ArmPlan], members: Sequence[Member]) -> dict[ArmPlan, list[ArmAnswer]]:
        """Return the answers of the arms that can answer all of these rows."""
        fitting = []
        for plan in plans:
            why = self._arm_runner.infeasible_reason(plan, members)
            if why is None:
                fitting.append(plan)
            else:
                self._left_out[plan.name] = why
                self._arm_runner.reporter.warn(f"{plan.name} is left out: {why}")
        answers = self._arm_runner.answer_arms([(plan, None) for plan in fitting], members, "dev")
        return {plan: answers[plan.name] for plan in fitting}

    def _scored(
        self, members: Sequence[Member], answered: Mapping[ArmPlan, Sequence[ArmAnswer]]
    ) -> tuple[ScoredArms, dict[ArmPlan, Arm]]:
        """Return all arms' scores on the same items, and each arm's measurement."""
        given_by = {plan.name: given for plan, given in answered.items()}
        scored = scored_arms(self._arm_runner.scorers, members, given_by, self._dev)
        seed = self._config.seed
        return scored, {p: measured_arm(p.name, p, given, scored, seed, _RESAMPLES) for p, given in answered.items()}

    def _best(self, arms: Mapping[ArmPlan, Arm]) -> Arm:
        """Return the best score; ties go to the fewest demonstrations, then to the first."""
        return max(arms.values(), key=lambda arm: (arm.score(self._metric).value, -arm.shots))

    def _fates(self, scored: ScoredArms, arms: Mapping[ArmPlan, Arm]) -> dict[str, str]:
        """Return the reason for each eliminated arm, by name (see `_RULE`)."""
        fates: dict[str, str] = {}
        leader = self._best(arms)
        left: list[Arm] = []
        for plan, arm in arms.items():
            draws = {p: a for p, a in arms.items() if p.any_seed == plan.any_seed}
            if (chosen := self._best(draws)) != arm:
                fates[arm.name] = f"{chosen.name} is the best of its draws"
            elif arm == leader or (why := self._worse(scored, arm, leader)) is None:
                left.append(arm)
            else:
                fates[arm.name] = why
        ranked = sorted(left, key=lambda arm: (-arm.score(self._metric).value, arm.shots))
        for arm in ranked[self._settings.finalists :]:
            fates[arm.name] = (
                f"not shown to be worse than {leader.name}, but not among the best {self._settings.finalists}"
            )
        fates.pop(ZERO_SHOT.name, None)
        return fates

    def _worse(self, scored: ScoredArms, arm: Arm, leader: Arm) -> str | None:
        found = scored_contrast(scored, self._metric, arm.name, leader.name, self._config.seed, _RESAMPLES)
        if found.interval.high >= 0:
            return None
        low, high = points_text(found.interval.low), points_text(found.interval.high)
        return f"{points_text(found.difference)} points against {leader.name}, 95% interval {low} to {high}"

    def _spreads(self, arms: Mapping[ArmPlan, Arm]) -> tuple[SeedSpread, ...]:
        static = {
            plan.any_seed: [a for p, a in arms.items() if p.any_seed == plan.any_seed] for plan in arms if plan.seed
        }
        return tuple(
            SeedSpread(
                name=plan.name,
                shots=plan.shots,
                items=drawn[0].items,
                scores=tuple(arm.score(self._metric).value for arm in drawn),
            )
            for plan, drawn in static.items()
        )


def _of_kind(kind: str, arms: Mapping[ArmPlan, Arm]) -> dict[ArmPlan, Arm]:
    return {plan: arm for plan, arm in arms.items() if plan.kind == kind}


def first_items(members: Sequence[Member], count: int, seed: int) -> list[int]:
    """Return the indices of a systematic sample, with equal chances for rows and fair shares for clusters.

    Every cluster has its share to within a row. Rows are laid out by cluster, in an order drawn from the seed. They are
    taken at equal distances from a random start (Cochran 1977, "Sampling Techniques", chapter 8).
    """
    line = sorted(
        range(len(members)),
        key=lambda i: (_seeded_order(seed, members[i].cluster), _seeded_order(seed, members[i].key)),
    )
    step = len(members) / count
    start = int(_seeded_order(seed, "start")[:13], 16) / 16**13 * step
    return sorted(line[int(start + n * step)] for n in range(count))


def _seeded_order(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
