"""The answers that a command still has to compute: which arms, on how many items, and how many of them are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tunewright.adapters.registry import Adapter
from tunewright.core.io import digest
from tunewright.core.progress import duration
from tunewright.core.text import first_of
from tunewright.data.versions import Member
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
from tunewright.evaluation.benchmarks.runner import suite_names
from tunewright.evaluation.frozen_answers import Split
from tunewright.evaluation.prompt_search import advice_file, first_rows, known_advice, prepare
from tunewright.evaluation.runner import parent_of, plan_comparison
from tunewright.evaluation.speeds import Speeds
from tunewright.evaluation.time_limit import AnswersEstimate, TimeLimit, Work
from tunewright.evidence.files import EVIDENCE_FILE

Contest = tuple[Adapter | None, Split]
"""The comparison of an adapter (None: one that is not trained yet) with the prompting arms on a split."""


def estimated_answers(runner: ArmRunner, contest: Contest) -> AnswersEstimate:
    """Count the answers of an evaluation; none is computed."""
    works = contest_works(runner, contest)
    measured = contest[0] is not None and contest[1] == "test" and not works
    if known_advice(runner, advice_file(runner)) is None:
        prepare(runner)
        works += choice_works(runner)
    missing, kept = sum(work.answers for work in works), sum(work.kept for work in works)
    text = "All answers are there."
    if missing:
        others = "; the others are kept from before" if kept else ""
        text = f"To answer: at most {missing:,} of {missing + kept:,} answers{others}."
    if contest[0] is None:
        text += " This counts an adapter that is not trained yet."
    suites = suite_names(runner.project.config.regressions) if contest[1] == "test" and not measured else []
    seconds, took = expected_time(runner.generator.speeds, works, suites)
    return AnswersEstimate(f"{text} {took}" if missing or suites else text, missing + kept, kept, seconds)


def expected_time(speeds: Speeds, works: Sequence[Work], suites: Sequence[str]) -> tuple[float | None, str]:
    """Return the expected seconds of answers and suites with their ground in words; None if no answer was timed."""
    answers, checks = speeds.of_answers(works), {name: speeds.of_suite(name) for name in suites}
    untimed = [name for name, seconds in checks.items() if seconds is None]
    timed = sum(seconds for seconds in checks.values() if seconds is not None)
    more = f" Checks of general abilities come on top, which were not timed here yet: {first_of(untimed)}."
    if answers is None:
        text = "The time is not known before the first answers, whose log shows the time left."
        return None, text + more * bool(untimed)
    text = f"About {duration(answers + timed)}, by earlier answers of this project on this machine"
    if timed:
        text += f"; {duration(timed)} of them for checks of general abilities"
    return answers + timed, f"{text}.{more * bool(untimed)}"


def time_limit(
    runner: ArmRunner, minutes: float | None, contest: Contest | None = None, *, pilots: int = 0
) -> TimeLimit | None:
    """Return a command's time limit, if there is one; its decision is kept for the same command.

    The command chooses a prompt, and then compares an adapter (``contest``) or asks ``pilots`` new adapters on dev.
    """
    if minutes is None:
        return None
    advice = advice_file(runner)
    decides = {
        "advice": advice.name,
        "minutes": minutes,
        "contest": None if contest is None else [contest[0].digest if contest[0] else None, contest[1]],
        "tuned_retrieved": runner.settings.tuned_retrieved,
        "pilots": pilots,
    }
    file = runner.project.work / "budgets" / f"{digest(decides)[:16]}.json"
    if file.exists():  # of arms that are left out, no prompts are made
        return TimeLimit(minutes, file, runner.generator.rate, (), (), runner.reporter)
    choice = [] if advice.exists() else choice_works(runner)
    later = [Work(TUNED.name, len(runner.version.examples("dev")))] * pilots
    if contest is not None:
        later = contest_works(runner, contest)
    return TimeLimit(minutes, file, runner.generator.rate, choice, later, runner.reporter)


def choice_works(runner: ArmRunner) -> list[Work]:
    """Return the answers of the choice of a prompt: all entrants on the first items, the finalists on the rest."""
    settings, first = runner.settings, first_rows(runner)
    always = always_answered(runner.prompting_arms)
    entrants = [plan for plan in by_value(runner.prompting_arms) if runner.infeasible_reason(plan, first) is None]
    works = [replace(_work(runner, plan, first), optional=plan not in always) for plan in entrants]
    if any(plan.shots for plan in entrants):
        others = other_instructions(ZERO_SHOT, settings, runner.optimized)
        works += [Work("another instruction", len(first))] * len(others)
    # Of the draws of a static arm, one may become a finalist; zero-shot advances in any case.
    rivals = {plan.any_seed for plan in entrants if plan != ZERO_SHOT}
    advancing = min(len(rivals), settings.finalists) + (ZERO_SHOT in entrants)
    rest = len(runner.version.examples("dev")) - len(first)
    return works + [Work("a finalist", rest)] * advancing


def contest_works(runner: ArmRunner, contest: Contest) -> list[Work]:
    """Return the answers of an adapter's comparison, in the order of answering.

    While the best prompting arm or the adapter is unknown, or the test split closed, prompts may not be made, and no
    answer counts as kept.
    """
    adapter, split = contest
    rows = runner.version.examples(split)
    advice = known_advice(runner, advice_file(runner))
    if advice is None or adapter is None:
        plans = [ZERO_SHOT.name, "the best prompting arm"] if split == "test" else []
        plans += [
            TUNED.name,
            *([PARENT.name] if adapter is not None and parent_of(runner, adapter) is not None else []),
        ]
        optional = [TUNED_CONSTRAINED.name] if runner.settings.structured_outputs is not None else []
        if (optimized := tuned_optimized(runner.optimized)) is not None:
            optional.append(optimized.name)
        if runner.settings.tuned_retrieved and any(plan.kind == "retrieved" for plan in runner.prompting_arms):
            optional.append(TUNED_RETRIEVED)
        works = [Work(name, len(rows), optional=name in optional) for name in [*plans, *optional]]
    else:
        comparison = plan_comparison(runner, adapter, advice, split)
        if (comparison.folder / EVIDENCE_FILE).exists():
            return []
        logged = {opening.evaluation for opening in AccessLog(runner.folder).openings}
        opened = split == "dev" or comparison.identity in logged
        works = [
            replace(
                _work(runner, plan, rows, by) if opened else Work(plan.name, len(rows)),
                optional=plan.adapted and plan not in (TUNED, PARENT),
            )
            for plan, by in comparison.arms
            # On dev, the base's arms were answered while a prompt was chosen.
            if plan.adapted or split == "test"
        ]
    if split == "test":
        items = min(MOST_ITEMS, len({row.example.input_key for row in rows}))
        works.append(Work(NOISE, 2 * items))
    return works


def _work(runner: ArmRunner, plan: ArmPlan, rows: Sequence[Member], adapter: Adapter | None = None) -> Work:
    """Return the work of an arm's answers to these rows; equal prompts have one answer."""
    asked = {digest(prompt.ids) for prompt in runner.prompts(plan, rows)}
    kept = runner.generator.kept(runner.limit, adapter if plan.adapted else None, constrained=plan.constrained)
    return Work(plan.name, len(asked - kept), len(asked & kept))
