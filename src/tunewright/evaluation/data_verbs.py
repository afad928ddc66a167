"""Verbs on a project's data that also need its base or its evaluations: ``tunewright data …``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.core.errors import UserError
from tunewright.data import add as adding
from tunewright.data.add import AddResult
from tunewright.data.options import AddOptions
from tunewright.data.versions import load_version
from tunewright.evaluation.access_log import load_checked
from tunewright.evidence.files import find_evaluation, load_items
from tunewright.evidence.power import report_split_power, split_power, warn_of_few_dev_clusters
from tunewright.evidence.schema import Item
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.data.dedup.decontaminate import Contamination
    from tunewright.data.dedup.leakage import BandScore, LeakageReport, TemplateScore
    from tunewright.training.rows import LengthReport


def add(
    project: OpenProject,
    files: Iterable[str | Path],
    options: AddOptions = AddOptions(),
    *,
    message: str = "",
) -> AddResult:
    """Add files of pairs to the dataset as a new version, unless all rows are known."""
    added = adding.add(project.folder, files, project.reporter, options, message=message)
    warn_of_few_dev_clusters(added.dev_clusters, project.reporter)
    report_split_power(
        split_power(added.version.counts.domain, added.clusters, project.folder.config.data.test_size),
        project.reporter,
    )
    return added


def check(project: OpenProject) -> LengthReport:
    """Encode every row of the current version as training does, and measure the lengths."""
    from tunewright.models.loading import context_length
    from tunewright.training.rows import measure_lengths

    base = project.base
    limit = min(project.folder.config.train.max_length, context_length(base))
    chat, version = project.chat, load_version(project.folder.dataset)
    with project.workers() as workers:
        return measure_lengths(chat, base.spec, version, limit, project.reporter, workers)


def contamination(project: OpenProject, files: Iterable[str | Path] = ()) -> Contamination:
    """Find training rows that contain a test input, a benchmark item of the config, or an item of these files."""
    from tunewright.data.dedup import decontaminate

    paths = [Path(file) for file in files]
    with project.workers() as workers:
        version = load_version(project.folder.dataset)
        return decontaminate.contamination(project.folder, version, paths, project.reporter, workers)


def scores_by_distance(project: OpenProject, report: LeakageReport, evaluation: str | Path) -> list[BandScore]:
    """Return an evaluation's exact match by the items' similarity to the training rows.

    Raises:
        UserError: no such evaluation, or it covers another version or more than one split.
    """
    from tunewright.data.dedup.leakage import score_by_distance

    return score_by_distance(_held_out_items(project, evaluation), report)


def exact_match_misleads(project: OpenProject, evaluation: str | Path) -> str | None:
    """Return the reason why exact match is uninformative for an evaluation; None if it is informative.

    Raises:
        UserError: no such evaluation.
    """
    from tunewright.metrics import metric_label

    place = find_evaluation(project.folder.evaluations, evaluation)
    evidence = load_checked(place, project.folder.evaluations, project.reporter)
    if evidence.metric.partition(" ")[0] in {"exact_match", "choices"}:
        return None
    return (
        f"Exact answers of evaluation {evidence.id} are not counted: its deciding metric is "
        f"{metric_label(evidence.metric)}."
        + (
            " `tunewright report` shows that metric by distance and output template."
            if evidence.train_similarity is not None
            else ""
        )
    )


def scores_by_template(project: OpenProject, evaluation: str | Path) -> list[TemplateScore]:
    """Return an evaluation's exact match on items with trained output templates, and with new ones.

    The list is empty if outputs are alike by nature; :meth:`leakage` gives the reason.

    Raises:
        UserError: as for :meth:`scores_by_distance`.
    """
    from tunewright.data.dedup.leakage import score_by_template
    from tunewright.data.dedup.output_leakage import new_templates

    version = load_version(project.folder.dataset)
    new = new_templates(version.members, ("dev", "test"))
    items = _held_out_items(project, evaluation)
    return score_by_template(items, new, version.digest) if new is not None else []


def _held_out_items(project: OpenProject, evaluation: str | Path) -> list[Item]:
    folder = find_evaluation(project.folder.evaluations, evaluation)
    if load_checked(folder, project.folder.evaluations, project.reporter).design != "held-out":
        raise UserError(
            "The evaluation is cross-fitted: its items were also training rows, so they have no distance from them",
            where=str(folder),
            fix="Name one of `tunewright evaluate`.",
        )
    return load_items(folder)
