"""Cross-fitted evaluation: every row is answered once, by an adapter trained on neither it nor a near-duplicate.

A tenth of a small set is too few items to show anything. Here the rows are split into folds, and each fold runs the
normal pipeline with all its choices. Its training rows train an adapter, its dev rows choose the epoch and the
prompting arm, and its test rows are answered. All rows' answers together are the evidence. It describes the config on
this much data (the mean over the folds' adapters), not any one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunewright.adapters.registry import Adapter
from tunewright.chat.answers import answer_limit, stop_strings
from tunewright.core.io import digest
from tunewright.core.progress import duration
from tunewright.data.dedup.leakage import nearest_training
from tunewright.data.dedup.output_leakage import new_templates
from tunewright.data.splits import SPLITS
from tunewright.data.versions import DatasetVersion
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.answer_constraints import grammar_of
from tunewright.evaluation.arm_runner import (
    ArmRunner,
    BuiltPrompt,
    measured_arm,
    measured_with,
    references_inputs,
    scored_arms,
)
from tunewright.evaluation.arms import BEST_PROMPTING, TUNED, TUNED_RETRIEVED, ZERO_SHOT, ArmPlan
from tunewright.evaluation.folds import SubsetTrainings, fold_versions
from tunewright.evaluation.generations import ArmAnswer
from tunewright.evaluation.prompt_search import advise, choosing_inputs
from tunewright.evaluation.runner import EvaluateResult, common_fields, contest, declare, open_test, save_evaluation
from tunewright.evidence.files import EVIDENCE_FILE, PromptMessages
from tunewright.evidence.logged_access import EarlierAccess, LoggedAccess
from tunewright.evidence.schema import MEASUREMENT_VERSION, Advice, Evidence, Fold
from tunewright.evidence.scoring import Distances, report_references
from tunewright.metrics import Scorer, metric_inputs, open_scorers, score_all
from tunewright.training.train import TrainResult, training_inputs
from tunewright.training.trainings import Training


@dataclass(frozen=True)
class _Done:
    """A completed fold."""

    version: DatasetVersion
    adapter: Adapter
    advice: Advice
    plans: list[ArmPlan]
    answers: dict[str, list[ArmAnswer]]
    """Answers to the fold's test rows, by arm."""
    prompts: dict[str, list[BuiltPrompt]]
    """The prompts that they answer."""
    longer: int
    """Number of the fold's test rows whose reference is longer than an answer may be."""


@dataclass(frozen=True)
class _Role:
    """An arm as the evidence records it: one plan per fold, which may differ."""

    name: str
    plans: list[ArmPlan]

    @property
    def plan(self) -> ArmPlan:
        """The plan that the evidence records."""
        return self.plans[0] if len(set(self.plans)) == 1 else ArmPlan("mixed")


@dataclass(eq=False)
class CrossValidation(SubsetTrainings):
    """The folds of a dataset version, and everything that decides the result."""

    folds: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scorers = open_scorers(self.config.evaluate, self.project.root)
        self.items = [m for m in self.version.domain if not m.generated]
        self.versions = fold_versions(self.version, self.folds, self.config.seed)
        self.require_enough(self.versions, f" in the smallest of {self.folds} folds")
        # From all rows: no fold truncates an answer that another would not, and base answers serve every fold.
        self.limit = answer_limit(self.config, self.chat, self.version.domain)
        self.generator()  # an engine that cannot answer is refused before any training
        self.trained_by = digest([training_inputs(self.project, v, self.base, self.chat) for v in self.versions])

    @property
    def identity(self) -> str:
        """12 hex digits: a digest of everything that decides the measurement."""
        settings = self.config.evaluate
        decides = {
            "trainings": self.trained_by,
            "max_new_tokens": self.limit,
            "stop": stop_strings(self.config, self.chat),
            "structured_outputs": grammar.rule if (grammar := grammar_of(self.project)) else None,
            "quantization": self.quantization,
            "metrics": [metric_inputs(metric, self.project.root) for metric in settings.metrics],
            "margin": settings.margin,
            "schema": MEASUREMENT_VERSION,
            **choosing_inputs(settings),
            **references_inputs(self.items),
            "tuned_retrieved": settings.tuned_retrieved,
            **self.generator().engine.identity,
        }
        return digest(decides)[:12]

    def run(self) -> EvaluateResult:
        """Evaluate the config on all rows. A stopped run resumes and reuses its finished work."""
        folder = self.project.evaluations / self.identity
        access_log = AccessLog(self.project.evaluations)
        if (folder / EVIDENCE_FILE).exists():
            return EvaluateResult(folder, access_log.load(folder), evaluated=False)
        if self.config.evaluate.incumbents:
            self.reporter.warn("evaluate.incumbents are not asked in a cross-validation; `tunewright evaluate` does.")
        # The prompting arm of each fold is not known yet.
        with_retrieved = [TUNED_RETRIEVED] if self._tries_retrieved else []
        opening, earlier = open_test(
            access_log,
            self.project,
            self.version,
            self.items,
            self.reporter,
            evaluation=self.identity,
            design="cross-fitted",
            adapter=None,
            adapter_digest=None,
            base=self.base.digest,
            declared=declare(self.config, self.scorers[0].name, BEST_PROMPTING, with_retrieved),
        )
        report_references([m.example for m in self.items], "item", self.reporter)
        planned = []
        for number, version in enumerate(self.versions, start=1):
            of = {"crossval": self.trained_by[:12], "of": self.version.digest, "number": number}
            facts = {"fold": {**of, "folds": len(self.versions)}}
            rows = "{:,} train, {:,} dev and {:,} test rows".format(*(len(version.examples(s)) for s in SPLITS))
            message = f"Fold {number} of {len(self.versions)}: {rows}"
            training = Training(f"fold {number}", self.project, version, self.project.fold_adapters, facts)
            planned.append((training, 1.0, message))
        trained = self.trained(
            planned,
            lambda took, left, count: f"The fold took {duration(took)}. {count} left: about {duration(left)}.",
        )
        done = [self._answered(each.version, result) for (each, _, _), result in zip(planned, trained, strict=True)]
        return self._result(access_log, folder, done, opening, earlier)

    @property
    def _tries_retrieved(self) -> bool:
        settings = self.config.evaluate
        return settings.tuned_retrieved and bool(settings.retrievers)

    def _answered(self, version: DatasetVersion, trained: TrainResult) -> _Done:
        """Choose a fold's prompting arm on its dev rows, and answer its test rows."""
        arm_runner = ArmRunner(
            self.project,
            version,
            self.generator(),
            self.reporter,
            folder=self.project.fold_adapters.parent,
            limit=self.limit,
        )
        advice = advise(arm_runner).advice
        plans = contest(arm_runner, advice)
        members = version.examples("test")
        answers = arm_runner.answer_arms([(plan, trained.adapter) for plan in plans], members, "the fold")
        prompts = {plan.name: arm_runner.prompts(plan, members) for plan in plans}
        longer = arm_runner.longer_than_limit(members)
        return _Done(version, trained.adapter, advice, plans, answers, prompts, longer)

    def _roles(self, done: Sequence[_Done]) -> list[_Role]:
        """Return the arms that all folds have; the second is the prompting arm that tuned has to beat."""
        best = [next(plan for plan in fold.plans if plan.name == fold.advice.best) for fold in done]
        retrieved = [plan for fold in done for plan in fold.plans if plan.kind == "tuned-retrieved"]
        each = [
            ([ZERO_SHOT] * len(done), ZERO_SHOT.name),
            (best, BEST_PROMPTING),
            ([TUNED] * len(done), TUNED.name),
        ]
        if len(retrieved) == len(done):
            each.append((retrieved, TUNED_RETRIEVED))
        elif self._tries_retrieved:
            self.reporter.warn(
                f"{TUNED_RETRIEVED} is left out: {len(done) - len(retrieved)} of {len(done)} folds have no retrieved "
                "arm"
            )
        return [_Role(plans[0].name if len(set(plans)) == 1 else name, plans) for plans, name in each]

    def _result(
        self,
        access_log: AccessLog,
        folder: Path,
        done: Sequence[_Done],
        opening: LoggedAccess,
        earlier: tuple[EarlierAccess, ...],
    ) -> EvaluateResult:
        """Score all folds' answers together, and write the evidence."""
        rows, seed = self.items, self.config.seed
        roles = self._roles(done)
        by_key = {role.name: _by_key(done, role) for role in roles}
        answers = {name: [found[row.key][0] for row in rows] for name, found in by_key.items()}
        messages = PromptMessages()
        prompts = {
            name: [built.stored(messages, plan) for _, built, plan in (found[row.key] for row in rows)]
            for name, found in by_key.items()
        }
        scored = scored_arms(self.scorers, rows, answers)
        control = roles[1].name
        declared = declare(self.config, self.scorers[0].name, control, [role.name for role in roles])
        nearest = {key: near for v in self.versions for key, near in nearest_training(v, self.reporter).items()}
        # Each item's output template is compared with the rows that its own fold trained on.
        by_fold = [new_templates(version.members) for version in self.versions]
        new = {key: is_new for fold in by_fold for key, is_new in (fold or {}).items()} if all(by_fold) else None
        distances, longer = Distances(nearest, new), sum(fold.longer for fold in done)
        outputs = [row.example.output for row in rows]
        evidence = Evidence(
            **common_fields(self.config, self.scorers, outputs, rows, answers, scored, declared, distances, longer),
            id=self.identity,
            design="cross-fitted",
            folds=tuple(_fold(number, fold, roles, self.scorers[0]) for number, fold in enumerate(done, start=1)),
            train_items=round(sum(len(fold.version.examples("train")) for fold in done) / len(done)),
            dev_arms=[],
            best_prompting=control,
            arms=[
                measured_arm(role.name, role.plan, answers[role.name], scored, seed)
                for role in {role.name: role for role in roles}.values()
            ],
            engine=self.generator().used,
            opening=opening,
            openings=earlier,
            lineage={
                **measured_with(self.config, self.base, self.chat, self.quantization, self.limit),
                "dataset": self.version.digest,
                "folds": [fold.version.digest for fold in done],
                "adapters": [{"name": fold.adapter.name, "digest": fold.adapter.digest} for fold in done],
                "config": self.config.deciding(),
                "forced": self.forced,
            },
        )
        fold_of = {m.key: n for n, v in enumerate(self.versions, start=1) for m in v.examples("test")}
        save_evaluation(access_log, folder, evidence, rows, answers, scored, distances, prompts, messages, fold_of)
        return EvaluateResult(folder, evidence, evaluated=True)


def _by_key(done: Sequence[_Done], role: _Role) -> dict[str, tuple[ArmAnswer, BuiltPrompt, str | None]]:
    """Return all folds' answers and prompts by pair key, with the fold's own arm where these differ."""
    found: dict[str, tuple[ArmAnswer, BuiltPrompt, str | None]] = {}
    for fold, plan in zip(done, role.plans, strict=True):
        own = plan.name if role.plan.kind == "mixed" else None
        answered = zip(fold.version.examples("test"), fold.answers[plan.name], fold.prompts[plan.name], strict=True)
        found |= {member.key: (answer, prompt, own) for member, answer, prompt in answered}
    return found


def _fold(number: int, fold: _Done, roles: Sequence[_Role], scorer: Scorer) -> Fold:
    test = fold.version.examples("test")
    own = {role.name: role.plans[number - 1].name for role in roles}
    scores = {
        role: score_all(scorer, [a.text for a in fold.answers[arm]], [m.example for m in test])
        for role, arm in own.items()
    }
    return Fold(
        number=number,
        train_items=len(fold.version.examples("train")),
        dev_items=len(fold.version.examples("dev")),
        items=len(test),
        best_prompting=fold.advice.best,
        scores={role: each.total() if each.scored.any() else None for role, each in scores.items()},
        dev_losses=[epoch["dev_loss"] for epoch in fold.adapter.lineage["training"]["epochs"]],
        adapter=fold.adapter.digest,
    )
