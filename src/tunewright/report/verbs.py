"""The verbs ``verdict``, ``report`` and ``train --curve``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tunewright.adapters.registry import list_adapters
from tunewright.config import metric_name
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.core.progress import Reporter
from tunewright.data.review.reviews import outcome, read_reviews
from tunewright.data.versions import load_version, version_folder
from tunewright.data.versions.files import read_places
from tunewright.data.versions.version import read_manifest
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.stored import checked_evidence, evaluation_folder, folder_of
from tunewright.evaluation.verbs import open_trainings, refuse_up_front
from tunewright.evidence.benchmarks import standing
from tunewright.evidence.blocks import evaluation_sections
from tunewright.evidence.causes import Labels, ProjectFacts, decided
from tunewright.evidence.files import load_items
from tunewright.evidence.learning_curve import find_curve
from tunewright.evidence.schema import Evidence
from tunewright.evidence.verdict import Verdict
from tunewright.metrics import metric_label
from tunewright.open_project import OpenProject
from tunewright.render.markdown import markdown, plain

if TYPE_CHECKING:
    from tunewright.advisor.signals import Signals
    from tunewright.evaluation.learning_curve import CurveResult

REPORT_FILE = "report.html"

T = TypeVar("T")


def known_of(project: ProjectFolder, evidence: Evidence, reporter: Reporter) -> ProjectFacts:
    """Return the project's facts about the evaluation's adapter and data.

    Missing facts are left out. Unreadable ones are left out with a warning: evidence is enough for a verdict.
    """
    from tunewright.advisor.advice import calls_cost

    def readable(read: Callable[[], T | None]) -> T | None:
        try:
            return read()
        except UserError as error:
            reporter.warn(f"Ignored for the causes of the verdict: {error}")
            return None

    advice = readable(lambda: _matching_advice(project, evidence))
    digest = evidence.lineage.get("adapter", {}).get("digest")
    adapter = next((a for a in list_adapters(project.adapters) if a.digest == digest), None)
    even = advice.break_even if advice else None
    same_arm = even is not None and even.prompting.arm == evidence.contrasts[0].control
    return ProjectFacts(
        history=adapter.history if adapter else (),
        curve=readable(lambda: find_curve(project.curves, evidence)),
        labels=_labels(project.dataset, str(evidence.lineage.get("dataset"))),
        cost=calls_cost(even) if even is not None and same_arm else None,
    )


def _matching_advice(project: ProjectFolder, evidence: Evidence) -> Signals | None:
    from tunewright.advisor.signals import find_matching_advice

    AccessLog(project.evaluations).require(*project.advice.glob("[!.]*.json"))
    return find_matching_advice(project.advice, evidence)


def _labels(dataset: Path, version: str) -> Labels | None:
    """Return the numbers of conflicting and of wrong rows in a version; None without it."""
    try:
        places = {key: place for key, place in read_places(dataset, version).items() if not place.mixed}
        manifest = read_manifest(version_folder(dataset, version))
        reviews = read_reviews(dataset)
    except UserError:
        return None  # evidence is enough for a verdict
    found = outcome(reviews, version, sorted(places))
    checked, wrong = (0, 0) if found is None else (found.checked, found.wrong)
    return Labels(len(places), manifest.counts.conflicts, checked, wrong)


def verdict(project: OpenProject, evaluation: str | Path | None = None) -> Verdict:
    """Return ship, don't ship or can't tell, only from an evaluation's evidence.

    The causes of a *don't ship* also use the project's records of the adapter and the data.

    Raises:
        UserError: no evaluation, or a file of the evaluation or a line of the access log was changed or is missing.
    """
    evidence = checked_evidence(project, evaluation)
    if evaluation is None and project.folder.has_config:
        with suppress(UserError):  # evidence is enough for a verdict, whatever became of the config
            metric = metric_name(project.folder.config.evaluate.metric)
            if metric != evidence.metric:
                project.reporter.warn(
                    f"The evidence is measured by {metric_label(evidence.metric)}, and the config's evaluate.metric "
                    f"is {metric_label(metric)}. `tunewright evaluate` measures by it, and opens the test split again."
                )
    return decided(evidence, known_of(project.folder, evidence, project.reporter))


def verdict_markdown(project: OpenProject, evaluation: str | Path | None = None) -> str:
    """Return the verdict and its measurements as GitHub Markdown, for a pull request comment.

    Raises:
        UserError: as :meth:`verdict`.
    """
    evidence = checked_evidence(project, evaluation)
    return markdown_of(evidence, known_of(project.folder, evidence, project.reporter))


def report(project: OpenProject, evaluation: str | Path | None = None) -> Path:
    """Write an evaluation's HTML report next to its evidence.

    It includes the project's newest learning curve and advice on the same data and base, if they exist.

    Raises:
        UserError: as :meth:`verdict`, or stored advice was changed after it was written.
    """
    from tunewright.report.page import render_report

    evidence = checked_evidence(project, evaluation)
    folder = folder_of(evaluation_folder(project, evaluation))
    history: list[dict[str, Any]] = []
    if evidence.design == "held-out":  # cross-validated evidence contains the dev losses of each fold
        adapters = {a.digest: a for a in list_adapters(project.folder.adapters)}
        adapter = adapters.get(evidence.lineage["adapter"]["digest"])
        if adapter is None:
            project.reporter.warn("The evaluated adapter was removed: the report has no loss curve.")
        else:
            history = adapter.history
    out = folder / REPORT_FILE
    curve, advice = find_curve(project.folder.curves, evidence), _matching_advice(project.folder, evidence)
    known = known_of(project.folder, evidence, project.reporter)
    write_text(out, render_report(evidence, load_items(folder), history, curve, advice, known))
    return out


CURVE_PLOT = "curve.svg"
SEEDS = 3
"""Seeds of a learning curve: fewer cannot separate training noise from the effect of more rows."""


def curve(project: OpenProject, *, seeds: int = SEEDS, force: bool = False) -> CurveResult:
    """Train on parts of the training rows with several seeds, to predict on dev if more rows would help.

    The plot is saved next to the result as curve.svg. ``force`` as in :meth:`train`.
    """
    if seeds < 2:
        raise UserError(f"Must be at least 2 (got {seeds}): one seed cannot show the noise", where="--seeds")
    version = load_version(project.folder.dataset)
    refuse_up_front(project, "A learning curve")
    from tunewright.evaluation.learning_curve import LearningCurve
    from tunewright.evidence.learning_curve import curve_lines
    from tunewright.render.plots import lines_file

    chat = project.chat
    with open_trainings(project) as trainings:
        result = LearningCurve(
            project.folder, version, project.base, chat, project.reporter, trainings, seeds=seeds, force=force
        ).run()
    write_text(result.folder / CURVE_PLOT, lines_file(curve_lines(result.curve)))
    return result


def markdown_of(evidence: Evidence, known: ProjectFacts | None = None) -> str:
    """Return the verdict with its reasons, causes and measurements, and the inputs of the evaluation.

    Text from users is always shown literally: it cannot add markup, notify anybody or link to an issue.
    """
    result = decided(evidence, known)
    measured, *reasons = result.reasons
    below = set(standing(evidence.regressions).reasons) if evidence.regressions else set()
    blocks = [
        f"## {result.headline}: {plain(evidence.project)}",
        plain(measured),
        *markdown(
            *result.blocks([reason for reason in reasons if reason not in below]),
            *evaluation_sections(evidence),
        ),
        _made_with(evidence),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _made_with(evidence: Evidence) -> str:
    """Return the identifiers to check the comment against: the evidence's ID and digests of its inputs."""
    lineage = evidence.lineage
    parts = [f"Evidence {plain(evidence.id)}"]
    for name in ("created", "dataset", "base", "adapter"):
        value = lineage.get(name)
        digest = value.get("digest") if isinstance(value, dict) else value
        if isinstance(digest, str):
            parts.append(f"{name} {plain(digest if name == 'created' else digest[:12])}")
    if evidence.engine is not None:
        parts.append(f"engine {plain(evidence.engine.text)}")
    return f"{', '.join(parts)}; margin {100 * evidence.margin:g} points."
