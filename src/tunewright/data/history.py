"""The history of a row: its origin, and the versions, reviews, adapters and evaluations that saw it."""

from __future__ import annotations

from dataclasses import dataclass

from tunewright.config.project import ProjectFolder
from tunewright.data.remove import count_measured
from tunewright.data.review.reviews import VerdictEvent, read_reviews
from tunewright.data.trace import KnownPlaces, RowOrigin, RowUse, blame, row_uses
from tunewright.data.versions import DatasetVersion, Manifest, list_versions


@dataclass(frozen=True)
class RowHistory:
    """The history of a row of the current version; versions and reviews are sorted by time."""

    origin: RowOrigin
    versions: tuple[Manifest, ...]
    """Versions that have the row."""
    reviews: tuple[VerdictEvent, ...]
    """The current verdict of each reviewer."""
    adapters: tuple[RowUse, ...]
    """Adapters whose dataset version has the row, or may have it."""
    evaluations: tuple[str, ...]
    """Evaluations that measured on the row, by their folders' names."""


def row_history(project: ProjectFolder, version: DatasetVersion, key: str, places: KnownPlaces) -> RowHistory:
    """Return the history of a row, by its full key.

    Args:
        places: reads each version's rows once.

    Raises:
        UserError: the version lacks the row, or a version, review or lineage cannot be read.
    """
    dataset = project.dataset
    verdicts = read_reviews(dataset).current_verdicts(key).values()
    uses = row_uses(dataset, project.adapters, [key], places)[key]
    return RowHistory(
        origin=blame(dataset, version, key),
        versions=tuple(each for each in list_versions(dataset) if key in (places.of(each.digest) or ())),
        reviews=tuple(sorted(verdicts, key=lambda each: (each.when, each.nth or 0))),
        adapters=tuple(use for use in uses if use.use != "absent"),
        evaluations=tuple(count_measured(project.evaluations, [key])),
    )
