"""The prompts of an evaluation's item, built again from the inputs that the evidence names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.chat import ChatFormat
from tunewright.chat.format import Tokens
from tunewright.chat.inspection import TokenView, view
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.data.versions import DatasetVersion, Member, load_version
from tunewright.endpoints.replies import ChatRequest
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.arms import TUNED_RETRIEVED, ArmPlan, plan_of, prompting_arms, tuned_retrieved
from tunewright.evaluation.embeddings import MissingVectorsError
from tunewright.evaluation.folds import fold_versions
from tunewright.evaluation.frozen_answers import frozen_request
from tunewright.evaluation.generations import Generator
from tunewright.evaluation.prompt_search import advice_file, first_rows, known_advice
from tunewright.evidence.schema import Arm, Evidence, Fold
from tunewright.models.bases import Base

_QUICK = (None, "bm25", "tfidf")
"""Ways to retrieve demonstrations that need no vectors."""


@dataclass(frozen=True)
class ArmPrompt:
    """The prompt of one arm, or the reason why it cannot be shown."""

    arm: str
    tokens: Sequence[TokenView] = ()
    request: ChatRequest | None = None
    """The conversation that a hosted model was sent; its provider made tokens of it."""
    demonstrations: Sequence[Member] = ()
    """In the prompt's order."""
    dropped: bool = False
    """Demonstrations were dropped because they did not fit the base's context."""
    answered: bool | None = False
    """The journal of answers has an answer to exactly these tokens or this request: the model saw this prompt.

    None: the journal is not here, so it proves nothing.
    """
    missing: str | None = None
    """The reason why there is no prompt."""
    own: str = ""
    """The arm that the item's fold chose in the place of ``arm``; empty: there is no fold, or all chose the same."""


class _CannotShowError(Exception):
    """The reason why an arm's prompt cannot be shown."""


@dataclass(frozen=True)
class _Item:
    """One item, with everything that its prompts are built from."""

    project: ProjectFolder
    evidence: Evidence
    member: Member
    runner: ArmRunner
    fold: Fold | None
    adapters: Mapping[str, Adapter]
    """By digest: the project's, or those of the folds."""
    reporter: Reporter


def item_prompts(
    project: ProjectFolder, evidence: Evidence, key: str, base: Base, chat: ChatFormat, reporter: Reporter
) -> list[ArmPrompt]:
    """Return the prompts of all arms for the item of this pair key. No model is loaded.

    Raises:
        UserError: another base, template or dataset version; or no such item.
    """
    lineage = evidence.lineage
    recorded = {"base": lineage["base"]["digest"], "chat template": lineage["template_digest"]}
    for name, now in (("base", base.digest), ("chat template", chat.digest)):
        if recorded[name] != now:
            raise UserError(
                f"The {name} has changed since the evaluation", where=evidence.id, fix="Restore it in tunewright.yaml."
            )
    version, fold = load_version(project.dataset, lineage["dataset"]), None
    if evidence.design == "cross-fitted":
        version, fold = _fold(evidence, version, key)
    member = next((m for m in version.examples(evidence.split) if m.key == key), None)
    if member is None:
        raise UserError(f"The evaluation has no item {key[:12]!r}", where=evidence.id)
    decoding = lineage["decoding"]
    generator = Generator.of(project, base, chat, decoding["quantization"], reporter)
    folder = None if fold is None else project.fold_adapters.parent
    limit = decoding["max_new_tokens"]
    runner = ArmRunner(project, version, generator, reporter, folder=folder, limit=limit)
    runner.embeddings.kept_only = True
    stored = list_adapters(project.adapters if fold is None else project.fold_adapters)
    adapters = {adapter.digest: adapter for adapter in stored}
    item = _Item(project, evidence, member, runner, fold, adapters, reporter)
    return [_prompt(item, arm) for arm in evidence.arms]


def _fold(evidence: Evidence, version: DatasetVersion, key: str) -> tuple[DatasetVersion, Fold | None]:
    """Return the fold's version that has this item among its test rows, and the fold.

    Raises:
        UserError: the folds cannot be made again, or no fold has the item.
    """
    versions = fold_versions(version, len(evidence.folds), evidence.lineage["config"]["seed"])
    if [each.digest for each in versions] != evidence.lineage["folds"]:
        raise UserError("The folds of this evaluation cannot be made again by this version", where=evidence.id)
    for each, fold in zip(versions, evidence.folds, strict=True):
        if any(member.key == key for member in each.examples("test")):
            return each, fold
    raise UserError(f"The evaluation has no item {key[:12]!r}", where=evidence.id)


def _prompt(item: _Item, arm: Arm) -> ArmPrompt:
    try:
        return _hosted(item, arm) if arm.kind == "incumbent" else _own(item, arm)
    except _CannotShowError as error:
        return ArmPrompt(arm.name, missing=str(error))


def _hosted(item: _Item, arm: Arm) -> ArmPrompt:
    compared = item.evidence.incumbents.compared if item.evidence.incumbents else ()
    found = next(each for each in compared if each.arm == arm.name)
    try:
        request, answered = frozen_request(item.project, item.project.root / found.file, item.member, item.reporter)
    except UserError as error:
        raise _CannotShowError(f"The request cannot be made again: {error.what}.") from None
    return ArmPrompt(arm.name, request=request, answered=answered)


def _own(item: _Item, arm: Arm) -> ArmPrompt:
    runner, plan = item.runner, _plan(item, arm)
    _require_unchanged(item, plan)
    try:
        if plan.retriever not in _QUICK:
            _prepare(item, plan)
        prompt, shown, dropped = runner.fitting_prompt(plan, item.member)
    except MissingVectorsError:
        raise _CannotShowError(
            f"The vectors of the retriever {plan.retriever} are no longer in .tunewright/embeddings, and finding the "
            "demonstrations again needs its model."
        ) from None
    adapter = item.adapters.get(_adapter_digest(item, arm)) if plan.adapted else None
    kept = frozenset[str]()
    if adapter is not None or not plan.adapted:
        kept = runner.generator.kept(runner.limit, adapter, constrained=plan.constrained)
    answered = digest(prompt) in kept if kept else None
    tokens = view(runner.generator.chat, Tokens(prompt, (False,) * len(prompt)))
    own = plan.name if arm.kind == "mixed" else ""
    return ArmPrompt(arm.name, tokens, None, shown, dropped, answered, own=own)


def _plan(item: _Item, arm: Arm) -> ArmPlan:
    """Return the arm's plan; of an arm that stands for several, the one of the item's fold."""
    if arm.kind != "mixed":
        return plan_of(arm)
    assert item.fold is not None
    if arm.name == TUNED_RETRIEVED:
        advice = known_advice(item.runner, advice_file(item.runner))
        if advice is None or advice.best_retrieved is None:
            raise _CannotShowError("The fold's choice of demonstrations is no longer in .tunewright.")
        return tuned_retrieved(plan_of(next(each for each in advice.arms if each.name == advice.best_retrieved)))
    name = item.fold.best_prompting
    plan = next((each for each in prompting_arms(item.runner.settings) if each.name == name), None)
    if plan is None:
        raise _CannotShowError(f"The fold chose {name}, which is no longer among the config's arms.")
    return plan


def _adapter_digest(item: _Item, arm: Arm) -> str:
    if item.fold is not None:
        return item.fold.adapter
    recorded = item.evidence.lineage["adapter"]
    if arm.kind != "parent":
        return str(recorded["digest"])
    return str((recorded["lineage"].get("parent") or {"digest": ""})["digest"])


def _prepare(item: _Item, plan: ArmPlan) -> None:
    """Read the vectors of the questions, which were computed for all of them together."""
    runner = item.runner
    if item.evidence.split == "dev":
        runner.demonstrations.prepare(plan, first_rows(runner))
    runner.demonstrations.prepare(plan, runner.version.examples(item.evidence.split))


def _require_unchanged(item: _Item, plan: ArmPlan) -> None:
    lineage, runner = item.evidence.lineage, item.runner
    recorded = lineage.get("instructions") if item.fold is None else lineage["config"]["evaluate"]["instructions"]
    if plan.instruction and list(runner.settings.instructions) != recorded:
        raise _CannotShowError("evaluate.instructions has changed since the evaluation.")
    if plan.optimized is not None and plan.optimized != runner.optimized:
        raise _CannotShowError("The optimized instruction of the evaluation is no longer stored.")
