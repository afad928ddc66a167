"""The prompts of an evaluation's item, built again from the inputs that the evidence names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.chat import ChatFormat
from tunewright.chat.format import Tokens
from tunewright.chat.inspection import TokenView, view
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.data.versions import Member, load_version
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.arms import plan_of
from tunewright.evaluation.generations import Generator
from tunewright.evidence.schema import Arm, Evidence
from tunewright.models.bases import Base

_QUICK = (None, "bm25", "tfidf")
"""Ways to retrieve demonstrations that need no model."""


@dataclass(frozen=True)
class ArmPrompt:
    """The prompt of one arm, or the reason why it cannot be shown."""

    arm: str
    tokens: Sequence[TokenView] = ()
    demonstrations: Sequence[Member] = ()
    """In the prompt's order."""
    dropped: bool = False
    """Demonstrations were dropped because they did not fit the base's context."""
    answered: bool = False
    """The journal of answers has an answer to exactly these tokens: the model saw this prompt."""
    missing: str | None = None
    """The reason why there is no prompt."""


def item_prompts(
    project: ProjectFolder, evidence: Evidence, key: str, base: Base, chat: ChatFormat, reporter: Reporter
) -> list[ArmPrompt]:
    """Return the prompts of all arms for the item of this pair key.

    Raises:
        UserError: the evidence is cross-validated or from another base, template or dataset version; or no such item.
    """
    if evidence.design == "cross-fitted":
        raise UserError(
            "Prompts of a cross-validation cannot be shown: each fold has its own demonstrations", where=evidence.id
        )
    lineage = evidence.lineage
    recorded = {"base": lineage["base"]["digest"], "chat template": lineage["template_digest"]}
    for name, now in (("base", base.digest), ("chat template", chat.digest)):
        if recorded[name] != now:
            raise UserError(
                f"The {name} has changed since the evaluation", where=evidence.id, fix="Restore it in tunewright.yaml."
            )
    version = load_version(project.dataset, lineage["dataset"])
    member = next((m for m in version.examples(evidence.split) if m.key == key), None)
    if member is None:
        raise UserError(f"The evaluation has no item {key[:12]!r}", where=evidence.id)
    decoding = lineage["decoding"]
    generator = Generator.of(project, base, chat, decoding["quantization"], reporter)
    runner = ArmRunner(project, version, generator, reporter, limit=decoding["max_new_tokens"])
    adapters = {adapter.digest: adapter for adapter in list_adapters(project.adapters)}
    parent = lineage["adapter"]["lineage"].get("parent") or {"digest": ""}
    answering = {arm.name: lineage["adapter"] if arm.kind != "parent" else parent for arm in evidence.arms}
    return [_prompt(runner, evidence, a, member, adapters.get(answering[a.name]["digest"])) for a in evidence.arms]


def _prompt(runner: ArmRunner, evidence: Evidence, arm: Arm, member: Member, adapter: Adapter | None) -> ArmPrompt:
    plan = plan_of(arm)
    if reason := _why_missing(runner, evidence, arm):
        return ArmPrompt(arm.name, missing=reason)
    prompt, shown, dropped = runner.fitting_prompt(plan, member)
    answered = False
    if adapter is not None or not plan.adapted:
        answering = adapter if plan.adapted else None
        kept = runner.generator.kept(runner.limit, answering, constrained=plan.constrained)
        answered = digest(prompt) in kept
    tokens = view(runner.generator.chat, Tokens(prompt, (False,) * len(prompt)))
    return ArmPrompt(arm.name, tokens, shown, dropped, answered)


def _why_missing(runner: ArmRunner, evidence: Evidence, arm: Arm) -> str | None:
    if arm.kind == "incumbent":
        return "A hosted model: it got the row's messages, and its provider made the prompt."
    if arm.retriever not in _QUICK:
        return f"The retriever {arm.retriever} needs a model to find the demonstrations again."
    if arm.instruction and list(runner.settings.instructions) != evidence.lineage.get("instructions"):
        return "evaluate.instructions has changed since the evaluation."
    if arm.optimized is not None and arm.optimized != runner.optimized:
        return "The optimized instruction of the evaluation is no longer stored."
    return None
