"""Commands of the label review: ``tunewright data suspects`` and ``data review``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.registry import list_adapters
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import LogReporter, Reporter
from tunewright.data.options import ReviewOptions
from tunewright.data.versions import DatasetVersion, load_version
from tunewright.open_project import OpenProject
from tunewright.render.blocks import Table, table, words

if TYPE_CHECKING:
    from tunewright.annotation import SheetImport
    from tunewright.data.review.edits import EditResult
    from tunewright.data.review.label_models import Suspect
    from tunewright.data.review.report import ReviewReport
    from tunewright.data.review.session import ReviewSession
    from tunewright.data.review.suspects import SuspectList
    from tunewright.evaluation.losses import Judging

_SAMPLE = ReviewOptions()
_EXPORTED = 60  # rows, where the plan needs fewer


@dataclass(frozen=True)
class SuspectsResult:
    """The rows of a version that are most likely wrong, worst first."""

    version: DatasetVersion
    suspects: list[Suspect]
    judged_by: str | None
    """The model whose losses ranked the answers; None if none was used."""
    places: dict[str, str]
    """``FILE:LINE`` by pair key."""
    accuracy: float | None = None
    """Share of rows whose answer a model of other rows predicts, if answers are classes."""

    def as_dict(self) -> dict[str, Any]:
        """Return the suspects as ``--json`` prints them, each with its row's input and answer."""
        examples = {m.key: m.example for m in self.version.members}
        return {
            "version": self.version.digest,
            "judged_by": self.judged_by,
            "accuracy": self.accuracy,
            "suspects": [
                {
                    **asdict(suspect),
                    "input": examples[suspect.key].input_text,
                    "answer": examples[suspect.key].output,
                    "place": self.places.get(suspect.key),
                }
                for suspect in self.suspects
            ],
        }

    def table(self, top: int) -> Table:
        """Return the first ``top`` suspects as a table."""
        from tunewright.data.review.label_models import excerpt

        examples = {m.key: m.example for m in self.version.members}
        head = words("Row", "From", "Input", "Answer", "Reason", "Why")
        rows = [
            (
                each.key[:12],
                self.places.get(each.key, ""),
                excerpt(examples[each.key].input_text),
                excerpt(examples[each.key].output),
                each.reason,
                each.detail,
            )
            for each in self.suspects[:top]
        ]
        return table("Suspects", head, rows)


def find_suspects(
    project: OpenProject, adapter: str | None = None, *, version: DatasetVersion | None = None
) -> SuspectsResult:
    """Return the current version's rows that are most likely wrong, reusing a stored result of the same inputs.

    Free text is ranked by each answer's loss. The losses come from the named adapter ("base": the base alone), else
    from the version's cross-validated adapters, else from the newest adapter that fits.

    Args:
        adapter: ranks free text.
        version: the current version, if it is loaded already.

    Raises:
        UserError: an adapter is named although answers are classes, which a model of other rows judges better.
    """
    from tunewright.data.review import suspects
    from tunewright.data.trace import places_by_key

    version = load_version(project.folder.dataset) if version is None else version
    who = _judging(project, version, adapter, project.reporter)

    def find(reporter: Reporter) -> SuspectList:
        losses = None
        if who is not None:
            from tunewright.evaluation.losses import row_losses

            losses = row_losses(project.folder, project.base, project.chat, who, reporter)
        return suspects.find_suspects(version, reporter, losses=losses)

    found = suspects.cached_suspects(_suspects_file(project, version, who), find, project.reporter)
    places = places_by_key(project.folder.dataset, version.manifest)
    return SuspectsResult(version, found.suspects, who.judged_by if who else None, places, found.accuracy)


def stored_suspects(project: OpenProject, version: DatasetVersion, adapter: str | None = None) -> list[Suspect] | None:
    """Return what :meth:`suspects` has found for a loaded version; None if it has not run on the same inputs.

    Raises:
        UserError: as for :meth:`suspects`.
    """
    from tunewright.data.review.suspects import stored_suspects

    file = _suspects_file(project, version, _judging(project, version, adapter, LogReporter()))
    return stored_suspects(file).suspects if file.exists() else None


def _judging(project: OpenProject, version: DatasetVersion, adapter: str | None, reporter: Reporter) -> Judging | None:
    """Return the models whose losses rank the answers; None if no losses are used."""
    from tunewright.data.examples import class_like

    folder = project.folder
    if class_like([m.example.output.strip() for m in version.domain]):
        if adapter is not None:
            raise UserError(
                "The answers are classes: a model of other rows judges them, and no adapter is used",
                where="--adapter",
                fix="Leave it out.",
            )
        return None
    if adapter is None and not list_adapters(folder.fold_adapters) and not list_adapters(folder.adapters):
        return None
    from tunewright.evaluation.losses import judging

    return judging(folder, version, project.base, project.chat, reporter, adapter)


def _suspects_file(project: OpenProject, version: DatasetVersion, who: Judging | None) -> Path:
    from tunewright.data.review.suspects import FOLDER, METHOD

    decides = {
        "version": version.digest,
        "settings": version.manifest.settings.model_dump(mode="json"),
        "judges": who.digest if who else None,
        "method": METHOD,
    }
    return project.folder.work / FOLDER / f"{digest(decides)[:16]}.json"


def review(
    project: OpenProject,
    reviewer: str | None = None,
    *,
    options: ReviewOptions = _SAMPLE,
    known_suspects: Sequence[Suspect] | None = None,
    version: DatasetVersion | None = None,
) -> ReviewSession:
    """Start a review of a random sample of the current version, drawn on first use, or of its suspects.

    Args:
        reviewer: the reviewer's name (None: git's user.name, else the login name).
        options: the choice of rows.
        known_suspects: those that :meth:`stored_suspects` has returned, to be reviewed with `options.suspects`.
        version: the current version, if it is loaded already.

    Raises:
        UserError: the plan differs from the existing sample's, or the options are mutually exclusive.
    """
    from tunewright.data.review.acceptance import FixedPlan
    from tunewright.data.review.session import ReviewSession, reviewer_name
    from tunewright.data.trace import metadata_by_key

    version = load_version(project.folder.dataset) if version is None else version
    if options.suspects and known_suspects is None:
        known_suspects = find_suspects(project, options.adapter, version=version).suspects
    return ReviewSession(
        project.folder.dataset,
        version,
        reviewer_name(reviewer, project.folder.root),
        project.reporter,
        plan=None if options.fixed is None else FixedPlan(allowed=options.fixed),
        redraw=options.redraw,
        suspects=known_suspects if options.suspects else None,
        second=options.second,
        conflicts=options.conflicts,
        allow=project.folder.config.data.allow,
        metadata=metadata_by_key(project.folder.dataset, version.manifest)
        if any(m.generated for m in version.domain)
        else {},
    )


def import_reviews(project: OpenProject, file: str | Path, reviewer: str | None = None) -> SheetImport:
    """Record the verdicts of a filled-in spreadsheet; if a row is faulty, none is recorded."""
    from tunewright.data.review.session import ReviewSession, reviewer_name

    folder = project.folder
    name, version = reviewer_name(reviewer, folder.root), load_version(folder.dataset)
    # A pass over no suspects: it draws no sample.
    review = ReviewSession(folder.dataset, version, name, project.reporter, suspects=(), allow=folder.config.data.allow)
    return review.import_sheet(Path(file))


def export_reviews(project: OpenProject, file: str | Path, review: ReviewSession) -> int:
    """Write the next rows of a review to a CSV file for a spreadsheet, and return their number."""
    from tunewright.data.trace import places_by_key

    places = places_by_key(project.folder.dataset, review.version.manifest)
    return review.export_sheet(Path(file), max(review.needed, _EXPORTED), places)


def apply_reviews(project: OpenProject, *, message: str = "") -> EditResult:
    """Create a new version with the answers that reviewers edited."""
    from tunewright.data.review.edits import apply_edits

    return apply_edits(project.folder, project.reporter, message=message)


def review_status(project: OpenProject) -> ReviewReport:
    """Return the state of the current version's review."""
    from tunewright.data.review.report import review_report

    return review_report(project.folder.dataset, load_version(project.folder.dataset))
