"""Verbs as methods of :class:`Project`, called by the command line and from Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial, wraps
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar, cast

from tunewright import pipeline
from tunewright.adapters import verbs
from tunewright.adapters.foreign import ImportOptions
from tunewright.adapters.keys import TrustedKeys
from tunewright.advisor import advice
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter, PrintReporter, Reporter, log
from tunewright.data import browse, preview, remote, remove, verify
from tunewright.data.options import RemoveOptions, ReviewOptions
from tunewright.engines import environment
from tunewright.evaluation import data_verbs, stored
from tunewright.evaluation import verbs as measuring
from tunewright.evaluation.training_runs import TrainingRuns
from tunewright.evaluation.verbs import current_split_power
from tunewright.export import CompressedOptions, GgufOptions, HubOptions, OllamaOptions
from tunewright.export import verbs as exports
from tunewright.open_project import OpenProject
from tunewright.pipeline import RunResult as RunResult  # users import it from here
from tunewright.report import verbs as reports
from tunewright.serving import releases as release_verbs
from tunewright.serving import serve
from tunewright.serving.options import DeployOptions, ReleaseTestOptions, ServeOptions
from tunewright.synthesis import verbs as synthesis
from tunewright.training import memory
from tunewright.training.options import MemoryOptions, SweepOptions

if TYPE_CHECKING:
    from tunewright.evaluation.runner import EvaluateResult

Verb = TypeVar("Verb", bound=Callable[..., Any])


def keywords(function: Verb, options: type[Any]) -> Verb:
    """Return a verb that also takes the fields of its options as keywords, with a warning."""
    names = {each.name for each in fields(options)}

    @wraps(function)
    def verb(*given: Any, **named: Any) -> Any:
        if old := {name: named.pop(name) for name in names & named.keys()}:
            if isinstance(old.get("suspects"), Sequence):  # `review` takes a list as `known_suspects` now
                named["known_suspects"], old["suspects"] = old["suspects"], True
            instead = f"{options.__name__}({', '.join(f'{name}={value!r}' for name, value in old.items())})"
            warnings.warn(f"Pass {instead} to {function.__name__}().", DeprecationWarning, stacklevel=2)
            named["options"] = options(**old)
        return function(*given, **named)

    return cast("Verb", verb)


class ProjectGroup(OpenProject):
    """The same open project with other verbs: ``tunewright data add`` is ``project.data.add``."""

    def __init__(self, project: OpenProject) -> None:
        self.__dict__ = project.__dict__  # a base that one group loads is loaded for all groups


class ProjectAdapters(ProjectGroup):
    """Verbs on a project's adapters."""

    import_ = keywords(verbs.import_, ImportOptions)
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
    preview_file = preview.preview_file
    pull = remote.pull
    push = remote.push
    remove = keywords(remove.remove, RemoveOptions)
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
    review = keywords(data_verbs.review, ReviewOptions)
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

    compressed = keywords(exports.compressed, CompressedOptions)
    gguf = keywords(exports.gguf, GgufOptions)
    hub = keywords(exports.hub, HubOptions)
    merge = exports.merge
    ollama = keywords(exports.ollama, OllamaOptions)


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
    estimate_memory = keywords(memory.estimate_memory, MemoryOptions)
    sweep = keywords(measuring.sweep, SweepOptions)
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

    self_test = keywords(serve.self_test, ServeOptions)
    serve_engine = serve.serve_engine
    state = serve.open_state
    serve = keywords(serve.serve, ServeOptions)

    run = pipeline.run

    deploy = keywords(release_verbs.deploy, DeployOptions)
    promote = keywords(release_verbs.promote, ReleaseTestOptions)
    releasable = release_verbs.releasable
    releases = release_verbs.releases
    rollback = release_verbs.rollback
    shadow = release_verbs.shadow
    undeploy = release_verbs.undeploy

    def __init__(self, folder: ProjectFolder, reporter: Reporter | None = None) -> None:
        super().__init__(folder, reporter or (LogReporter() if log.hasHandlers() else PrintReporter()))

    def evaluate_on_dev(self, adapter: str | None = None, *, minutes: float | None = None) -> EvaluateResult:
        """Deprecated: use :meth:`evaluate` with ``dev=True``."""
        what = "project.evaluate_on_dev() is deprecated: use evaluate(dev=True)."
        warnings.warn(what, DeprecationWarning, stacklevel=2)
        return self.evaluate(adapter, dev=True, minutes=minutes)

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


# Python names of earlier versions, which still work and name what replaced them

_IN_STATE = {
    "tenant": {
        "add": "tenants.add",
        "list": "tenants.list",
        "grant": "tenants.grant",
        "revoke": "tenants.revoke",
        "disable": "tenants.disable",
        "limit": "tenants.limit",
        "get": "tenants.get",
        "usage": "usage.sums",
        "usage_by_day": "usage.by_day",
        "requests": "usage.lines",
        "prune_usage": "usage_rollup.roll_up",
    },
    "tenant.key": {"add": "keys.create", "rotate": "keys.rotate", "revoke": "keys.revoke", "list": "keys.list"},
    "audit": {"show": "audit.lines", "verify": "verify"},
}
"""Methods by group, and the service's method in ``Project.state()`` that each of them calls."""


class DeprecatedGroup:
    """A group of methods on a project, each of which warns and calls its replacement."""

    def __init__(self, project: OpenProject, name: str) -> None:
        self._project = project
        self._name = name

    def __getattr__(self, verb: str) -> Any:
        name = f"{self._name}.{verb}"
        if name in _IN_STATE:
            return DeprecatedGroup(self._project, name)
        if name == "engine.install":
            install = partial(environment.install, reporter=self._project.reporter)
            new = "tunewright.engines.environment.install()"
            return _warning(name, new, lambda name, **options: install(environment.find_tool(name), **options))
        if name == "engine.show":
            new = "tunewright.engines.environment.find()"
            return _warning(name, new, lambda name: environment.find(environment.find_tool(name)))
        service = _IN_STATE.get(self._name, {}).get(verb)
        if service is None:
            raise AttributeError(f"project.{self._name} has no method {verb!r}")

        def in_state(*given: Any, **named: Any) -> Any:
            with serve.open_state(self._project, make=service == "tenants.add") as state:
                return attrgetter(service)(state)(*given, **named)

        return _warning(name, f"state.{service}() in `with open_state(project) as state`", in_state)


def _warning(name: str, instead: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        warnings.warn(f"project.{name}() is deprecated: use {instead}.", DeprecationWarning, stacklevel=2)
        return function(*given, **named)

    return call
