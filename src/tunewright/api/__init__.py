"""The pipeline as methods of :class:`Project`, called by the command line and from Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.signing import store_signer
from tunewright.advisor import advise
from tunewright.api.deprecated import DeprecatedGroup, keywords
from tunewright.api.groups import ProjectAdapters, ProjectData, ProjectExport
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter, Reporter
from tunewright.data.add import AddResult
from tunewright.data.readers.hub import is_hub_name
from tunewright.evaluation import stored, tuning
from tunewright.evaluation import verbs as measuring
from tunewright.evaluation.training_runs import TrainingRuns
from tunewright.evidence.schema import Advice
from tunewright.evidence.split_power import require_significance
from tunewright.evidence.verdict import Verdict
from tunewright.open_project import OpenProject
from tunewright.report import curve
from tunewright.report import verbs as reports
from tunewright.serving import project_state, release_gate, serve
from tunewright.serving import releases as release_verbs
from tunewright.serving.options import DeployOptions, EngineOptions, ReleaseTestOptions, ServeOptions
from tunewright.training import memory
from tunewright.training.memory_options import MemoryOptions
from tunewright.training.trackers import require_trackers

if TYPE_CHECKING:
    from tunewright.evaluation.prompt_search import AdviseResult
    from tunewright.evaluation.runner import EvaluateResult
    from tunewright.training.train import TrainResult


@dataclass(frozen=True)
class RunResult:
    """Results of the whole pipeline."""

    added: AddResult
    advised: AdviseResult
    trained: TrainResult
    evaluated: EvaluateResult
    verdict: Verdict
    report: Path


class Project(OpenProject):
    """An open project, with a method for each command.

    Command groups are attributes: ``tunewright data add`` is ``project.data.add``. A function of a project that is
    assigned here is a method: ``verdict(project)`` is ``project.verdict()``.
    """

    access_log = stored.access_log
    estimate_judge = stored.estimate_judge
    evaluation = stored.evaluation_folder
    evidence = stored.evidence
    human_eval = stored.human_eval
    human_eval_progress = stored.human_eval_progress
    human_eval_results = stored.human_eval_results
    item_prompts = stored.item_prompts
    judge = stored.judge
    judged_items = stored.judged_items
    keep_preferences = stored.keep_preferences
    report = reports.report
    row_answers = stored.row_answers
    verdict = reports.verdict
    verdict_markdown = reports.verdict_markdown

    crossval = tuning.crossval
    curve = curve.curve
    estimate_memory = keywords(memory.estimate_memory, MemoryOptions)
    sweep = tuning.sweep
    train = tuning.train

    advise = advise.advise
    detectable_effects = measuring.detectable_effects
    estimate_evaluation = measuring.estimate_evaluation
    estimate_incumbents = measuring.estimate_incumbents
    estimate_optimize_prompt = measuring.estimate_optimize_prompt
    evaluate = measuring.evaluate
    evaluate_on_dev = measuring.evaluate_on_dev
    optimize_prompt = measuring.optimize_prompt
    prompting = measuring.prompting
    regressions = measuring.regressions

    self_test = keywords(release_gate.self_test, ServeOptions)
    serve_engine = keywords(serve.serve_engine, EngineOptions)
    serve = keywords(serve.serve, ServeOptions)
    state = project_state.open_state

    deploy = keywords(release_verbs.deploy, DeployOptions)
    promote = keywords(release_verbs.promote, ReleaseTestOptions)
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
    def keys(self) -> TrustedKeys:
        """The keys whose signatures of adapters the project trusts, or has revoked."""
        return TrustedKeys(self.folder.keys)

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
        tuning.refuse_up_front(self)
        require_ready(self.folder, self.data.version(), measuring.asked_splits("test"), self.reporter)
        forced = tuning.require_rows(self, force=force)
        signer = None
        if not tuning.has_trained(self):
            tuning.check_trainable(self)
            signer = store_signer(self.folder.keys, self.reporter)
        advised = self.prompting()
        if advised.measured:
            prompting_done(advised.advice)
        done("advise", advised.measured, f"best prompting arm on dev: {advised.advice.best}")
        trained = tuning.train_adapter(self, forced, signer)
        done("train", trained.trained, trained.adapter.name)
        evaluated = self.evaluate(trained.adapter.name)
        done("evaluate", evaluated.evaluated, f"evidence {evaluated.evidence.id}")
        decision = self.verdict(evaluated.folder)
        report = self.report(evaluated.folder)
        return RunResult(added, advised, trained, evaluated, decision, report)

    def _say_stage(self, name: str, computed: bool, what: str) -> None:
        self.reporter.say(f"{name}: {'done' if computed else 'unchanged'}, {what}")
