"""The answers that a command still has to compute: which arms, on which items, and which of them are kept."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial

from tunewright.adapters.registry import Adapter
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.evaluation.arm_runner import MOST_ITEMS, NOISE, ArmRunner
from tunewright.evaluation.arms import (
    PARENT,
    TUNED,
    TUNED_CONSTRAINED,
    TUNED_RETRIEVED,
    ZERO_SHOT,
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

Contest = tuple[Adapter, Split]
"""The comparison of an adapter with the prompting arms on a split."""
_BEST = "the best prompting arm"


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
    works = remaining_work(runner, contest, 0, (), chosen)
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
    remaining = partial(remaining_work, runner, contest, pilots)
    return TimeLimit(minutes, file, runner.generator.rate, remaining, runner.reporter)


def remaining_work(
    runner: ArmRunner, contest: Contest | None, pilots: int, without: Collection[str], chosen: bool
) -> list[Work]:
    """Return the answers of a command in the order of answering, without the arms of these names.

    The arms are those of the choice of a prompt, unless it is ``chosen``, of the contest, if any, and of ``pilots``
    adapters that are still to be trained.
    """
    dev = len(runner.version.examples("dev"))
    short = runner.work(ZERO_SHOT, first_rows(runner)).tokens
    works = [] if chosen else _choice_work(runner, without)
    works += [] if contest is None else _contest_work(runner, *contest, short)
    works += [Work(TUNED.name, dev, tokens=short) for _ in range(pilots)]
    return [work for work in works if work.arm not in without]


def _choice_work(runner: ArmRunner, without: Collection[str]) -> list[Work]:
    """Return all entrants on the first items, zero-shot on all of dev, and as many finalists as there may be."""
    dev, first = runner.version.examples("dev"), first_rows(runner)
    always = always_answered(runner.prompting_arms)
    entrants = [
        replace(runner.work(plan, dev if plan == ZERO_SHOT else first), optional=plan not in always)
        for plan in by_value(runner.prompting_arms)
        if plan.name not in without and runner.infeasible_reason(plan, first) is None
    ]
    others = other_instructions(ZERO_SHOT, runner.settings, runner.optimized)
    finalists = min(runner.settings.finalists, len(entrants) - 1) if len(first) < len(dev) else 0
    return [
        *entrants,
        *(Work("another instruction", len(first)) for _ in others),
        *(Work("a finalist", len(dev) - len(first)) for _ in range(finalists)),
    ]


def _contest_work(runner: ArmRunner, adapter: Adapter, split: Split, short: float | None) -> list[Work]:
    """Return the contest's arms by their number, since while the test split is closed its prompts may not be made."""
    advice = known_advice(runner, advice_file(runner))
    if advice and (plan_comparison(runner, adapter, advice, split).folder / EVIDENCE_FILE).exists():
        return []
    rows = runner.version.examples(split)
    # On dev, the base's arms are answered while a prompt is chosen.
    names = [TUNED.name] if split == "dev" else [ZERO_SHOT.name, _BEST, TUNED.name]
    names += [PARENT.name] if parent_of(runner, adapter) is not None else []
    optional = [TUNED_CONSTRAINED.name] if runner.settings.structured_outputs is not None else []
    if (optimized := tuned_optimized(runner.optimized)) is not None:
        optional.append(optimized.name)
    if runner.settings.tuned_retrieved and any(plan.kind == "retrieved" for plan in runner.prompting_arms):
        optional.append(TUNED_RETRIEVED)
    # Prompts with demonstrations are longer than the short ones, as the longest of the other arms.
    tokens = dict.fromkeys([*names, *optional], short) | {_BEST: None, TUNED_RETRIEVED: None}
    works = [Work(name, len(rows), 0, tokens[name], name in optional) for name in [*names, *optional]]
    if split == "test":
        works.append(Work(NOISE, 2 * min(MOST_ITEMS, len({m.example.input_key for m in rows})), tokens=short))
    return works
