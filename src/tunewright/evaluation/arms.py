"""Arms: the ways of answering that are compared with each other."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunewright.config import DemonstrationOrder, EvaluateConfig, RetrieverName
from tunewright.core.errors import UserError
from tunewright.core.io import json_document
from tunewright.core.log import parse_line
from tunewright.core.progress import Reporter
from tunewright.core.text import common_prefix, count_of
from tunewright.data.examples import Message
from tunewright.data.versions import Member
from tunewright.evaluation.access_log import AccessLog
from tunewright.evidence.prompt_optimization import OptimizedPrompt
from tunewright.evidence.schema import Arm, ArmKind

_KEY = "evaluate.instructions"
_ENDS = (re.compile(r"(?s).*\n\s*"), re.compile(r"(?s).*[:.?!]\s+"))


@dataclass(frozen=True)
class Instruction:
    """The instruction that all pairs share, and its place in a conversation."""

    place: Literal["system", "beginning", "none"]
    text: str
    """Text of the instruction, with the white space that separates it from the rest."""

    def replaced(self, messages: Sequence[Message], other: str) -> tuple[Message, ...]:
        """Return the conversation with ``other`` replacing the instruction in every user turn that begins with it."""
        if self.place == "none":
            declared = [m for m in messages if m.role == "tools"]  # always the first message
            return (*declared, Message("system", other), *messages[len(declared) :])
        if self.place == "system":
            return tuple(replace(m, content=other) if m.role == "system" else m for m in messages)
        white = self.text[len(self.text.rstrip()) :]
        new = other.rstrip() + white
        return tuple(
            replace(m, content=new + m.content.removeprefix(self.text))
            if m.role == "user" and m.content.startswith(self.text)
            else m
            for m in messages
        )


def find_instruction(members: Sequence[Member]) -> Instruction:
    """Return the instruction of these pairs."""
    systems = Counter(tuple(m.content for m in member.example.prompt if m.role == "system") for member in members)
    if len(systems) > 1:
        (usual, count), *_ = systems.most_common(1)
        odd = next(m for m in members if tuple(t.content for t in m.example.prompt if t.role == "system") != usual)
        raise UserError(
            f"The pairs have {len(systems)} different system turns ({count:,} of {len(members):,} pairs share one; row "
            f"{odd.key[:12]} does not): one instruction in their place would lose what they say about each pair",
            where=_KEY,
            fix="Remove evaluate.instructions, or give all pairs the same system turn.",
        )
    (turns,) = systems
    if len(turns) > 1:
        raise UserError(
            f"The pairs have {len(turns)} system turns each, so it is unknown which is the instruction", where=_KEY
        )
    if turns:
        return Instruction("system", turns[0])
    texts = [next(m.content for m in member.example.prompt if m.role == "user") for member in members]
    # A prefix shared by the first and the last in sorted order is shared by all.
    common = texts[0][: common_prefix(min(texts), max(texts))]
    beginning = next((found[0] for end in _ENDS if (found := end.match(common))), "")
    if len(texts) > 1 and len(beginning.split()) >= 2 and all(len(text) > len(beginning) for text in texts):
        return Instruction("beginning", beginning)
    return Instruction("none", "")


@dataclass(frozen=True)
class ArmPlan:
    """One way of answering.

    Args:
        kind: ``mixed`` is a placeholder where each fold answered in its own way.
        shots: number of demonstrations in the prompt.
        seed: number of the draw of static demonstrations, from 1.
        retriever: the retriever of each question's demonstrations.
        mmr: the weight of similarity against diversity among them (None: similarity alone).
        order: their order.
        instruction: 0 for the pairs' own, else the number of one in evaluate.instructions, from 1.
        optimized: digest of the optimized instruction in place of the pairs' own (None: not used).
        constrained: whether evaluate.structured_outputs constrains decoding.
    """

    kind: ArmKind
    shots: int = 0
    seed: int | None = None
    retriever: RetrieverName | None = None
    mmr: float | None = None
    order: DemonstrationOrder = "similar_last"
    instruction: int = 0
    optimized: str | None = None
    constrained: bool = False

    @property
    def name(self) -> str:
        """The arm's name, such as zero-shot, static-8-seed-2, retrieved-4-tfidf, zero-shot-instruction-1 or tuned."""
        parts: list[str] = ["tuned+retrieved" if self.kind == "tuned-retrieved" else self.kind]
        if self.shots:
            parts.append(str(self.shots))
        if self.seed is not None:
            parts.append(f"seed-{self.seed}")
        if self.retriever is not None and self.retriever != "bm25":
            parts.append(self.retriever)
        if self.mmr is not None:
            parts.append(f"mmr-{self.mmr:g}")
        if self.order == "similar_first":
            parts.append("similar-first")
        if self.instruction:
            parts.append(f"instruction-{self.instruction}")
        if self.optimized is not None:
            parts.append("optimized")
        return "-".join(parts) + ("+constrained" if self.constrained else "")

    @property
    def adapted(self) -> bool:
        """True if an adapter answers rather than the base alone."""
        return self.kind in {"tuned", "tuned-retrieved", "parent"}

    @property
    def any_seed(self) -> ArmPlan:
        """The same arm regardless of its draw of demonstrations."""
        return replace(self, seed=None)


ZERO_SHOT = ArmPlan("zero-shot")
TUNED = ArmPlan("tuned")
PARENT = ArmPlan("parent")
"""The adapter that the tuned one started from."""
TUNED_CONSTRAINED = ArmPlan("tuned", constrained=True)
BEST_PROMPTING = "best-prompting"
"""In a cross-validation, each fold's own best prompting arm, where these differ."""
TUNED_RETRIEVED = "tuned+retrieved"
"""The adapter with the best retrieved demonstrations, before these are known or where they differ between folds."""


def plan_of(arm: Arm) -> ArmPlan:
    """Return the measured arm's plan."""
    return ArmPlan(
        arm.kind,
        arm.shots,
        arm.seed,
        arm.retriever,
        arm.mmr,
        arm.order,
        arm.instruction,
        arm.optimized,
        arm.constrained,
    )


def prompting_arms(settings: EvaluateConfig, optimized: str | None = None) -> list[ArmPlan]:
    """Return every arm that needs no training, arms with the pairs' own instruction first.

    They are followed by zero-shot with each other instruction; the instruction of digest ``optimized`` comes last.

    Where the config has a grammar, zero-shot and retrieved arms are also constrained by it. That covers zero-shot with
    each instruction, since one of them may name the allowed answers.

    Ties go to the earlier arm, so cheaper arms come first.
    """
    shots = sorted(set(settings.num_fewshot))
    static = [ArmPlan("static", k, seed=seed) for k in shots for seed in range(1, settings.static_seeds + 1)]
    every = [
        ArmPlan("retrieved", k, retriever=retriever, mmr=None if weight == 1 else weight, order=order)
        for retriever in settings.retrievers
        for weight in settings.mmr_lambda
        for order in settings.demonstration_order
        for k in shots
    ]
    # A single demonstration is the most similar one, and has no order.
    retrieved = list(dict.fromkeys(p if p.shots > 1 else replace(p, mmr=None, order="similar_last") for p in every))
    zero_shot = [ZERO_SHOT, *other_instructions(ZERO_SHOT, settings, optimized)]
    free = [*zero_shot, *static, *retrieved]
    if settings.structured_outputs is None:
        return free
    return [*free, *(replace(plan, constrained=True) for plan in [*zero_shot, *retrieved])]


def untried_prompting(settings: EvaluateConfig) -> tuple[str, ...]:
    """Return in words where this config tries less in prompting arms than the default one."""
    default, found = EvaluateConfig(), []
    most, usual = max(settings.num_fewshot), max(default.num_fewshot)
    if not settings.static_seeds:
        found.append("no static demonstrations (evaluate.static_seeds)")
    elif settings.static_seeds < default.static_seeds:
        draws = f"{count_of(settings.static_seeds, 'draw')} of static demonstrations"
        found.append(f"{draws} instead of {default.static_seeds} (evaluate.static_seeds)")
    if not settings.retrievers:
        found.append("no retrieved demonstrations (evaluate.retrievers)")
    elif missing := [name for name in default.retrievers if name not in settings.retrievers]:
        found.append(f"no demonstrations retrieved by {' or '.join(missing)} (evaluate.retrievers)")
    if most < usual and (settings.static_seeds or settings.retrievers):
        found.append(f"at most {count_of(most, 'demonstration')} instead of {usual} (evaluate.num_fewshot)")
    return tuple(found)


def always_answered(plans: Sequence[ArmPlan]) -> set[ArmPlan]:
    """Return the prompting arms that no time limit leaves out: zero-shot and the fewest retrieved demonstrations."""
    retrieved = sorted((plan for plan in plans if plan.kind == "retrieved"), key=lambda plan: plan.shots)
    return {ZERO_SHOT, *retrieved[:1]}


def by_value(plans: Sequence[ArmPlan]) -> list[ArmPlan]:
    """Return prompting arms in the order in which they are answered; a time limit leaves out the last ones.

    Arms that are never left out come first, then few demonstrations before many, retrieved before static.
    """
    first = always_answered(plans)
    return sorted(plans, key=lambda plan: (plan not in first, plan.shots, plan.kind == "static"))


def other_instructions(plan: ArmPlan, settings: EvaluateConfig, optimized: str | None = None) -> list[ArmPlan]:
    """Return the same arm with each instruction of evaluate.instructions, and with the optimized one, if any."""
    numbered = [replace(plan, instruction=number) for number in range(1, len(settings.instructions) + 1)]
    return numbered if optimized is None else [*numbered, replace(plan, optimized=optimized)]


def tuned_retrieved(plan: ArmPlan) -> ArmPlan:
    """Return the adapter's arm with a retrieved arm's demonstrations and the instruction that it was trained on."""
    assert plan.kind == "retrieved"
    return ArmPlan("tuned-retrieved", plan.shots, retriever=plan.retriever, mmr=plan.mmr, order=plan.order)


def tuned_optimized(optimized: str | None) -> ArmPlan | None:
    """Return the adapter's arm with the optimized instruction of this digest, or None without one."""
    return None if optimized is None else ArmPlan("tuned", optimized=optimized)


# Optimized prompts in the project, one file for each optimization, and the file that fits the current inputs


_NAMES = {
    "dataset": "dataset version",
    "base": "base",
    "template": "chat template",
    "metrics": "metric",
}
"""Inputs whose change makes an optimized prompt stale."""


def instruction_digest(text: str) -> str:
    """Return the name of an instruction: 12 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def store_optimized(file: Path, prompt: OptimizedPrompt, evaluations: Path) -> None:
    """Write an optimization, with a line in the access log that binds it."""
    AccessLog(evaluations).write(file, json_document(prompt.model_dump(mode="json")))


def load_optimized(file: Path, evaluations: Path) -> OptimizedPrompt:
    """Load an optimization, checked against the access log."""
    AccessLog(evaluations).require(file)
    fix = "Remove it and run `tunewright optimize-prompt` again: kept replies and answers are reused."
    return parse_line(
        OptimizedPrompt.model_validate_json, file.read_bytes(), str(file), "Invalid optimized prompt", fix
    )


def find_optimized(
    folder: Path, evaluations: Path, inputs: Mapping[str, Any], reporter: Reporter
) -> OptimizedPrompt | None:
    """Return the newest optimization of the same inputs; without one, warn of stale ones.

    ``evaluations`` is the folder whose access log binds the prompts, and ``inputs`` are from `ArmRunner.inputs`.
    """
    found = [load_optimized(file, evaluations) for file in sorted(folder.glob("[!.]*.json"))]
    found.sort(key=lambda prompt: prompt.created)
    fitting = [prompt for prompt in found if not changed_inputs(prompt, inputs)]
    if fitting:
        return fitting[-1]
    if found:
        reporter.warn(
            f"The optimized prompt {found[-1].id} is stale and not used, since it was found with another "
            f"{' and another '.join(changed_inputs(found[-1], inputs))}. `tunewright optimize-prompt` finds one for "
            "the current inputs."
        )
    return None


def changed_inputs(prompt: OptimizedPrompt, inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs that differ from an optimization's inputs."""
    return [name for key, name in _NAMES.items() if _deciding(prompt.lineage, key) != _deciding(inputs, key)]


def _deciding(inputs: Mapping[str, Any], key: str) -> Any:
    value = inputs.get(key)
    return value[:1] if key == "metrics" and isinstance(value, list) else value  # the first metric decides
