"""The verbs ``verdict`` and ``report``, on stored evaluations.

An evaluation is given as its ID, folder or evidence file; None is the newest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tunewright.adapters.registry import list_adapters
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.core.progress import Reporter
from tunewright.data.review.reviews import read_reviews
from tunewright.data.review.samples import outcome
from tunewright.data.versions.members import read_places
from tunewright.data.versions.store import version_folder
from tunewright.data.versions.version import read_manifest
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.stored import checked_evidence, evaluation_folder, folder_of
from tunewright.evidence.causes import Labels, ProjectFacts, decided
from tunewright.evidence.learning_curve import find_curve
from tunewright.evidence.schema import Evidence, load_items
from tunewright.evidence.verdict import Verdict
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.advisor.signals import Signals

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
    """Return the numbers of conflicting and of wrong rows in a version; None without the version."""
    try:
        places = {key: place for key, place in read_places(dataset, version).items() if not place.mixed}
        manifest = read_manifest(version_folder(dataset, version))
        reviews = read_reviews(dataset)
    except UserError:
        return None  # evidence alone is enough for a verdict
    found = outcome(reviews, version, sorted(places))
    if found is None:
        return Labels(len(places), manifest.counts.conflicts)
    return Labels(len(places), manifest.counts.conflicts, found.checked, found.wrong)


def verdict(project: OpenProject, evaluation: str | Path | None = None) -> Verdict:
    """Return ship, don't ship or can't tell, from an evaluation's evidence alone.

    The causes of a *don't ship* also use the project's records of the adapter and the data.

    Raises:
        UserError: no evaluation, or a file of the evaluation or a line of the access log was changed or is missing.
    """
    evidence = checked_evidence(project, evaluation)
    return decided(evidence, known_of(project.folder, evidence, project.reporter))


def verdict_markdown(project: OpenProject, evaluation: str | Path | None = None) -> str:
    """Return the verdict and its measurements as GitHub Markdown, for a pull request comment.

    Raises:
        UserError: as :meth:`verdict`.
    """
    from tunewright.report import markdown

    evidence = checked_evidence(project, evaluation)
    return markdown.verdict_markdown(evidence, known_of(project.folder, evidence, project.reporter))


def report(project: OpenProject, evaluation: str | Path | None = None) -> Path:
    """Write an evaluation's HTML report next to its evidence.

    It includes the project's newest learning curve and advice on the same data and base, if they exist.

    Raises:
        UserError: as :meth:`verdict`, or stored advice was changed after it was written.
    """
    from tunewright.report.html import render_report

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
    curve, advice = (
        find_curve(project.folder.curves, evidence),
        _matching_advice(project.folder, evidence),
    )
    known = known_of(project.folder, evidence, project.reporter)
    write_text(out, render_report(evidence, load_items(folder), history, curve, advice, known))
    return out
