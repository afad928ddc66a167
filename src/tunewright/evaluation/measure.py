"""Measuring arms: prompting arms on dev, where the best is chosen; then the contrast on test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import Adapter
from tunewright.data.versions import DatasetVersion, Member
from tunewright.disk import digest, new_folder, write_json, write_text
from tunewright.errors import UserError
from tunewright.evaluation.arms import TUNED, ArmPlan, Retriever, prompting_arms, with_demonstrations
from tunewright.evaluation.evidence import (
    EVIDENCE_FILE,
    ITEMS_FILE,
    Advice,
    Arm,
    Evidence,
    Item,
    load_evidence,
)
from tunewright.evaluation.generations import Generation, Generator, Prompt
from tunewright.evaluation.metrics import bleu_signature
from tunewright.evaluation.statistics import contrast, score_arm
from tunewright.models.loading import context_length
from tunewright.progress import Reporter
from tunewright.project import Project
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
    """What `evaluate` did."""

    folder: Path
    evidence: Evidence
    evaluated: bool
    """False when evidence of the same inputs was there already."""


class Measurement:
    """One project's dataset version and base, and the arms measured on them."""

    def __init__(self, project: Project, version: DatasetVersion, generator: Generator, reporter: Reporter) -> None:
        self.project = project
        self.version = version
        self.generator = generator
        self.reporter = reporter
        self.settings = project.recipe.evaluate
        # Generic rows are trained on, but are no demonstrations of the task and say nothing of its answers' length.
        self.training = [m for m in version.examples("train") if not m.mixed]
        self.retriever = Retriever(self.training)
        self.context = context_length(generator.base)

    def advise(self) -> AdviseResult:
        """Measure every prompting arm on the dev split with the untuned base."""
        limit = self._max_new_tokens()
        plans = prompting_arms(self.settings.shots)
        identity = digest({**self._inputs(limit), "arms": [p.name for p in plans]})[:12]
        file = self.project.evaluations / f"advice-{identity}.json"
        if file.exists():
            return AdviseResult(file, Advice.model_validate_json(file.read_text(encoding="utf-8")), measured=False)
        dev = self.version.examples("dev")
        arms = [arm for plan in plans if (arm := self._dev_arm(plan, dev, limit)) is not None]
        if not arms:
            raise UserError("no prompt fits the base's context", fix="Shorten the examples or take another base.")
        best = max(arms, key=lambda a: (a.score(self.settings.metric).value, -a.shots))
        advice = Advice(metric=self.settings.metric, items=len(dev), arms=arms, best=best.name, max_new_tokens=limit)
        write_json(file, advice.model_dump(mode="json"))
        return AdviseResult(file, advice, measured=True)

    def _dev_arm(self, plan: ArmPlan, dev: Sequence[Member], limit: int) -> Arm | None:
        prompts = self._prompts(plan, dev)
        too_long = sum(len(p) + limit > self.context for p in prompts)
        if too_long:
            self.reporter.warn(
                f"{plan.name} is left out: {too_long} of {len(prompts)} prompts do not fit the base's context "
                f"of {self.context:,} tokens with an answer of {limit}"
            )
            return None
        return self._arm(plan, dev, prompts, self._answers(plan, prompts, limit, None, "dev"))

    def evaluate(self, adapter: Adapter, advice: Advice) -> EvaluateResult:
        """Answer the test split zero-shot, with the best prompting arm and with the adapter, and compare."""
        inputs = self._inputs(advice.max_new_tokens)
        inputs |= {"adapter": adapter.digest, "best_prompting": advice.best, "margin": self.settings.margin}
        identity = digest(inputs)[:12]
        folder = self.project.evaluations / identity
        if (folder / EVIDENCE_FILE).exists():
            return EvaluateResult(folder, load_evidence(folder), evaluated=False)
        test = self.version.examples("test")
        chosen = [p for p in prompting_arms(self.settings.shots) if p.kind == "zero-shot" or p.name == advice.best]
        texts: dict[str, list[str]] = {}
        arms = []
        for plan in [*chosen, TUNED]:
            prompts = self._prompts(plan, test)
            limit = advice.max_new_tokens
            generations = self._answers(plan, prompts, limit, adapter if plan is TUNED else None, "test")
            arms.append(self._arm(plan, test, prompts, generations))
            texts[plan.name] = [g.text for g in generations]
        evidence = self._evidence(identity, adapter, advice, arms, texts)
        items = [
            Item(
                key=m.key,
                cluster=m.cluster,
                input=m.example.input_text,
                reference=m.example.output,
                answers={name: answers[i] for name, answers in texts.items()},
            )
            for i, m in enumerate(test)
        ]
        with new_folder(folder) as temporary:
            write_text(temporary / ITEMS_FILE, "".join(item.model_dump_json() + "\n" for item in items))
            write_json(temporary / EVIDENCE_FILE, evidence.model_dump(mode="json"))
        return EvaluateResult(folder, evidence, evaluated=True)

    def _inputs(self, limit: int) -> dict[str, Any]:
        """All that decides the answers of an arm, apart from its adapter."""
        return {
            "dataset": self.version.digest,
            "base": self.generator.base.digest,
            "template": self.generator.chat.digest,
            "dtype": self.generator.dtype,
            "max_new_tokens": limit,
            "metric": self.settings.metric,
            "seed": self.project.recipe.seed,
        }

    def _evidence(
        self, identity: str, adapter: Adapter, advice: Advice, arms: list[Arm], texts: dict[str, list[str]]
    ) -> Evidence:
        test = self.version.examples("test")
        # The first contrast decides; the second says what the tuning did to the model itself.
        controls = dict.fromkeys([advice.best, "zero-shot"])
        return Evidence(
            id=identity,
            project=self.project.recipe.name,
            metric=self.settings.metric,
            margin=self.settings.margin,
            items=len(test),
            clusters=len({m.cluster for m in test}),
            train_items=len(self.version.examples("train")),
            dev_arms=list(advice.arms),
            best_prompting=advice.best,
            arms=arms,
            contrasts=[
                contrast(
                    treatment=TUNED.name,
                    control=control,
                    treatment_answers=texts[TUNED.name],
                    control_answers=texts[control],
                    references=[m.example.output for m in test],
                    clusters=[m.cluster for m in test],
                    metric=self.settings.metric,
                    seed=self.project.recipe.seed,
                )
                for control in controls
            ],
            bleu_signature=bleu_signature(),
            lineage={
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "adapter": {"name": adapter.name, "digest": adapter.digest, "lineage": adapter.lineage},
                "dataset": self.version.digest,
                "test_split": self.version.split_digest("test"),
                "dev_split": self.version.split_digest("dev"),
                "base": {"spec": self.generator.base.spec, "digest": self.generator.base.digest},
                "template_digest": self.generator.chat.digest,
                "decoding": {
                    "greedy": True,
                    "max_new_tokens": advice.max_new_tokens,
                    "batch_size": self.settings.batch_size,
                    "dtype": self.generator.dtype,
                },
                "packages": packages(),
            },
        )

    def _max_new_tokens(self) -> int:
        if self.settings.max_new_tokens is not None:
            return self.settings.max_new_tokens
        chat = self.generator.chat
        last_turns = (chat.layouts(m.example.messages)[-1] for m in self.training)
        longest = max(_answer_length(row.loss_mask) for row in chat.tokens(list(last_turns)))
        return math.ceil(1.25 * longest)

    def _prompts(self, plan: ArmPlan, members: Sequence[Member]) -> list[Prompt]:
        return [
            self.generator.chat.prompt(
                with_demonstrations(m, self.retriever.nearest(m, plan.shots)) if plan.shots else m.example.prompt
            )
            for m in members
        ]

    def _answers(
        self, plan: ArmPlan, prompts: Sequence[Prompt], limit: int, adapter: Adapter | None, split: str
    ) -> list[Generation]:
        return self.generator.answer(f"{plan.name} on {split}", prompts, limit, adapter)

    def _arm(
        self, plan: ArmPlan, members: Sequence[Member], prompts: Sequence[Prompt], answers: Sequence[Generation]
    ) -> Arm:
        return score_arm(
            name=plan.name,
            kind=plan.kind,
            shots=plan.shots,
            answers=[g.text for g in answers],
            references=[m.example.output for m in members],
            clusters=[m.cluster for m in members],
            truncated=sum(g.truncated for g in answers),
            prompt_tokens=sum(map(len, prompts)) / len(prompts),
            seed=self.project.recipe.seed,
        )


def _answer_length(loss_mask: Sequence[bool]) -> int:
    """Tokens of the last trained turn, which ends the row."""
    return next((n for n, trained in enumerate(reversed(loss_mask)) if not trained), len(loss_mask))
