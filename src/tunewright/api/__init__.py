"""Verbs as methods of :class:`Project`, called by the command line and from Python."""

from __future__ import annotations

from tunewright import pipeline
from tunewright.adapters import verbs
from tunewright.adapters.keys import TrustedKeys
from tunewright.advisor import advice
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter, PrintReporter, Reporter, log
from tunewright.data import browse, preview, remote, remove, verify
from tunewright.evaluation import data_verbs, stored
from tunewright.evaluation import verbs as measuring
from tunewright.evaluation.training_runs import TrainingRuns
from tunewright.evaluation.verbs import current_split_power
from tunewright.export import verbs as exports
from tunewright.open_project import OpenProject
from tunewright.pipeline import RunResult as RunResult  # users import it from here
from tunewright.report import verbs as reports
from tunewright.serving import releases as release_verbs
from tunewright.serving import serve, shadow_judge, shadow_plan, shadow_review
from tunewright.synthesis import verbs as synthesis
from tunewright.training import memory


class ProjectGroup(OpenProject):
    """The same open project with other verbs: ``tunewright data add`` is ``project.data.add``."""

    def __init__(self, project: OpenProject) -> None:
        self.__dict__ = project.__dict__  # a base that one group loads is loaded for all groups


class ProjectAdapters(ProjectGroup):
    """Verbs on a project's adapters."""

    import_ = verbs.import_
    list = verbs.list_all
    push = verbs.push
    show = stored.show_adapter
    sign = verbs.sign
    verify = verbs.verify


class ProjectData(ProjectGroup):
    """Verbs on a project's data."""

    blame = browse.blame
    checkout = browse.checkout
    cluster_counts = browse.cluster_counts
    diff = browse.diff
    export = browse.export
    fix_file = preview.fix_file
    leakage = browse.leakage
    log = browse.log
    metadata = browse.metadata
    numbers = browse.numbers
    preview_file = preview.preview_file
    pull = remote.pull
    push = remote.push
    remove = remove.remove
    sheets = preview.sheets
    show = browse.show
    trained_by = browse.trained_by
    verify = verify.verify
    version = browse.version

    add = data_verbs.add
    check = data_verbs.check
    check_files = data_verbs.check_files
    contamination = data_verbs.contamination
    exact_match_misleads = data_verbs.exact_match_misleads
    scores_by_distance = data_verbs.scores_by_distance
    scores_by_template = data_verbs.scores_by_template
    split_power = current_split_power

    apply_reviews = data_verbs.apply_reviews
    export_reviews = data_verbs.export_reviews
    import_reviews = data_verbs.import_reviews
    review = data_verbs.review
    review_status = data_verbs.review_status
    stored_suspects = data_verbs.stored_suspects
    suspects = data_verbs.find_suspects

    estimate_from_documents = synthesis.estimate_from_documents
    estimate_generate = synthesis.estimate_generate
    from_documents = synthesis.from_documents
    generate = synthesis.generate
    generated_effect = synthesis.generated_effect


class ProjectExport(ProjectGroup):
    """Verbs that export a project's adapters for other engines."""

    compressed = exports.compressed
    gguf = exports.gguf
    hub = exports.hub
    merge = exports.merge
    ollama = exports.ollama


class ProjectShadow(ProjectGroup):
    """Verbs on an alias's shadows."""

    estimate_judge = shadow_judge.estimate_judge
    judge = shadow_judge.judge
    plan = shadow_plan.plan
    review = shadow_review.review
    show = release_verbs.shadow
    status = shadow_review.status


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

    crossval = measuring.crossval
    curve = reports.curve
    estimate_memory = memory.estimate_memory
    sweep = measuring.sweep
    train = measuring.train

    advise = advice.advise
    detectable_effects = measuring.detectable_effects
    estimate_evaluation = measuring.estimate_evaluation
    estimate_incumbents = measuring.estimate_incumbents
    estimate_optimize_prompt = measuring.estimate_optimize_prompt
    evaluate = measuring.evaluate
    optimize_prompt = measuring.optimize_prompt
    prompting = measuring.prompting
    regressions = measuring.regressions

    self_test = serve.self_test
    serve_engine = serve.serve_engine
    state = serve.open_state
    serve = serve.serve

    run = pipeline.run

    deploy = release_verbs.deploy
    promote = release_verbs.promote
    releasable = release_verbs.releasable
    releases = release_verbs.releases
    rollback = release_verbs.rollback
    undeploy = release_verbs.undeploy

    def __init__(self, folder: ProjectFolder, reporter: Reporter | None = None) -> None:
        super().__init__(folder, reporter or (LogReporter() if log.hasHandlers() else PrintReporter()))

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
    def shadow(self) -> ProjectShadow:
        """Verbs on an alias's shadows."""
        return ProjectShadow(self)

    @property
    def keys(self) -> TrustedKeys:
        """The keys whose signatures of adapters the project trusts, or has revoked."""
        return TrustedKeys(self.folder.keys)

    @property
    def runs(self) -> TrainingRuns:
        """The project's training runs."""
        return TrainingRuns(self.folder)
