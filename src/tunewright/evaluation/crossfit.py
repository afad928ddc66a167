"""Cross-fitted evaluation: every row is answered once, by an adapter that saw neither it nor a near-duplicate of it.

A tenth of a small set is too few items to show anything. Here the rows are dealt into folds, and each fold goes the
normal road with all its choices inside: its training rows make an adapter, its dev rows choose the epoch and the
prompting arm, its test rows are answered. All rows' answers together are the evidence. It speaks of the recipe on this
much data, the mean over the folds' adapters, and not of one of them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_limit, stop_strings
from tunewright.data.splits import SPLITS
from tunewright.data.versions import DatasetVersion, Member
from tunewright.disk import digest
from tunewright.evaluation.arms import TUNED, ZERO_SHOT, prompting_arms
from tunewright.evaluation.evidence import (
    EVIDENCE_FILE,
    SCHEMA_VERSION,
    Advice,
    Arm,
    ArmKind,
    Evidence,
    Fold,
    load_evidence,
)
from tunewright.evaluation.folds import fold_versions
from tunewright.evaluation.generations import Generator
from tunewright.evaluation.measure import (
    Answered,
    EvaluateResult,
    Measurement,
    measured_arm,
    measured_contrasts,
    measured_with,
    save_evaluation,
    scored_arms,
)
from tunewright.evaluation.scoring import ScoredArms, measured_metrics
from tunewright.metrics import Scorer, metric_inputs, open_scorers, score_all
from tunewright.models.bases import Base
from tunewright.progress import Reporter, duration
from tunewright.project import Project
from tunewright.training.few import forced_below
from tunewright.training.train import train, training_inputs

BEST_PROMPTING = "best-prompting"
"""The arm that is each fold's own best prompting arm, where they are not all the same."""


@dataclass(frozen=True)
class _Done:
    """A fold that has gone its road."""

    version: DatasetVersion
    adapter: Adapter
    trained: bool
    advice: Advice
    answers: dict[str, list[Answered]]
    """Of the fold's test rows, by arm."""

    def by_role(self, control: str) -> dict[str, list[Answered]]:
        """The answers by the names that the evidence has for arms; ``control`` is this fold's best prompting arm."""
        names = {ZERO_SHOT.name: ZERO_SHOT.name, control: self.advice.best, TUNED.name: TUNED.name}
        return {role: self.answers[arm] for role, arm in names.items()}


class CrossFit:
    """The folds of a dataset version, and all that decides what comes out of them.

    Args:
        project: its recipe decides; the folds' adapters are kept in its working folder, apart from its own.
        version: the rows, of all splits.
        base: what is adapted and prompted.
        chat: how conversations become tokens.
        reporter: shows progress, hears warnings.
        folds: how many, at least 2.
        force: train on fewer pairs than are refused otherwise.

    Raises:
        UserError: too few clusters or pairs.
    """

    def __init__(
        self,
        project: Project,
        version: DatasetVersion,
        base: Base,
        chat: ChatFormat,
        reporter: Reporter,
        *,
        folds: int,
        force: bool = False,
    ) -> None:
        self.project = project
        self.recipe = project.recipe
        self.version = version
        self.base = base
        self.chat = chat
        self.reporter = reporter
        self.scorers = open_scorers(self.recipe.evaluate, project.root)
        self.versions = fold_versions(version, folds, self.recipe.seed)
        fewest = min(len(v.domain_of("train")) for v in self.versions)
        place = f" in the smallest of {folds} folds"
        self.forced = forced_below(fewest, force=force, reporter=reporter, place=place)
        # Of all rows, so that no fold cuts what another would not, and an answer of the base serves every fold.
        self.limit = answer_limit(self.recipe, chat, version.domain)
        # The folds' adapters are all trained by this recipe.
        self.quantize = self.recipe.evaluate.quantize or self.recipe.train.quantize
        self.trainings = digest([training_inputs(project, v, base, chat) for v in self.versions])

    @property
    def identity(self) -> str:
        """12 hex digits: a digest of all that decides the measurement."""
        settings = self.recipe.evaluate
        decides = {
            "trainings": self.trainings,
            "max_new_tokens": self.limit,
            "stop": stop_strings(self.recipe, self.chat),
            "quantize": self.quantize,
            "metrics": [metric_inputs(metric, self.project.root) for metric in settings.metrics],
            "margin": settings.margin,
            "schema": SCHEMA_VERSION,
            "arms": [plan.name for plan in prompting_arms(settings.shots)],
        }
        return digest(decides)[:12]

    def run(self) -> EvaluateResult:
        """Evaluate the recipe on all rows; a stopped run goes on, and what is finished is found done.

        Raises:
            UserError: whatever a training or an evaluation raises.
            KeyboardInterrupt: stopped by a signal; what was finished is kept.
        """
        folder = self.project.evaluations / self.identity
        if (folder / EVIDENCE_FILE).exists():
            return EvaluateResult(folder, load_evidence(folder), evaluated=False)
        done: list[_Done] = []
        for number in range(1, len(self.versions) + 1):
            began = time.monotonic()
            done.append(self._go(number))
            left = len(self.versions) - number
            # The first that has not been found done tells how long one takes.
            if left and done[-1].trained and not any(fold.trained for fold in done[:-1]):
                seconds = time.monotonic() - began
                self.reporter.say(f"That took {duration(seconds)}; {left} more: about {duration(left * seconds)}.")
        control = _control(done)
        answers = _in_order(self.version.domain, done, control)
        scored = scored_arms(self.scorers, self.version.domain, answers)
        evidence = self._evidence(done, control, answers, scored)
        fold_of = {m.key: n for n, v in enumerate(self.versions, start=1) for m in v.examples("test")}
        save_evaluation(folder, evidence, self.version.domain, answers, scored, fold_of)
        return EvaluateResult(folder, evidence, evaluated=True)

    def _go(self, number: int) -> _Done:
        """One fold's road."""
        version = self.versions[number - 1]
        train_rows, dev_rows, test_rows = (len(version.examples(split)) for split in SPLITS)
        self.reporter.say(
            f"Fold {number} of {len(self.versions)}: {train_rows:,} rows to train on, {dev_rows:,} to choose by, "
            f"{test_rows:,} to answer"
        )
        facts: dict[str, Any] = {
            "fold": {
                "crossfit": self.trainings[:12],
                "of": self.version.digest,
                "number": number,
                "folds": len(self.versions),
            }
        }
        if self.forced:
            facts["forced"] = self.forced
        adapters = self.project.fold_adapters
        trained = train(self.project, version, self.base, self.chat, self.reporter, adapters=adapters, facts=facts)
        # A generator for each fold: the next one trains on a copy of the base, and this one's need not lie beside it.
        generator = Generator.of(self.project, self.base, self.chat, self.quantize, self.reporter)
        measurement = Measurement(
            self.project, version, generator, self.reporter, folder=adapters.parent, limit=self.limit
        )
        advice = measurement.advise().advice
        answers = measurement.answer_test(trained.adapter, advice)
        return _Done(version, trained.adapter, trained.trained, advice, answers)

    def _evidence(
        self, done: Sequence[_Done], control: str, answers: dict[str, list[Answered]], scored: ScoredArms
    ) -> Evidence:
        members, settings = self.version.domain, self.recipe.evaluate
        return Evidence(
            id=self.identity,
            project=self.recipe.name,
            metric=self.scorers[0].name,
            metrics=measured_metrics(self.scorers),
            margin=settings.margin,
            design="cross-fitted",
            folds=tuple(_told(number, fold, control, self.scorers[0]) for number, fold in enumerate(done, start=1)),
            items=len(members),
            clusters=len({m.cluster for m in members}),
            train_items=round(sum(len(fold.version.examples("train")) for fold in done) / len(done)),
            dev_arms=[],
            best_prompting=control,
            arms=[self._arm(name, given, scored) for name, given in answers.items()],
            contrasts=measured_contrasts(scored, control, self.recipe.seed),
            lineage={
                **measured_with(self.recipe, self.base, self.chat, self.quantize, self.limit),
                "dataset": self.version.digest,
                "folds": [fold.version.digest for fold in done],
                "adapters": [{"name": fold.adapter.name, "digest": fold.adapter.digest} for fold in done],
                "recipe": self.recipe.model_dump(mode="json"),
                "forced": self.forced,
            },
        )

    def _arm(self, name: str, answers: Sequence[Answered], scored: ScoredArms) -> Arm:
        plan = next((p for p in [*prompting_arms(self.recipe.evaluate.shots), TUNED] if p.name == name), None)
        kind: ArmKind = "mixed" if plan is None else plan.kind
        shots = 0 if plan is None else plan.shots
        return measured_arm(name, kind, shots, answers, scored, self.recipe.seed)


def _control(done: Sequence[_Done]) -> str:
    """What the evidence calls the prompting arm that tuned has to beat."""
    chosen = {fold.advice.best for fold in done}
    return chosen.pop() if len(chosen) == 1 else BEST_PROMPTING


def _in_order(members: Sequence[Member], done: Sequence[_Done], control: str) -> dict[str, list[Answered]]:
    """The folds' answers together, in the members' order."""
    given: dict[str, dict[str, Answered]] = defaultdict(dict)
    for fold in done:
        for role, answers in fold.by_role(control).items():
            given[role] |= {m.key: a for m, a in zip(fold.version.examples("test"), answers, strict=True)}
    return {role: [by_key[m.key] for m in members] for role, by_key in given.items()}


def _told(number: int, fold: _Done, control: str, scorer: Scorer) -> Fold:
    test = fold.version.examples("test")
    scores = {
        role: score_all(scorer, [a.text for a in answers], [m.example for m in test])
        for role, answers in fold.by_role(control).items()
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


def out_of_fold(
    project: Project, version: DatasetVersion, base: Base, chat: ChatFormat
) -> list[tuple[Adapter, list[Member]]]:
    """Each fold's adapter with the rows that it was kept from, of the newest complete cross-fit of this version.

    Empty where there is none that belongs to this base and chat format.
    """
    runs: dict[str, dict[int, Adapter]] = defaultdict(dict)
    for adapter in list_adapters(project.fold_adapters):
        lineage = adapter.lineage
        fits = (lineage["base"]["digest"], lineage["template_digest"]) == (base.digest, chat.digest)
        if fits and lineage["fold"]["of"] == version.digest:
            runs[lineage["fold"]["crossfit"]][lineage["fold"]["number"]] = adapter
    complete = [run for run in runs.values() if len(run) == run[min(run)].lineage["fold"]["folds"]]
    if not complete:
        return []
    newest = max(complete, key=lambda run: max(str(a.lineage["created"]) for a in run.values()))
    lineage = newest[1].lineage
    versions = fold_versions(version, lineage["fold"]["folds"], lineage["seed"])
    pairs = [(newest[number], fold) for number, fold in enumerate(versions, start=1)]
    # An earlier release may have dealt the rows otherwise: then it is not known here who saw what.
    if any(adapter.lineage["dataset"]["digest"] != fold.digest for adapter, fold in pairs):
        return []
    for adapter, _ in pairs:
        adapter.verify()
    return [(adapter, fold.examples("test")) for adapter, fold in pairs]
