"""The whole pipeline: data, advise, train, evaluate, verdict, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.adapters.signing import store_signer
from tunewright.core.errors import require_torch
from tunewright.data.add import AddResult
from tunewright.data.options import AddOptions
from tunewright.data.versions import load_version
from tunewright.evaluation import data_verbs
from tunewright.evaluation.frozen_answers import require_ready
from tunewright.evaluation.verbs import (
    announce,
    asked_splits,
    check_trainable,
    current_split_power,
    evaluate,
    has_trained,
    prompting,
    refuse_up_front,
    require_minutes,
    require_rows,
    train_adapter,
)
from tunewright.evidence.power import require_significance
from tunewright.evidence.schema import Advice
from tunewright.evidence.verdict import Verdict
from tunewright.open_project import OpenProject
from tunewright.report.verbs import report, verdict
from tunewright.training.history import require_trackers

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


def run(
    project: OpenProject,
    *,
    force: bool = False,
    skip_bad: bool = False,
    minutes: float | None = None,
    stage_done: Callable[[str, bool, str], None] | None = None,
    prompting_done: Callable[[Advice], None] = lambda _advice: None,
) -> RunResult:
    """Run the whole pipeline, skipping stages whose inputs have not changed.

    Args:
        force: warn, instead of refusing, if the test split has too few clusters for any verdict. Also as in
            :meth:`train`.
        skip_bad: leave faulty rows of the sources out, with a warning, instead of refusing them.
        minutes: time limit for answers; arms that do not fit are left out by name (None: no limit). Training is not
            limited.
        stage_done: called with each finished stage's name, True if anything was computed, and its result in words
            (None: the reporter reports it).
        prompting_done: called with the scores of the prompting arms on dev once they have been measured, long
            before the whole result.
    """

    def report_stage(name: str, computed: bool, what: str) -> None:
        project.reporter.say(f"{name}: {'done' if computed else 'unchanged'}, {what}")

    done = stage_done or report_stage
    require_minutes(minutes)
    require_torch()
    require_trackers(project.folder.config.train.report_to)
    added = data_verbs.add(project, options=AddOptions(skip_bad=skip_bad))
    done("data", added.created, f"version {added.version.digest[:12]}")
    require_significance(current_split_power(project), force=force, reporter=project.reporter)
    require_ready(project.folder, load_version(project.folder.dataset), asked_splits("test"), project.reporter)
    forced = require_rows(project, force=force)
    refuse_up_front(project)
    signer = None
    if not has_trained(project):
        check_trainable(project)
        signer = store_signer(project.folder.keys, project.reporter)
        announce(project)
    advised = prompting(project, minutes)
    if advised.measured:
        prompting_done(advised.advice)
    done("advise", advised.measured, f"best prompting arm on dev: {advised.advice.best}")
    trained = train_adapter(project, forced, signer)
    done("train", trained.trained, trained.adapter.name)
    evaluated = evaluate(project, trained.adapter.name, advice=advised.advice)
    done("evaluate", evaluated.evaluated, f"evidence {evaluated.evidence.id}")
    decision = verdict(project, evaluated.folder)
    page = report(project, evaluated.folder)
    return RunResult(added, advised, trained, evaluated, decision, page)
