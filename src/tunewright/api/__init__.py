"""The pipeline as methods of :class:`Project`, called by the command line and from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.adapters.signing import store_signer
from tunewright.adapters.vllm_compat import require_servable
from tunewright.api import evaluations, isolation
from tunewright.api import releases as release_verbs
from tunewright.api.context import ProjectContext
from tunewright.api.data import ProjectData
from tunewright.api.deprecated import DeprecatedGroup
from tunewright.api.export import ProjectExport
from tunewright.api.groups import ProjectAdapters, ProjectKeys
from tunewright.config import TrainConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter, Reporter
from tunewright.core.workers import ModelWorkers
from tunewright.data.add import AddResult
from tunewright.data.readers.hub import is_hub_name
from tunewright.evaluation.training_runs import TrainingRuns
from tunewright.evidence.causes import undertrained
from tunewright.evidence.power import DetectableEffects, detectable_effects, detectable_effects_text
from tunewright.evidence.schema import Advice
from tunewright.evidence.split_power import require_significance, split_power_text
from tunewright.evidence.verdict import Verdict
from tunewright.metrics import metric_kind
from tunewright.models.quantized import require_bitsandbytes
from tunewright.serving import serve
from tunewright.training import memory
from tunewright.training.trackers import require_trackers

if TYPE_CHECKING:
    from tunewright.adapters.private_keys import PrivateKey
    from tunewright.advisor.result import AdviceResult
    from tunewright.evaluation.arm_runner import ArmRunner
    from tunewright.evaluation.benchmarks.runner import BenchmarkResult
    from tunewright.evaluation.frozen_answers import IncumbentEstimate
    from tunewright.evaluation.learning_curve import CurveResult
    from tunewright.evaluation.prompt_optimization.run import (
        OptimizePromptEstimate,
        OptimizePromptResult,
        PromptOptimization,
    )
    from tunewright.evaluation.prompt_search import AdviseResult
    from tunewright.evaluation.runner import EvaluateResult
    from tunewright.evaluation.workload import AnswersEstimate
    from tunewright.training.sweep.sweep import SweepResult
    from tunewright.training.train import TrainResult

CURVE_PLOT = "curve.svg"
SEEDS = 3
"""Seeds of a learning curve: fewer cannot separate training noise from the effect of more rows."""
FOLDS = 5
"""Folds of a cross-validation: each adapter trains on four fifths of the rows, minus its dev rows."""


@dataclass(frozen=True)
class RunResult:
    """Results of the whole pipeline."""

    added: AddResult
    advised: AdviseResult
    trained: TrainResult
    evaluated: EvaluateResult
    verdict: Verdict
    report: Path


class Project(ProjectContext):
    """An open project, with a method for each command.

    Command groups are attributes: ``tunewright data add`` is ``project.data.add``. A function of a project that is
    assigned here is a method: ``verdict(project)`` is ``project.verdict()``.
    """

    access_log = evaluations.access_log
    estimate_judge = evaluations.estimate_judge
    evaluation = evaluations.evaluation_folder
    evidence = evaluations.evidence
    human_eval = evaluations.human_eval
    human_eval_progress = evaluations.human_eval_progress
    human_eval_results = evaluations.human_eval_results
    item_prompts = evaluations.item_prompts
    judge = evaluations.judge
    judged_items = evaluations.judged_items
    keep_preferences = evaluations.keep_preferences
    report = evaluations.report
    row_answers = evaluations.row_answers
    verdict = evaluations.verdict
    verdict_markdown = evaluations.verdict_markdown

    estimate_memory = memory.estimate_memory
    self_test = isolation.self_test
    serve = serve.serve

    deploy = release_verbs.deploy
    promote = release_verbs.promote
    releasable = release_verbs.releasable
    releases = release_verbs.releases
    rollback = release_verbs.rollback
    shadow = release_verbs.shadow
    undeploy = release_verbs.undeploy

    def __init__(self, folder: ProjectFolder, reporter: Reporter | None = None) -> None:
        super().__init__(folder, reporter or LogReporter())

    @property
    def data(self) -> ProjectData:
        """Verbs on the project's data."""
        return ProjectData(self)

    @property
    def adapters(self) -> ProjectAdapters:
        """Verbs on the project's adapters."""
        return ProjectAdapters(self)

    @property
    def export(self) -> ProjectExport:
        """Verbs that export an adapter."""
        return ProjectExport(self)

    @property
    def keys(self) -> ProjectKeys:
        """Verbs on the keys that sign adapters."""
        return ProjectKeys(self)

    @property
    def runs(self) -> TrainingRuns:
        """The project's training runs."""
        return TrainingRuns(self.folder)

    @property
    def engine(self) -> DeprecatedGroup:
        """Deprecated."""
        return DeprecatedGroup(self, "engine")

    @property
    def tenant(self) -> DeprecatedGroup:
        """Deprecated: use :meth:`state`."""
        return DeprecatedGroup(self, "tenant")

    @property
    def audit(self) -> DeprecatedGroup:
        """Deprecated: use :meth:`state`."""
        return DeprecatedGroup(self, "audit")

    def run(
        self,
        *,
        force: bool = False,
        stage_done: Callable[[str, bool, str], None] | None = None,
        prompting_done: Callable[[Advice], None] = lambda _advice: None,
    ) -> RunResult:
        """Run the whole pipeline, skipping stages whose inputs have not changed.

        Args:
            force: warn, instead of refusing, if the test split has too few clusters for any verdict. Also as in
                :meth:`train`.
            stage_done: called with each finished stage's name, True if anything was computed, and its result in words
                (None: the reporter reports it).
            prompting_done: called with the scores of the prompting arms on dev once they have been measured, long
                before the whole result.
        """
        from tunewright.evaluation.incumbents import require_ready

        done = stage_done or self._say_stage
        sources = self.folder.config.data.sources
        require_trackers(self.folder.config.train.report_to)
        if not sources:
            raise UserError(
                "The config lists no sources of pairs",
                where="data.sources",
                fix="List your files, such as sources: [pairs.jsonl]",
            )
        added = self.data.add([source if is_hub_name(source) else self.folder.root / source for source in sources])
        done("data", added.created, f"version {added.version.digest[:12]}")
        require_significance(self.data.split_power(), force=force, reporter=self.reporter)
        self._refuse_up_front()
        require_ready(self.folder, self.data.version(), self._asked_splits("test"), self.reporter)
        forced = self._forced(force)
        signer = None
        if not self._has_trained():
            self._check_cluster()
            signer = store_signer(self.folder.keys, self.reporter)
        advised = self.prompting()
        if advised.measured:
            prompting_done(advised.advice)
        done("advise", advised.measured, f"best prompting arm on dev: {advised.advice.best}")
        trained = self._train(forced, signer)
        done("train", trained.trained, trained.adapter.name)
        evaluated = self.evaluate(trained.adapter.name)
        done("evaluate", evaluated.evaluated, f"evidence {evaluated.evidence.id}")
        decision = self.verdict(evaluated.folder)
        report = self.report(evaluated.folder)
        return RunResult(added, advised, trained, evaluated, decision, report)

    def _say_stage(self, name: str, computed: bool, what: str) -> None:
        self.reporter.say(f"{name}: {'done' if computed else 'unchanged'}, {what}")

    def detectable_effects(self) -> tuple[DetectableEffects, ...]:
        """Return the smallest difference that the current dev and test splits can show."""
        version = self.data.version()
        held_out = {split: version.examples(split) for split in ("dev", "test")}
        return tuple(
            detectable_effects(split, len(rows), len({row.cluster for row in rows}))
            for split, rows in held_out.items()
            if rows
        )

    def _report_detectable_effects(self) -> None:
        settings = self.folder.config.evaluate
        for expected in self.detectable_effects():
            self.reporter.say(detectable_effects_text(expected, metric_kind(settings.metric), settings.margin))

    def prompting(self) -> AdviseResult:
        """Measure the prompting arms on dev and choose the best one, the baseline of a fine-tune."""
        from tunewright.evaluation.prompt_search import advise
        from tunewright.evaluation.workload import Workload

        self._report_detectable_effects()
        with self.model_workers() as workers:
            arm_runner = self.arm_runner(workers=workers)
            return advise(arm_runner, Workload(arm_runner).announce)

    def optimize_prompt(self) -> OptimizePromptResult:
        """Search for a better instruction with GEPA and the config's reflection model, and choose on dev.

        Later commands measure the result as further arms, as long as the dataset version, base, template and metric
        stay the same. Replies and answers are kept, so a stopped call resumes and pays for nothing twice.

        Raises:
            UserError: no reflection model or GEPA, too few training rows, or the endpoint fails.
        """
        return self._prompt_optimization().run()

    def estimate_optimize_prompt(self) -> OptimizePromptEstimate:
        """Return upper limits of the calls, tokens and cost of :meth:`optimize_prompt` without sending anything."""
        return self._prompt_optimization().estimate()

    def _prompt_optimization(self) -> PromptOptimization:
        from tunewright.evaluation.prompt_optimization.run import PromptOptimization, reflection_endpoint

        reflection_endpoint(self.folder.config)  # refused before a base is loaded
        return PromptOptimization(self.arm_runner())

    def advise(
        self, stored: str | Path | None = None, *, pilot: bool = True, minutes: float | None = None
    ) -> AdviceResult:
        """Advise to prompt, retrieve or fine-tune, or can't tell, from three signals and a pilot on dev.

        Args:
            stored: earlier advice (ID or file) to decide from again, without measuring.
            pilot: train a pilot adapter on a part of the training rows. Without it the gain of training is unknown.
            minutes: time limit for answers; prompting arms that do not fit are left out by name (None: no limit).

        Raises:
            UserError: no such advice, too few minutes, or arms that cannot be measured.
        """
        from tunewright.advisor.signals import find_advice, load_signals
        from tunewright.evaluation.access_log import AccessLog

        if stored is not None:
            from tunewright.advisor.result import AdviceResult

            file = find_advice(self.folder.advice, stored)
            if self.folder.advice.absolute() in file.absolute().parents:
                AccessLog(self.folder.evaluations).require(file)
            return AdviceResult(file, load_signals(file), measured=False)
        from tunewright.advisor.adviser import Adviser

        if pilot:
            self._refuse_up_front("A pilot")
        self._report_detectable_effects()
        with self.trainings() if pilot else nullcontext() as pilots:
            return Adviser(self.arm_runner, pilots=pilots, minutes=minutes).advise()

    def train(self, *, force: bool = False) -> TrainResult:
        """Train the config's adapter on the current version, or return the one already trained.

        Fewer than 50 training pairs are refused. ``force`` trains anyway, and the lineage records it.
        """
        power = self.data.split_power()
        if not power.significant:
            self.reporter.warn(split_power_text(power))
        self._refuse_up_front()
        forced = self._forced(force)
        self._report_detectable_effects()
        return self._train(forced)

    def sweep(
        self,
        *,
        minutes: float | None = None,
        rates: Sequence[float] | None = None,
        write: bool = False,
        force: bool = False,
    ) -> tuple[SweepResult, dict[str, Any]]:
        """Try presets and learning rates by successive halving on dev, and finish training the winner.

        Args:
            minutes: budget of the whole sweep, including earlier runs in its ledger (None: no limit). On a cluster it
                counts the time of all trials together.
            rates: learning rates (None: three suited to the base's size, one of them the config's own).
            write: write the winner's values to tunewright.yaml.
            force: as in :meth:`train`.

        Returns:
            The result, and the keys of the train section that were written.

        Raises:
            UserError: the budget is not positive or is too small for one trial, or a learning rate is invalid.
        """
        from tunewright.config.edit import write_section
        from tunewright.config.project import CONFIG_FILE
        from tunewright.training.sweep.sweep import Sweep

        if minutes is not None and not minutes > 0:
            raise UserError(f"Must be greater than 0 (got {minutes:g})", where="--minutes")
        self._refuse_up_front("A sweep")
        version, chat = self.data.version(), self.chat
        with self.trainings() as trainings:
            sweep = Sweep(self.folder, version, self.base, chat, self.reporter, trainings, rates=rates, force=force)
            result = sweep.run(minutes)
        written: dict[str, Any] = {}
        if write and result.winner is not None:
            written = write_section(self.folder.root / CONFIG_FILE, result.winner.train)
            if not written:
                self.reporter.say("tunewright.yaml already has the winner's values.")
        elif write:
            self.reporter.warn("tunewright.yaml is unchanged: the sweep has no winner.")
        return result, written

    def curve(self, *, seeds: int = SEEDS, force: bool = False) -> CurveResult:
        """Train on parts of the training rows with several seeds, to predict on dev if more rows would help.

        The plot is saved next to the result as curve.svg. ``force`` as in :meth:`train`.
        """
        from tunewright.core.io import write_text
        from tunewright.evaluation.learning_curve import LearningCurve
        from tunewright.render.plots import lines_file
        from tunewright.report.sections.learning_curve import lines

        if seeds < 2:
            raise UserError(f"Must be at least 2 (got {seeds}): one seed cannot show the noise", where="--seeds")
        self._refuse_up_front("A learning curve")
        version, chat = self.data.version(), self.chat
        with self.trainings() as trainings:
            curve = LearningCurve(
                self.folder, version, self.base, chat, self.reporter, trainings, seeds=seeds, force=force
            )
            result = curve.run()
        write_text(result.folder / CURVE_PLOT, lines_file(lines(result.curve)))
        return result

    def evaluate(self, adapter: str | None = None, *, minutes: float | None = None) -> EvaluateResult:
        """Compare an adapter (the newest by default) with zero-shot and the best prompting arm on the test split.

        The access to the test split is logged first. Existing evidence is read again, not measured. The benchmarks of
        the config's regressions section are measured too.

        Args:
            adapter: a name or its beginning (None: the newest).
            minutes: time limit for answers; arms that do not fit are left out by name (None: no limit).

        Raises:
            UserError: the access log was changed, or too few minutes.
        """
        from tunewright.evaluation.benchmarks.runner import evaluate_with_benchmarks, open_suites

        # Faults in a benchmark's file are reported before anything is measured.
        suites = open_suites(self.folder) if self.folder.config.regressions.measures else []
        tuned = find_adapter(self.folder.adapters, adapter)
        with self.model_workers() as workers:
            return evaluate_with_benchmarks(*self._contest(tuned, "test", minutes, workers), suites)

    def evaluate_on_dev(self, adapter: str | None = None, *, minutes: float | None = None) -> EvaluateResult:
        """Compare as :meth:`evaluate` does, on the dev split that chose the adapter and the prompting arm."""
        from tunewright.evaluation.runner import evaluate_on_dev

        tuned = find_adapter(self.folder.adapters, adapter)
        with self.model_workers() as workers:
            return evaluate_on_dev(*self._contest(tuned, "dev", minutes, workers))

    def estimate_evaluation(
        self, adapter: str | None = None, *, dev: bool = False, embed: bool = True
    ) -> AnswersEstimate:
        """Return the number of answers that :meth:`evaluate` has to compute; none is computed.

        Args:
            adapter: a name or its beginning (None: the newest).
            dev: estimate :meth:`evaluate_on_dev` instead.
            embed: compute vectors of dense retrieval that are not kept. Otherwise no model is loaded.

        Raises:
            UserError: no adapter, or one that does not fit; also without ``embed`` if vectors have to be computed.
        """
        from tunewright.evaluation.workload import Contest, Workload

        tuned = find_adapter(self.folder.adapters, adapter)
        with self.model_workers() as workers:
            arm_runner = self.arm_runner(tuned, workers)
            arm_runner.embeddings.kept_only = not embed
            return Workload(arm_runner, Contest(tuned, "dev" if dev else "test")).estimate()

    def estimate_incumbents(self, *, dev: bool = False) -> list[IncumbentEstimate]:
        """Return the calls, tokens and cost of the incumbents' answers in :meth:`evaluate`, without sending anything.

        Args:
            dev: estimate :meth:`evaluate_on_dev` instead, which leaves the test split closed.

        Raises:
            UserError: no incumbent, or a file of frozen answers was changed.
        """
        from tunewright.evaluation.incumbents import estimate_incumbents

        if not self.folder.config.evaluate.incumbents:
            raise UserError(
                "The config has no incumbents",
                where="evaluate.incumbents",
                fix="Set name, base_url and model of a model that you use today.",
            )
        version = self.data.version()
        return estimate_incumbents(self.folder, version, self._asked_splits("dev" if dev else "test"), self.reporter)

    @staticmethod
    def _asked_splits(split: Literal["test", "dev"]) -> list[Literal["test", "dev"]]:
        """Return the splits that incumbents answer; dev comes first, so that a wrong setting shows before test."""
        return ["dev"] if split == "dev" else ["dev", "test"]

    def _contest(
        self,
        tuned: Adapter,
        split: Literal["test", "dev"],
        minutes: float | None,
        workers: ModelWorkers | None,
    ) -> tuple[ArmRunner, Adapter, Advice]:
        """Return the arm runner, the adapter and the advice that names its best prompting arm."""
        from tunewright.evaluation.incumbents import require_ready
        from tunewright.evaluation.prompt_search import advise
        from tunewright.evaluation.workload import Contest, Workload, limit_time

        arm_runner = self.arm_runner(tuned, workers)
        require_ready(self.folder, arm_runner.version, self._asked_splits(split), self.reporter)
        contest = Contest(tuned, split)
        limit_time(arm_runner, minutes, contest=contest)
        # Keys added since the adapter was trained had the effect of their defaults.
        trained_by = TrainConfig().model_dump(mode="json") | tuned.lineage.get("config", {}).get("train", {})
        settings = self.folder.config.train
        now = {**settings.deciding(), "method": settings.method}
        if "config" in tuned.lineage and any(trained_by[key] != value for key, value in now.items()):
            self.reporter.warn(
                f"The config's train section has changed since {tuned.name} was trained. `tunewright train` trains an "
                "adapter with the new values."
            )
        return arm_runner, tuned, advise(arm_runner, Workload(arm_runner, contest).announce).advice

    def regressions(self, adapter: str | None = None) -> BenchmarkResult:
        """Measure the benchmarks of the config's regressions section with an adapter off and on.

        The result is added to the adapter's evidence, if it has any.

        Raises:
            UserError: no benchmark, an unreadable file, or no adapter that fits.
        """
        from tunewright.evaluation.benchmarks.runner import measure_benchmarks, open_suites

        suites = open_suites(self.folder)
        tuned = find_adapter(self.folder.adapters, adapter)
        with self.model_workers() as workers:
            return measure_benchmarks(self.arm_runner(tuned, workers), tuned, suites)

    def crossval(self, *, folds: int = FOLDS, force: bool = False) -> EvaluateResult:
        """Cross-validate the config on all rows of the current version, for sets too small to hold out a test.

        ``force`` as in :meth:`train`.
        """
        from tunewright.evaluation.crossval import CrossValidation

        if folds < 2:
            raise UserError(f"Must be at least 2 (got {folds})", where="--folds", fix="Five are usual.")
        self._refuse_up_front("Cross-validation")
        version, chat = self.data.version(), self.chat
        with self.trainings() as trainings:
            return CrossValidation(
                self.folder, version, self.base, chat, self.reporter, trainings, folds=folds, force=force
            ).run()

    def _refuse_up_front(self, new_adapters_of: str | None = None) -> None:
        """Refuse a config that cannot be trained, before a base is downloaded or anything measured.

        Args:
            new_adapters_of: the name of a command that trains new adapters on parts of the rows.
        """
        settings = self.folder.config.train
        if new_adapters_of is not None:
            from tunewright.training.parent import require_new_adapter

            require_new_adapter(settings, new_adapters_of)
        require_servable(settings)
        require_bitsandbytes(settings.quantization, "train.quantization")
        if self.folder.config.compute.cluster is None:  # else other machines train
            memory.require_room(self)

    def _forced(self, force: bool) -> str | None:
        from tunewright.training.rows import require_min_examples

        return require_min_examples(len(self.data.version().domain_of("train")), force=force, reporter=self.reporter)

    def _has_trained(self) -> bool:
        """Return whether the adapter of the config and the current version is there already."""
        from tunewright.core.io import digest
        from tunewright.training.train import find_trained, training_inputs

        inputs = training_inputs(self.folder, self.data.version(), self.base, self.chat)
        return find_trained(self.folder.adapters, self.folder.config.name, digest(inputs)) is not None

    def _check_cluster(self) -> None:
        """Check before other work that ``compute.cluster`` can train, if it is set."""
        if self.folder.config.compute.cluster is not None:
            from tunewright.training.on_cluster import check_cluster

            check_cluster(self.folder, self.base, self.reporter)

    def _train(self, forced: str | None, signer: PrivateKey | None = None) -> TrainResult:
        facts = {"forced": forced} if forced else {}
        inputs = self.folder, self.data.version(), self.base, self.chat, self.reporter
        if self.folder.config.compute.cluster is not None:
            from tunewright.training.on_cluster import train_on_cluster

            result = train_on_cluster(*inputs, facts=facts, signer=signer)
        elif self.folder.config.compute.fsdp:
            fix = "Set compute.cluster, or remove it: without a cluster a launcher asks for FSDP."
            raise UserError("FSDP needs a cluster", where="compute.fsdp", fix=fix)
        else:
            from tunewright.training.train import train

            result = train(*inputs, facts=facts, signer=signer)
        if short := undertrained(result.adapter.lineage, result.adapter.history):
            self.reporter.warn(f"{short.what} ({short.evidence}). {short.next_command}.")
        return result
