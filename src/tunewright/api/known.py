"""Facts about a project beyond an evaluation's evidence, in which the causes of a verdict are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tunewright.adapters.registry import list_adapters
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.review.acceptance import judge, sample_order
from tunewright.data.review.reviews import findings, read_reviews
from tunewright.data.versions.members import read_places
from tunewright.data.versions.store import version_folder
from tunewright.data.versions.version import read_manifest
from tunewright.evidence.causes import Known, Labels
from tunewright.evidence.learning_curve import find_curve
from tunewright.evidence.schema import Evidence

T = TypeVar("T")


def known_of(project: ProjectFolder, evidence: Evidence, reporter: Reporter) -> Known:
    """Return the project's facts about the evaluation's adapter and data.

    Missing facts are left out. Unreadable ones are left out with a warning: evidence is enough for a verdict.
    """
    from tunewright.advisor.signals import fitting_advice
    from tunewright.advisor.wording import calls_cost

    def readable(read: Callable[[], T | None]) -> T | None:
        try:
            return read()
        except UserError as error:
            reporter.warn(f"Ignored for the causes of the verdict: {error}")
            return None

    advice = readable(lambda: fitting_advice(project.advice, evidence))
    digest = evidence.lineage.get("adapter", {}).get("digest")
    adapter = next((a for a in list_adapters(project.adapters) if a.digest == digest), None)
    even = advice.break_even if advice else None
    same_arm = even is not None and even.prompting.arm == evidence.contrasts[0].control
    return Known(
        history=adapter.history if adapter else (),
        curve=readable(lambda: find_curve(project.curves, evidence)),
        labels=_labels(project.dataset, str(evidence.lineage.get("dataset"))),
        cost=calls_cost(even) if even is not None and same_arm else None,
    )


def _labels(dataset: Path, version: str) -> Labels | None:
    """Return the numbers of conflicting and of wrong rows in a version; None without the version."""
    try:
        places = {key: place for key, place in read_places(dataset, version).items() if not place.mixed}
        manifest = read_manifest(version_folder(dataset, version))
        reviews = read_reviews(dataset)
    except UserError:
        return None  # evidence alone is enough for a verdict
    drawn = reviews.latest_draw(version)
    if drawn is None:
        return Labels(len(places), manifest.counts.conflicts)
    found = judge(drawn.plan, findings(reviews, sample_order(sorted(places), version, drawn.draw)), len(places))
    return Labels(len(places), manifest.counts.conflicts, found.checked, found.wrong)
