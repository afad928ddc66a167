"""The contrast on the test split: zero-shot, the best prompting arm and the adapter, on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tunewright.adapters.compatibility import require_compatible
from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.config import Config, MetricName
from tunewright.core.io import digest, json_document
from tunewright.core.progress import Reporter
from tunewright.data.dedup.leakage import nearest_training
from tunewright.data.dedup.output_leakage import new_templates
from tunewright.data.versions import Member
from tunewright.data.versions.version import current_author
from tunewright.evaluation.access_log import ACCESS_LOG, AccessLog
from tunewright.evaluation.answer_journal import Answer
from tunewright.evaluation.arm_runner import ArmRunner, measured_arm, measured_with, scored_arms
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
from tunewright.evaluation.incumbent_costs import repriced
from tunewright.evaluation.incumbents import IncumbentArms, declared_incumbents, incumbent_inputs
from tunewright.evaluation.repeats import noise_floor
from tunewright.evaluation.train_similarity import Distances, scores_by_distance, scores_by_template
from tunewright.evidence.answer_format import answer_form
from tunewright.evidence.common import Budget
from tunewright.evidence.logged_access import Declared, EarlierAccess, LoggedAccess, openings_text
from tunewright.evidence.prompts import PROMPTS_FILE, PromptMessages, StoredPrompt
from tunewright.evidence.schema import (
    DEV_PREFIX,
    EVIDENCE_FILE,
    ITEMS_FILE,
    Advice,
    Arm,
    Contrast,
    Evidence,
    Item,
    find_evaluation,
)
from tunewright.evidence.scoring import (
    ScoredArms,
    count_references,
    declared_contrasts,
    measured_metrics,
    report_references,
)
from tunewright.metrics import check_references, references_of


@dataclass(frozen=True)
class EvaluateResult:
    """The result of `evaluate` or `crossval`."""

    folder: Path
    evidence: Evidence
    evaluated: bool
    """False when evidence of the same inputs already existed."""


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
    known = {arm.name: plan_of(arm) for arm in _all_arms(advice)}
    plans = [ZERO_SHOT, known[advice.best], TUNED, *([PARENT] if parent else [])]
    if with_retrieved and advice.best_retrieved is not None:
        plans.append(tuned_retrieved(known[advice.best_retrieved]))
    if (plan := tuned_optimized(optimized)) is not None and plan.name not in left_out:
        plans.append(plan)
    if held:
        plans.append(TUNED_CONSTRAINED)
    return list(dict.fromkeys(plans))


def _all_arms(advice: Advice) -> list[Arm]:
    return [*advice.arms, *(advice.narrowing.arms if advice.narrowing else [])]


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


def measured_contrasts(scored: ScoredArms, declared: Sequence[Declared], seed: int) -> list[Contrast]:
    """Measure exactly the declared contrasts by the deciding metric, then the same by the extra metrics.

    Those with incumbents are decisions of their own, so they do not count among the contrasts that Holm's method
    adjusts.
    """
    pairs = [(each.treatment, each.control) for each in declared if each.non_inferiority_margin is None]
    return declared_contrasts(scored, pairs, seed)


def report_opening(opening: LoggedAccess, earlier: Sequence[EarlierAccess], reporter: Reporter) -> None:
    """Report the purpose of opening the test split, and the number of earlier openings."""
    first = opening.declared[0]
    assert first.margin is not None
    reporter.say(
        f"The test split is opened (line {opening.number} of {ACCESS_LOG}). Declared: {first.treatment} "
        f"against {first.control} by {first.metric}, margin {100 * first.margin:g} points"
        + "".join(f"; {other.treatment} against {other.control}" for other in opening.declared[1:])
    )
    if earlier:
        reporter.warn(openings_text(earlier, opening.items))


@dataclass(frozen=True)
class _EvaluationInputs:
    """Everything that decides an evaluation, before any answer exists."""

    plans: list[ArmPlan]
    declared: tuple[Declared, ...]
    identity: str
    parent: Adapter | None = None
    """The adapter that the evaluated one started from, if it is here."""

    def adapter_of(self, plan: ArmPlan, adapter: Adapter) -> Adapter:
        """Return the adapter that answers an adapted arm of ``adapter``'s evaluation."""
        if plan.kind != PARENT.kind:
            return adapter
        assert self.parent is not None, "it is a plan only where it is here"
        return self.parent


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


def _settle(
    arm_runner: ArmRunner, adapter: Adapter, advice: Advice, split: Literal["test", "dev"]
) -> _EvaluationInputs:
    settings, config = arm_runner.settings, arm_runner.project.config
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
    inputs = arm_runner.inputs(arm_runner.limit) | {
        "adapter": adapter.digest,
        "arms": [plan.name for plan in plans],
        "instructions": settings.instructions,
        "margin": settings.margin,
        **({"left_out": sorted(budget.left_out)} if budget else {}),
        **({"optimized": arm_runner.optimization.id} if arm_runner.optimization else {}),
        **({"parent": parent.digest} if parent else {}),
        **incumbent_inputs(arm_runner, split),
    }
    metric = arm_runner.scorers[0].name
    declared = declare(config, metric, advice.best, with_retrieved, parent=parent is not None, optimized=optimized)
    declared += declared_incumbents(arm_runner, metric)
    return _EvaluationInputs(plans, declared, digest(inputs)[:12], parent)


def evaluation_work(
    arm_runner: ArmRunner, adapter: Adapter, advice: Advice, split: Literal["test", "dev"]
) -> list[Work] | None:
    """Return the answers of an adapter's evaluation: an empty list if its evidence exists.

    None while the test split is closed, so that its prompts may not be made. Nothing is opened here.

    Raises:
        UserError: the access log is damaged.
    """
    settled = _settle(arm_runner, adapter, advice, split)
    if (_folder(arm_runner, settled, split) / EVIDENCE_FILE).exists():
        return []
    if split == "test" and all(o.evaluation != settled.identity for o in AccessLog(arm_runner.folder).openings):
        return None
    return _work(arm_runner, adapter, settled, split)


def _work(
    arm_runner: ArmRunner, adapter: Adapter, settled: _EvaluationInputs, split: Literal["test", "dev"]
) -> list[Work]:
    # On dev, the base's arms were answered while a prompt was chosen.
    plans = [plan for plan in settled.plans if plan.adapted or split == "test"]
    members = arm_runner.version.examples(split)
    return [
        replace(
            arm_runner.work(plan, members, split, settled.adapter_of(plan, adapter)),
            optional=plan.adapted and plan not in (TUNED, PARENT),
        )
        for plan in plans
    ]


def _folder(arm_runner: ArmRunner, settled: _EvaluationInputs, split: Literal["test", "dev"]) -> Path:
    return arm_runner.folder / (settled.identity if split == "test" else f"{DEV_PREFIX}{settled.identity}")


def _tell_of_newer(folder: Path, reporter: Reporter) -> None:
    """Report that other commands take newer evidence than this, unless given an ID."""
    newest = find_evaluation(folder.parent)
    if newest != folder:
        reporter.warn(
            f"Measured before: evaluation {folder.name}. {newest.name} is newer, and `tunewright verdict` and "
            f"`tunewright report` take that one unless they are given {folder.name}."
        )


def evaluate(arm_runner: ArmRunner, adapter: Adapter, advice: Advice) -> EvaluateResult:
    """Open the test split: answer it zero-shot, with the best prompting arm and with the adapter, and compare.

    The planned comparison is in the access log before any of its prompts is made.

    Raises:
        UserError: the access log is damaged.
    """
    config, version = arm_runner.project.config, arm_runner.version
    settled = _settle(arm_runner, adapter, advice, "test")
    access_log = AccessLog(arm_runner.folder)
    folder = _folder(arm_runner, settled, "test")
    if (folder / EVIDENCE_FILE).exists():
        return _measured_before(arm_runner, access_log, folder)
    incumbents = IncumbentArms(arm_runner, "test")
    incumbents.try_dev()
    test = version.examples("test")
    arm_runner.warn_of_longer("test")
    opening = access_log.open(
        author=current_author(arm_runner.project.root),
        evaluation=settled.identity,
        design="held-out",
        dataset=version.digest,
        test_split=version.split_digest("test"),
        items=len(test),
        adapter=adapter.name,
        adapter_digest=adapter.digest,
        base=arm_runner.generator.base.digest,
        declared=settled.declared,
    )
    earlier = access_log.earlier(opening, arm_runner.project.dataset, {m.key for m in test})
    report_opening(opening, earlier, arm_runner.reporter)
    report_references([m.example for m in test], "test item", arm_runner.reporter)
    check_references(arm_runner.scorers, [m.example for m in test], "test", arm_runner.reporter)
    hosted = incumbents.ask()
    arm_runner.generator.countdown.plan("contest", _work(arm_runner, adapter, settled, "test"))
    with arm_runner.generator.countdown.shown():
        arm_runner.answer_together([(plan, settled.adapter_of(plan, adapter)) for plan in settled.plans], test, "test")
        answers = {
            plan.name: arm_runner.answers(plan, test, "test", settled.adapter_of(plan, adapter))
            for plan in settled.plans
        }
        asked = [answer.prompt for answer in answers[ZERO_SHOT.name]]
        noise = noise_floor(arm_runner.generator, test, asked, arm_runner.limit, arm_runner.scorers[0], config.seed)
    answers |= hosted
    scored = incumbents.scored(scored_arms(arm_runner.scorers, test, answers))
    settled = replace(settled, declared=opening.declared)
    evidence = _evidence(arm_runner, adapter, advice, settled, answers, scored, "test")
    evidence = _with_incumbents(evidence, incumbents, scored, adapter)
    evidence, distances = _by_distance(arm_runner, evidence, scored, "test")
    evidence = evidence.model_copy(update={"noise_floor": noise, "opening": opening, "openings": earlier})
    messages = PromptMessages()
    prompts = _prompts(arm_runner, settled, test, messages) | incumbents.prompts(messages)
    save_evaluation(folder, evidence, test, answers, scored, distances, prompts, messages)
    return EvaluateResult(folder, evidence, evaluated=True)


def evaluate_on_dev(arm_runner: ArmRunner, adapter: Adapter, advice: Advice) -> EvaluateResult:
    """Compare the same arms on the dev split; the test split stays closed, and the evidence allows no release."""
    settled = _settle(arm_runner, adapter, advice, "dev")
    access_log = AccessLog(arm_runner.folder)
    folder = _folder(arm_runner, settled, "dev")
    if (folder / EVIDENCE_FILE).exists():
        return _measured_before(arm_runner, access_log, folder)
    dev = arm_runner.version.examples("dev")
    arm_runner.warn_of_longer("dev")
    report_references([m.example for m in dev], "dev item", arm_runner.reporter)
    incumbents = IncumbentArms(arm_runner, "dev")
    hosted = incumbents.ask()
    arm_runner.generator.countdown.plan("contest", _work(arm_runner, adapter, settled, "dev"))
    with arm_runner.generator.countdown.shown():
        arm_runner.answer_together([(plan, settled.adapter_of(plan, adapter)) for plan in settled.plans], dev, "dev")
        answers = {
            plan.name: arm_runner.answers(plan, dev, "dev", settled.adapter_of(plan, adapter)) for plan in settled.plans
        }
    answers |= hosted
    scored = incumbents.scored(scored_arms(arm_runner.scorers, dev, answers))
    evidence = _evidence(arm_runner, adapter, advice, settled, answers, scored, "dev")
    evidence = _with_incumbents(evidence, incumbents, scored, adapter)
    evidence, distances = _by_distance(arm_runner, evidence, scored, "dev")
    messages = PromptMessages()
    prompts = _prompts(arm_runner, settled, dev, messages) | incumbents.prompts(messages)
    save_evaluation(folder, evidence, dev, answers, scored, distances, prompts, messages)
    return EvaluateResult(folder, evidence, evaluated=True)


def _measured_before(arm_runner: ArmRunner, access_log: AccessLog, folder: Path) -> EvaluateResult:
    """Return existing evidence; costs follow the config's prices, which decide nothing that was measured."""
    _tell_of_newer(folder, arm_runner.reporter)
    evidence = access_log.load(folder)
    section = repriced(arm_runner.project.config, evidence)
    if section is not None:
        evidence = access_log.amend(folder, incumbents=section)
        arm_runner.reporter.say("The costs in the evidence are computed again from the config's prices.")
    return EvaluateResult(folder, evidence, evaluated=False)


def _with_incumbents(evidence: Evidence, incumbents: IncumbentArms, scored: ScoredArms, adapter: Adapter) -> Evidence:
    """Return the evidence with the incumbents' arms and their comparison."""
    arms = [*evidence.arms, *incumbents.arms(scored)]
    section = incumbents.section(scored, adapter, evidence.arm(TUNED.name))
    return evidence.model_copy(update={"arms": arms, "incumbents": section})


def _by_distance(
    arm_runner: ArmRunner, evidence: Evidence, scored: ScoredArms, split: Literal["test", "dev"]
) -> tuple[Evidence, Distances]:
    """Return the evidence with its scores by distance from the training rows, and each item's distance."""
    version, seed, deciding = arm_runner.version, arm_runner.project.config.seed, evidence.contrasts[0]
    keys = [m.key for m in version.examples(split)]
    nearest = nearest_training(version, arm_runner.reporter, split)
    new = new_templates(version.members, (split,))
    templates = None if new is None else scores_by_template(scored, [new[key] for key in keys], deciding, seed)
    train_similarity = scores_by_distance(scored, [nearest[key] for key in keys], deciding, seed)
    measured = evidence.model_copy(update={"train_similarity": train_similarity, "output_templates": templates})
    return measured, Distances(nearest, new)


def _evidence(
    arm_runner: ArmRunner,
    adapter: Adapter,
    advice: Advice,
    settled: _EvaluationInputs,
    answers: Mapping[str, Sequence[Answer]],
    scored: ScoredArms,
    split: Literal["test", "dev"],
) -> Evidence:
    config, generator, version = arm_runner.project.config, arm_runner.generator, arm_runner.version
    members = version.examples(split)
    references = count_references([m.example for m in members])
    with_generated = (adapter.lineage.get("config") or {}).get("train", {}).get("generated", True)
    return Evidence(
        id=_folder(arm_runner, settled, split).name,
        project=config.name,
        metric=arm_runner.scorers[0].name,
        metrics=measured_metrics(arm_runner.scorers, several=references is not None),
        references=references,
        margin=config.evaluate.margin,
        split=split,
        items=len(members),
        clusters=len({m.cluster for m in members}),
        train_items=sum(with_generated or not m.generated for m in version.examples("train")),
        generated_train_items=sum(with_generated and m.generated for m in version.examples("train")),
        dev_arms=advice.arms,
        narrowing=advice.narrowing,
        static=advice.static,
        left_out=advice.left_out,
        budget=arm_runner.budget,
        best_prompting=advice.best,
        arms=[measured_arm(plan.name, plan, answers[plan.name], scored, config.seed) for plan in settled.plans],
        contrasts=measured_contrasts(scored, settled.declared, config.seed),
        engine=generator.used,
        prompt_optimization=arm_runner.optimization,
        form=answer_form(
            [m.example.output for m in version.domain],
            [m.example.output for m in members],
            {name: [a.text for a in given] for name, given in answers.items()},
            arm_runner.longer_than_limit(members),
        ),
        lineage={
            **measured_with(config, generator.base, generator.chat, generator.quantization, arm_runner.limit),
            **({"grammar": digest(generator.grammar.rule)} if generator.grammar else {}),
            "adapter": {
                "name": adapter.name,
                "digest": adapter.digest,
                "lineage": adapter.lineage,
                **({"imported": adapter.imported} if adapter.imported else {}),
            },
            "dataset": version.digest,
            "test_split": version.split_digest("test"),
            "dev_split": version.split_digest("dev"),
            "instructions": list(config.evaluate.instructions),
        },
    )


def _prompts(
    arm_runner: ArmRunner, settled: _EvaluationInputs, members: Sequence[Member], messages: PromptMessages
) -> dict[str, Sequence[StoredPrompt | None]]:
    """Return the prompts that the arms have answered, for the items."""
    return {
        plan.name: [prompt.stored(messages) for prompt in arm_runner.prompts(plan, members)] for plan in settled.plans
    }


def save_evaluation(
    folder: Path,
    evidence: Evidence,
    members: Sequence[Member],
    answers: Mapping[str, Sequence[Answer]],
    scored: ScoredArms,
    distances: Distances,
    prompts: Mapping[str, Sequence[StoredPrompt | None]],
    messages: PromptMessages,
    fold_of: Mapping[str, int] | None = None,
) -> None:
    """Write evidence, items and prompts atomically, with a line in the access log that binds them.

    ``distances`` holds each item's similarity to the training rows, if measured; ``prompts`` each arm's prompts in the
    members' order, of these ``messages``; ``fold_of`` maps pair keys to folds.
    """
    references = references_of([m.example for m in members])
    items = [
        Item(
            key=m.key,
            cluster=m.cluster,
            input=m.example.input_text,
            reference=m.example.output,
            other_references=references[i][1:] or None,
            answers={name: given[i].text for name, given in answers.items()},
            scores=scored.of_item(i),
            unscored=scored.why_not(i),
            nearest=distances.nearest.get(m.key),
            new_template=None if distances.new_template is None else distances.new_template[m.key],
            fold=None if fold_of is None else fold_of[m.key],
            prompts={name: prompt for name, built in prompts.items() if (prompt := built[i]) is not None},
        )
        for i, m in enumerate(members)
    ]
    files = {
        ITEMS_FILE: "".join(item.model_dump_json(exclude_none=True) + "\n" for item in items),
        PROMPTS_FILE: messages.text,
        EVIDENCE_FILE: json_document(evidence.model_dump(mode="json")),
    }
    AccessLog(folder.parent).add(folder, files)
