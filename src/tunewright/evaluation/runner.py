"""The evaluation of an adapter, in one function: `evaluate` reads from top to bottom.

Rows, arms, answers, scores, contrasts, evidence: the verdict (`tunewright.evidence.verdict`) follows from the evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.registry import Adapter, list_adapters, require_compatible
from tunewright.config import Config, MetricName
from tunewright.config.project import ProjectFolder
from tunewright.core.io import digest, json_document
from tunewright.core.numbers import give_number
from tunewright.core.progress import Reporter
from tunewright.data.dedup.leakage import nearest_training
from tunewright.data.dedup.output_leakage import new_templates
from tunewright.data.versions import DatasetVersion, Member
from tunewright.data.versions.version import current_author
from tunewright.evaluation.access_log import ACCESS_LOG, AccessLog
from tunewright.evaluation.arm_runner import (
    MOST_ITEMS,
    ArmRunner,
    measured_arm,
    measured_with,
    noise_floor,
    scored_arms,
)
from tunewright.evaluation.arms import (
    PARENT,
    TUNED,
    TUNED_CONSTRAINED,
    TUNED_RETRIEVED,
    ZERO_SHOT,
    ArmPlan,
    plan_of,
    tuned_optimized,
    tuned_retrieved,
    untried_prompting,
)
from tunewright.evaluation.authors_split import measure_authors_split
from tunewright.evaluation.benchmarks.runner import measure_suites
from tunewright.evaluation.free_arms import answer_free, with_drops
from tunewright.evaluation.frozen_answers import Split
from tunewright.evaluation.generations import ArmAnswer
from tunewright.evaluation.incumbents import IncumbentArms, repriced
from tunewright.evidence.common import NoiseFloor, StoredPrompt, answer_form
from tunewright.evidence.files import (
    DEV_PREFIX,
    EVIDENCE_FILE,
    ITEMS_FILE,
    PROMPTS_FILE,
    PromptMessages,
    find_evaluation,
)
from tunewright.evidence.logged_access import Declared, EarlierAccess, LoggedAccess, openings_text
from tunewright.evidence.schema import Advice, Evidence, Item
from tunewright.evidence.scoring import (
    Distances,
    ScoredArms,
    count_references,
    declared_contrasts,
    measured_metrics,
    report_references,
    scores_by_distance,
    scores_by_template,
)
from tunewright.metrics import Scorer, check_references, references_of

if TYPE_CHECKING:
    from tunewright.evaluation.benchmarks.bench import OpenSuite


@dataclass(frozen=True)
class EvaluateResult:
    """The result of `evaluate` or `crossval`."""

    folder: Path
    evidence: Evidence
    evaluated: bool
    """False when evidence of the same inputs already existed."""


def evaluate(arm_runner: ArmRunner, comparison: Comparison, suites: Sequence[OpenSuite] = ()) -> EvaluateResult:
    """Compare an adapter with zero-shot, the best prompting arm and incumbents on held-out rows, as planned.

    The test split is opened: the planned comparison is in the access log before any of its prompts is made. On dev
    nothing is opened, and the evidence allows no release.
    """
    config, generator, version = arm_runner.project.config, arm_runner.generator, arm_runner.version
    adapter, advice, split, incumbents = comparison.adapter, comparison.advice, comparison.split, comparison.incumbents
    access_log = AccessLog(arm_runner.folder)
    if (comparison.folder / EVIDENCE_FILE).exists():
        return _measured_before(arm_runner, comparison, access_log, suites)

    # Rows. Everything that can fail beforehand does so before the test split is opened.
    rows = version.examples(split)
    arm_runner.warn_of_longer(split)
    opening, earlier = _open(arm_runner, comparison, rows, access_log) if split == "test" else (None, ())
    if opening is not None:
        comparison = replace(comparison, declared=opening.declared)  # an earlier version may have logged it
    report_references([row.example for row in rows], f"{split} item", arm_runner.reporter)

    # Free arms answer before any model; then all arms answer the same rows.
    by_free, free_scored, free_arms = answer_free(arm_runner, comparison.free, rows, split)
    answers, noise = _answers(arm_runner, comparison, rows)
    messages = PromptMessages()
    prompts: dict[str, Sequence[StoredPrompt | None]] = {
        plan.name: [prompt.stored(messages) for prompt in arm_runner.prompts(plan, rows)] for plan, _ in comparison.arms
    }
    prompts |= incumbents.prompts(messages)

    # Scores of each arm, then the contrasts that were declared; the first one decides.
    scored = incumbents.scored(scored_arms(arm_runner.scorers, rows, answers)) | free_scored
    answers |= by_free
    arms = {arm.name: arm for arm in [*incumbents.arms(scored), *free_arms]}
    for plan, _ in comparison.arms:
        arms[plan.name] = measured_arm(plan.name, plan, answers[plan.name], scored, config.seed)
    nearest, new = nearest_training(version, arm_runner.reporter, split), new_templates(version.members, (split,))
    distances, declared = Distances(nearest, new), comparison.declared
    outputs, longer = [row.example.output for row in version.domain], arm_runner.longer_than_limit(rows)
    common = common_fields(config, arm_runner.scorers, outputs, rows, answers, scored, declared, distances, longer)
    with_generated = (adapter.lineage.get("config") or {}).get("train", {}).get("generated", True)
    trained_on = [row for row in version.examples("train") if with_generated or not row.generated]

    # Evidence: the verdict depends on nothing else.
    evidence = Evidence(
        **common,
        id=comparison.folder.name,
        split=split,
        train_items=len(trained_on),
        generated_train_items=sum(row.generated for row in trained_on),
        dev_arms=advice.arms,
        narrowing=advice.narrowing,
        static=advice.static,
        left_out=advice.left_out,
        budget=arm_runner.budget,
        best_prompting=advice.best,
        arms=[arms[name] for name in comparison.names],
        engine=generator.used,
        prompt_optimization=arm_runner.optimization,
        noise_floor=noise,
        opening=opening,
        openings=earlier,
        authors_split=measure_authors_split(
            arm_runner.project.dataset, version, rows, scored, common["contrasts"][0], config.seed
        ),
        incumbents=incumbents.section(scored, adapter, arms[TUNED.name]),
        regressions=measure_suites(arm_runner, adapter, suites)[0] if suites else None,
        free=with_drops(advice.free, scored, config, prompting=advice.best, tuned=TUNED.name),
        lineage=_lineage(arm_runner, adapter),
    )
    save_evaluation(access_log, comparison.folder, evidence, rows, answers, scored, distances, prompts, messages)
    return EvaluateResult(comparison.folder, evidence, evaluated=True)


def _open(
    arm_runner: ArmRunner, comparison: Comparison, rows: Sequence[Member], access_log: AccessLog
) -> tuple[LoggedAccess, tuple[EarlierAccess, ...]]:
    """Have the incumbents answer dev, and open the test split; its references are checked then, those of dev before."""
    comparison.incumbents.try_dev()
    opened = open_test(
        access_log,
        arm_runner.project,
        arm_runner.version,
        rows,
        arm_runner.reporter,
        evaluation=comparison.identity,
        design="held-out",
        adapter=comparison.adapter.name,
        adapter_digest=comparison.adapter.digest,
        base=arm_runner.generator.base.digest,
        declared=comparison.declared,
    )
    check_references(arm_runner.scorers, [row.example for row in rows], "test", arm_runner.reporter)
    return opened


def _answers(
    arm_runner: ArmRunner, comparison: Comparison, rows: Sequence[Member]
) -> tuple[dict[str, list[ArmAnswer]], NoiseFloor | None]:
    """Return the answers of all arms but the free ones and, on test, the difference between two runs of one arm."""
    generator = arm_runner.generator
    hosted = comparison.incumbents.ask()
    repeated = 2 * min(MOST_ITEMS, len(rows)) if comparison.split == "test" else 0
    with generator.rate.together(len(comparison.arms) * len(rows) + repeated):
        answers = arm_runner.answer_arms(comparison.arms, rows, comparison.split)
        if not repeated:
            return answers | hosted, None
        asked = [answer.prompt for answer in answers[ZERO_SHOT.name]]
        seed = arm_runner.project.config.seed
        noise = noise_floor(generator, rows, asked, arm_runner.limit, arm_runner.scorers[0], seed)
    return answers | hosted, noise


# The plan


@dataclass(frozen=True)
class Comparison:
    """A planned evaluation: everything that decides it, before any answer exists."""

    adapter: Adapter
    advice: Advice
    split: Split
    arms: Sequence[tuple[ArmPlan, Adapter]]
    """Each arm with the adapter that answers it, if it is an adapted arm."""
    declared: tuple[Declared, ...]
    incumbents: IncumbentArms
    identity: str
    folder: Path
    """The folder of its evidence."""

    @property
    def free(self) -> list[str]:
        """The free arms, if the best one is declared; the log of an earlier version declares none."""
        free, treatments = self.advice.free, {each.treatment for each in self.declared}
        return [arm.name for arm in free.dev] if free and free.best in treatments else []

    @property
    def names(self) -> list[str]:
        """All compared arms in the evidence's order: base and adapter, incumbents, free arms."""
        return [*(plan.name for plan, _ in self.arms), *(model.arm for model in self.incumbents.models), *self.free]


def plan_comparison(arm_runner: ArmRunner, adapter: Adapter, advice: Advice, split: Split) -> Comparison:
    """Return the arms to compare and the contrasts to declare. Nothing is opened or answered."""
    settings, metric = arm_runner.settings, arm_runner.scorers[0].name
    budget, parent = arm_runner.budget, parent_of(arm_runner, adapter)
    plans = contest(arm_runner, advice, parent=parent is not None, constrained=settings.structured_outputs is not None)
    incumbents = IncumbentArms(arm_runner, split)
    decides = arm_runner.inputs | {
        "adapter": adapter.digest,
        "arms": [plan.name for plan in plans],
        "instructions": settings.instructions,
        "margin": settings.margin,
        **({"left_out": sorted(budget.left_out)} if budget else {}),
        **({"optimized": arm_runner.optimization.id} if arm_runner.optimization else {}),
        **({"parent": parent.digest} if parent else {}),
        **incumbents.inputs,
    }
    identity = digest(decides)[:12]
    declared = declare(
        arm_runner.project.config,
        metric,
        advice.best,
        [plan.name for plan in plans],
        free=advice.free.best if advice.free else None,
        incumbents=[model.arm for model in incumbents.models],
    )
    return Comparison(
        adapter=adapter,
        advice=advice,
        split=split,
        arms=[(plan, parent if parent and plan.kind == PARENT.kind else adapter) for plan in plans],
        declared=declared,
        incumbents=incumbents,
        identity=identity,
        folder=arm_runner.folder / (identity if split == "test" else f"{DEV_PREFIX}{identity}"),
    )


def contest(arm_runner: ArmRunner, advice: Advice, *, parent: bool = False, constrained: bool = False) -> list[ArmPlan]:
    """Return the arms compared on held-out items: zero-shot, the best on dev, tuned, and tuned with demonstrations.

    With ``parent``, the adapter that tuned started from is added; then tuned with the optimized instruction, if there
    is one, and ``constrained`` by the grammar. A time limit may have left out the arms after it.
    """
    left_out = arm_runner.budget.left_out if arm_runner.budget else ()
    every = [*advice.arms, *(advice.narrowing.arms if advice.narrowing else [])]
    known = {arm.name: plan_of(arm) for arm in every}
    plans = [ZERO_SHOT, known[advice.best], TUNED, *([PARENT] if parent else [])]
    retrieved = advice.best_retrieved if arm_runner.settings.tuned_retrieved else None
    if retrieved is not None and TUNED_RETRIEVED not in left_out:
        plans.append(tuned_retrieved(known[retrieved]))
    more = [tuned_optimized(arm_runner.optimized), TUNED_CONSTRAINED if constrained else None]
    plans += [plan for plan in more if plan is not None and plan.name not in left_out]
    return list(dict.fromkeys(plans))


def declare(
    config: Config,
    metric: MetricName,
    best: str,
    names: Sequence[str],
    *,
    free: str | None = None,
    incumbents: Sequence[str] = (),
) -> tuple[Declared, ...]:
    """Declare the contrasts to measure by the deciding metric, between arms of these ``names``.

    Tuned against the ``best`` prompting arm decides; then tuned against zero-shot and the adapter that it started from,
    and other prompts of the same adapter against tuned. The best ``free`` arm and ``incumbents`` are apart.
    """
    settings, tuned = config.evaluate, TUNED.name
    controls = dict.fromkeys([best, ZERO_SHOT.name, *(name for name in names if name == PARENT.name)])
    known = {*controls, tuned, TUNED_CONSTRAINED.name}
    pairs = [(tuned, control) for control in controls] + [(name, tuned) for name in names if name not in known]
    found: list[tuple[str, str, float | None, float | None]]
    found = [(*pair, None if number else settings.margin, None) for number, pair in enumerate(pairs)]
    # Only the best free arm on dev: each further one would be another chance for luck.
    found += [(free, control, None, settings.margin) for control in (tuned, best) if free]
    found += [(tuned, arm, None, settings.non_inferiority_margin) for arm in incumbents]
    return tuple(
        Declared(treatment=treatment, control=control, metric=metric, margin=margin, non_inferiority_margin=apart)
        for treatment, control, margin, apart in found
    )


def parent_of(arm_runner: ArmRunner, adapter: Adapter) -> Adapter | None:
    """Return the adapter that another adapter started from; None if there is none or, with a warning, it is gone."""
    named = adapter.lineage.get("parent")
    if named is None:
        return None
    found = next((a for a in list_adapters(arm_runner.project.adapters) if a.digest == named["digest"]), None)
    if found is None:
        arm_runner.warn_once(
            f"{adapter.name} started from {named['name']}, which is not here: the two are not compared."
        )
        return None
    require_compatible(found, arm_runner.generator.base, arm_runner.generator.chat)
    return found


# The log and the files


def open_test(
    access_log: AccessLog,
    project: ProjectFolder,
    version: DatasetVersion,
    rows: Sequence[Member],
    reporter: Reporter,
    **facts: Any,
) -> tuple[LoggedAccess, tuple[EarlierAccess, ...]]:
    """Log the planned comparison on these rows, and report it with the earlier openings of the same rows.

    ``facts`` are further fields of `LoggedAccess`.
    """
    facts |= {"dataset": version.digest, "test_split": version.split_digest("test"), "items": len(rows)}
    opening = access_log.open(author=current_author(project.root), **facts)
    earlier = access_log.earlier(opening, project.dataset, {row.key for row in rows})
    first = opening.declared[0]
    assert first.margin is not None
    reporter.say(
        f"The test split is opened (line {opening.number} of {ACCESS_LOG}). Declared: {first.treatment} "
        f"against {first.control} by {first.metric}, margin {100 * first.margin:g} points"
        + "".join(f"; {other.treatment} against {other.control}" for other in opening.declared[1:])
    )
    if earlier:
        reporter.warn(openings_text(earlier, opening.items))
    return opening, earlier


def _measured_before(
    arm_runner: ArmRunner, comparison: Comparison, access_log: AccessLog, suites: Sequence[OpenSuite]
) -> EvaluateResult:
    """Return existing evidence, with the config's current prices and suites, which change no other measurement."""
    folder = comparison.folder
    give_number(folder.parent, folder.name)  # a command that was killed after it wrote the evidence gave none
    newest = find_evaluation(folder.parent)
    if newest != folder:
        arm_runner.reporter.warn(
            f"Measured before: evaluation {folder.name}. {newest.name} is newer, and `tunewright verdict` and "
            f"`tunewright report` take that one unless they are given {folder.name}."
        )
    evidence, measured = access_log.load(folder), False
    sections: dict[str, Any] = {}
    if (incumbents := repriced(arm_runner.project.config, evidence)) is not None:
        sections["incumbents"] = incumbents
        arm_runner.reporter.say("The costs in the evidence are computed again from the config's prices.")
    if suites:
        benchmarks, measured = measure_suites(arm_runner, comparison.adapter, suites)
        if evidence.regressions != benchmarks:
            sections["regressions"] = benchmarks
    if sections:
        evidence = access_log.amend(folder, **sections)
    return EvaluateResult(folder, evidence, evaluated=measured)


def common_fields(
    config: Config,
    scorers: Sequence[Scorer],
    outputs: Sequence[str],
    rows: Sequence[Member],
    answers: Mapping[str, Sequence[ArmAnswer]],
    scored: ScoredArms,
    declared: Sequence[Declared],
    distances: Distances,
    longer: int,
) -> dict[str, Any]:
    """Return the evidence's fields that follow from answers and scores in the same way for every design.

    ``outputs`` are those of all domain rows; ``longer`` is the number of references over the answer limit.
    """
    examples, new = [row.example for row in rows], distances.new_template
    references = count_references(examples)
    # Contrasts with incumbents and free arms are separate decisions, which Holm's method does not adjust.
    pairs = [(each.treatment, each.control) for each in declared if each.non_inferiority_margin is None]
    contrasts = declared_contrasts(scored, pairs, config.seed)
    nearest = [distances.nearest[row.key] for row in rows]
    return {
        "project": config.name,
        "metric": scorers[0].name,
        "metrics": measured_metrics(scorers, several=references is not None),
        "references": references,
        "margin": config.evaluate.margin,
        "untried": untried_prompting(config.evaluate),
        "items": len(rows),
        "clusters": len({row.cluster for row in rows}),
        "contrasts": contrasts,
        "train_similarity": scores_by_distance(scored, nearest, contrasts[0], config.seed),
        "output_templates": None
        if new is None
        else scores_by_template(scored, [new[row.key] for row in rows], contrasts[0], config.seed),
        "form": answer_form(
            outputs,
            [example.output for example in examples],
            {name: [answer.text for answer in given] for name, given in answers.items()},
            longer,
        ),
    }


def _lineage(arm_runner: ArmRunner, adapter: Adapter) -> dict[str, Any]:
    """Return the digests and versions of everything that an evaluation measured."""
    config, generator, version = arm_runner.project.config, arm_runner.generator, arm_runner.version
    return {
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
    }


def save_evaluation(
    access_log: AccessLog,
    folder: Path,
    evidence: Evidence,
    members: Sequence[Member],
    answers: Mapping[str, Sequence[ArmAnswer]],
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
    access_log.add(folder, files)
