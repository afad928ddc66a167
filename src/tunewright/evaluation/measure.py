"""Measuring arms: prompting arms on dev, where the best is chosen; then the contrast on test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import Adapter
from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_limit, stop_strings
from tunewright.data.versions import DatasetVersion, Member
from tunewright.disk import digest, new_folder, write_json, write_text
from tunewright.errors import UserError
from tunewright.evaluation.arms import TUNED, ZERO_SHOT, ArmPlan, Retriever, prompting_arms, with_demonstrations
from tunewright.evaluation.evidence import (
    EVIDENCE_FILE,
    ITEMS_FILE,
    SCHEMA_VERSION,
    Advice,
    Arm,
    ArmKind,
    Contrast,
    Evidence,
    Item,
    load_evidence,
)
from tunewright.evaluation.generations import Generator, Prompt
from tunewright.evaluation.scoring import ScoredArms, declared_contrasts, measured_metrics, score_arm, score_arms
from tunewright.metrics import Scorer, Scores, metric_inputs, open_scorers, score_all
from tunewright.models.bases import Base
from tunewright.models.loading import context_length
from tunewright.progress import Reporter
from tunewright.project import Project
from tunewright.recipe import Quantize, Recipe
from tunewright.training.lineage import packages


@dataclass(frozen=True)
class AdviseResult:
    """What `advise` did."""

    file: Path
    advice: Advice
    measured: bool
    """False when the same arms had been measured before."""


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` or `crossfit` did."""

    folder: Path
    evidence: Evidence
    evaluated: bool
    """False when evidence of the same inputs was there already."""


@dataclass(frozen=True)
class Answered:
    """One item's answer by one arm."""

    text: str
    truncated: bool
    prompt_tokens: int


class Measurement:
    """One dataset version and a base, and the arms measured on them.

    Args:
        project: its recipe decides what is measured.
        version: the rows; retrieval draws on its training split.
        generator: answers prompts.
        reporter: shows progress, hears warnings.
        folder: where advice and evidence are kept (None: with the project's own).
        limit: the longest answer in tokens (None: see `answer_limit`, of the training split).
    """

    def __init__(
        self,
        project: Project,
        version: DatasetVersion,
        generator: Generator,
        reporter: Reporter,
        *,
        folder: Path | None = None,
        limit: int | None = None,
    ) -> None:
        self.project = project
        self.version = version
        self.generator = generator
        self.reporter = reporter
        self.settings = project.recipe.evaluate
        self.scorers = open_scorers(self.settings, project.root)
        # Generic rows are trained on, but are no demonstrations of the task and say nothing of its answers' length.
        self.retriever = Retriever(version.domain_of("train"))
        self.context = context_length(generator.base)
        self._folder = project.evaluations if folder is None else folder
        self._limit = limit

    @cached_property
    def limit(self) -> int:
        """The longest answer in tokens."""
        if self._limit is not None:
            return self._limit
        return answer_limit(self.project.recipe, self.generator.chat, self.version.domain_of("train"))

    def advise(self) -> AdviseResult:
        """Measure every prompting arm on the dev split with the untuned base."""
        plans = prompting_arms(self.settings.shots)
        identity = digest({**self._inputs(self.limit), "arms": [p.name for p in plans]})[:12]
        file = self._folder / f"advice-{identity}.json"
        if file.exists():
            return AdviseResult(file, Advice.model_validate_json(file.read_text(encoding="utf-8")), measured=False)
        dev = self.version.examples("dev")
        arms = [arm for plan in plans if (arm := self._dev_arm(plan, dev)) is not None]
        if not arms:
            raise UserError("no prompt fits the base's context", fix="Shorten the examples or take another base.")
        decides = self.scorers[0].name
        best = max(arms, key=lambda a: (a.score(decides).value, -a.shots))
        advice = Advice(
            metric=decides,
            metrics=measured_metrics(self.scorers),
            items=len(dev),
            clusters=len({m.cluster for m in dev}),
            arms=arms,
            best=best.name,
            max_new_tokens=self.limit,
        )
        write_json(file, advice.model_dump(mode="json"))
        return AdviseResult(file, advice, measured=True)

    def _dev_arm(self, plan: ArmPlan, dev: Sequence[Member]) -> Arm | None:
        prompts = self._prompts(plan, dev)
        too_long = sum(len(p) + self.limit > self.context for p in prompts)
        if too_long:
            self.reporter.warn(
                f"{plan.name} is left out: {too_long} of {len(prompts)} prompts do not fit the base's context "
                f"of {self.context:,} tokens with an answer of {self.limit}"
            )
            return None
        answers = self._answers(plan, prompts, self.limit, None, "dev")
        scored = scored_arms(self.scorers, dev, {plan.name: answers})
        return measured_arm(plan.name, plan.kind, plan.shots, answers, scored, self.project.recipe.seed)

    def dev_scores(self, adapter: Adapter | None) -> Scores:
        """The dev split by the deciding metric, answered by the adapter, or by the base alone, zero-shot."""
        plan = ZERO_SHOT if adapter is None else TUNED
        dev = self.version.examples("dev")
        answers = self._answers(plan, self._prompts(plan, dev), self.limit, adapter, "dev")
        return score_all(self.scorers[0], [a.text for a in answers], [m.example for m in dev])

    def answer_test(self, adapter: Adapter, advice: Advice) -> dict[str, list[Answered]]:
        """The test split's answers zero-shot, by the best prompting arm and by the adapter: arm name to answers."""
        test = self.version.examples("test")
        return {
            plan.name: self._answers(
                plan, self._prompts(plan, test), advice.max_new_tokens, adapter if plan is TUNED else None, "test"
            )
            for plan in [*self._chosen(advice), TUNED]
        }

    def evaluate(self, adapter: Adapter, advice: Advice) -> EvaluateResult:
        """Answer the test split zero-shot, with the best prompting arm and with the adapter, and compare."""
        inputs = self._inputs(advice.max_new_tokens)
        inputs |= {"adapter": adapter.digest, "best_prompting": advice.best, "margin": self.settings.margin}
        identity = digest(inputs)[:12]
        folder = self._folder / identity
        if (folder / EVIDENCE_FILE).exists():
            return EvaluateResult(folder, load_evidence(folder), evaluated=False)
        test = self.version.examples("test")
        answers = self.answer_test(adapter, advice)
        plans = {plan.name: plan for plan in [*self._chosen(advice), TUNED]}
        seed = self.project.recipe.seed
        scored = scored_arms(self.scorers, test, answers)
        arms = [
            measured_arm(name, plans[name].kind, plans[name].shots, given, scored, seed)
            for name, given in answers.items()
        ]
        evidence = self._evidence(identity, adapter, advice, arms, scored)
        save_evaluation(folder, evidence, test, answers, scored)
        return EvaluateResult(folder, evidence, evaluated=True)

    def _chosen(self, advice: Advice) -> list[ArmPlan]:
        return [p for p in prompting_arms(self.settings.shots) if p.kind == "zero-shot" or p.name == advice.best]

    def _inputs(self, limit: int) -> dict[str, Any]:
        """All that decides the answers of an arm, apart from its adapter."""
        return {
            "dataset": self.version.digest,
            "base": self.generator.base.digest,
            "template": self.generator.chat.digest,
            "dtype": self.generator.dtype,
            "quantize": self.generator.quantize,
            "max_new_tokens": limit,
            "stop": self.generator.stop,
            "metrics": [metric_inputs(metric, self.project.root) for metric in self.settings.metrics],
            "seed": self.project.recipe.seed,
            "schema": SCHEMA_VERSION,
        }

    def _evidence(
        self,
        identity: str,
        adapter: Adapter,
        advice: Advice,
        arms: list[Arm],
        scored: ScoredArms,
    ) -> Evidence:
        test = self.version.examples("test")
        return Evidence(
            id=identity,
            project=self.project.recipe.name,
            metric=self.scorers[0].name,
            metrics=measured_metrics(self.scorers),
            margin=self.settings.margin,
            items=len(test),
            clusters=len({m.cluster for m in test}),
            train_items=len(self.version.examples("train")),
            dev_arms=list(advice.arms),
            best_prompting=advice.best,
            arms=arms,
            contrasts=measured_contrasts(scored, advice.best, self.project.recipe.seed),
            lineage={
                **measured_with(
                    self.project.recipe,
                    self.generator.base,
                    self.generator.chat,
                    self.generator.quantize,
                    advice.max_new_tokens,
                ),
                "adapter": {"name": adapter.name, "digest": adapter.digest, "lineage": adapter.lineage},
                "dataset": self.version.digest,
                "test_split": self.version.split_digest("test"),
                "dev_split": self.version.split_digest("dev"),
            },
        )

    def _prompts(self, plan: ArmPlan, members: Sequence[Member]) -> list[Prompt]:
        return [
            self.generator.chat.prompt(
                with_demonstrations(m, self.retriever.nearest(m, plan.shots)) if plan.shots else m.example.prompt
            )
            for m in members
        ]

    def _answers(
        self, plan: ArmPlan, prompts: Sequence[Prompt], limit: int, adapter: Adapter | None, split: str
    ) -> list[Answered]:
        generations = self.generator.answer(f"{plan.name} on {split}", prompts, limit, adapter)
        return [Answered(g.text, g.truncated, len(p)) for g, p in zip(generations, prompts, strict=True)]


# Parts that a held-out and a cross-fitted evaluation have in common


def measured_arm(
    name: str, kind: ArmKind, shots: int, answers: Sequence[Answered], scored: ScoredArms, seed: int
) -> Arm:
    """One arm's scores; ``answers`` are those that were scored.

    Raises:
        UserError: a metric that can score none of the answers.
    """
    return score_arm(
        name=name,
        kind=kind,
        shots=shots,
        scores=scored.of_arm(name),
        clusters=scored.clusters,
        truncated=sum(a.truncated for a in answers),
        prompt_tokens=sum(a.prompt_tokens for a in answers) / len(answers),
        seed=seed,
    )


def scored_arms(
    scorers: Sequence[Scorer], members: Sequence[Member], answers: Mapping[str, Sequence[Answered]]
) -> ScoredArms:
    """Every arm's answers to the members, each scored once by every metric."""
    return score_arms(
        scorers,
        [m.example for m in members],
        [m.cluster for m in members],
        {name: [a.text for a in given] for name, given in answers.items()},
    )


def measured_contrasts(scored: ScoredArms, best: str, seed: int) -> list[Contrast]:
    """Tuned against the best prompting arm, which decides, and zero-shot: what the tuning did to the model itself."""
    return declared_contrasts(scored, TUNED.name, list(dict.fromkeys([best, ZERO_SHOT.name])), seed)


def measured_with(recipe: Recipe, base: Base, chat: ChatFormat, quantize: Quantize, limit: int) -> dict[str, Any]:
    """What the evidence's lineage says of the means; ``created`` is UTC, ISO 8601."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": {"spec": base.spec, "digest": base.digest},
        "template_digest": chat.digest,
        "decoding": {
            "greedy": True,
            "max_new_tokens": limit,
            "stop": stop_strings(recipe, chat),
            "batch_size": recipe.evaluate.batch_size,
            "dtype": recipe.train.dtype,
            "quantize": quantize,
        },
        "packages": packages(quantize),
    }


def save_evaluation(
    folder: Path,
    evidence: Evidence,
    members: Sequence[Member],
    answers: Mapping[str, Sequence[Answered]],
    scored: ScoredArms,
    fold_of: Mapping[str, int] | None = None,
) -> None:
    """Write evidence and items, whole or not at all; ``fold_of`` maps pair keys to folds."""
    items = [
        Item(
            key=m.key,
            cluster=m.cluster,
            input=m.example.input_text,
            reference=m.example.output,
            answers={name: given[i].text for name, given in answers.items()},
            scores=scored.of_item(i),
            unscored=scored.why_not(i),
            fold=None if fold_of is None else fold_of[m.key],
        )
        for i, m in enumerate(members)
    ]
    with new_folder(folder) as temporary:
        write_text(temporary / ITEMS_FILE, "".join(item.model_dump_json(exclude_none=True) + "\n" for item in items))
        write_json(temporary / EVIDENCE_FILE, evidence.model_dump(mode="json"))
