"""Verbs on a project's data that need its base or its evaluations: ``tunewright data …``, with its label review."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.registry import list_adapters
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import LogReporter, Reporter
from tunewright.data import add as adding
from tunewright.data import preview
from tunewright.data.add import AddResult
from tunewright.data.options import AddOptions, ReviewOptions
from tunewright.data.preview import Preview
from tunewright.data.splits import Split
from tunewright.data.versions import DatasetVersion, has_version, load_version
from tunewright.data.versions.version import clusters_by_split
from tunewright.evaluation.access_log import load_checked
from tunewright.evidence.files import find_evaluation, load_items
from tunewright.evidence.power import report_split_power, split_power, warn_of_few_dev_clusters
from tunewright.evidence.schema import Item
from tunewright.open_project import OpenProject
from tunewright.render.blocks import Table, table, words

if TYPE_CHECKING:
    from tunewright.annotation import SheetImport
    from tunewright.data.dedup.decontaminate import Contamination
    from tunewright.data.dedup.leakage import BandScore, LeakageReport, TemplateScore
    from tunewright.data.review.edits import EditResult
    from tunewright.data.review.label_models import Suspect
    from tunewright.data.review.report import ReviewReport
    from tunewright.data.review.session import ReviewSession
    from tunewright.data.review.suspects import SuspectList
    from tunewright.evaluation.losses import Judging
    from tunewright.training.rows import LengthReport


def add(
    project: OpenProject,
    files: Iterable[str | Path] | None = None,
    options: AddOptions = AddOptions(),
    *,
    message: str = "",
) -> AddResult:
    """Add files of pairs (None: data.sources) to the dataset as a new version, unless all rows are known."""
    added = adding.add(project.folder, files, project.reporter, options, message=message)
    warn_of_few_dev_clusters(added.dev_clusters, project.reporter)
    _report_power(project, added.version.counts.domain, added.clusters)
    return added


def _report_power(project: OpenProject, rows: Mapping[Split, int], clusters: Mapping[Split, int]) -> None:
    report_split_power(split_power(rows, clusters, project.folder.config.data.test_size), project.reporter)


def check_files(
    project: OpenProject, files: Iterable[str | Path] | None = None, options: AddOptions = AddOptions()
) -> Preview:
    """Check files (None: data.sources) against the current version, and report what the planned test split can show."""
    checked = preview.check_files(project, files, options)
    if checked.effect is not None:
        sizes = checked.effect.splits
        rows, clusters = ({each.split: getattr(each, of) for each in sizes} for of in ("rows", "clusters"))
        _report_power(project, rows, clusters)
    return checked


def check(project: OpenProject) -> LengthReport | Preview:
    """Encode every row of the current version as training does, and measure the lengths.

    Before the first version, check data.sources as :meth:`check_files` does.
    """
    if not has_version(project.folder.dataset):
        return check_files(project)
    from tunewright.models.loading import context_length
    from tunewright.training.rows import measure_lengths

    base = project.base
    limit = min(project.folder.config.train.max_length, context_length(base))
    chat, version = project.chat, load_version(project.folder.dataset)
    _report_power(project, version.manifest.counts.domain, clusters_by_split(version.members))
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
    """Return an evaluation's exact match on items with trained output templates, and with new templates.

    The list is empty if outputs are naturally alike; :meth:`leakage` gives the reason.

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


# Commands of the label review: ``tunewright data suspects`` and ``data review``


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
    """Return the stored result of :meth:`suspects` for a loaded version; None if the inputs have changed.

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
        known_suspects: the result of :meth:`stored_suspects`, to be reviewed with `options.suspects`.
        version: the current version, if it is loaded already.

    Raises:
        UserError: the plan differs from the existing sample's, or the options are mutually exclusive.
    """
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
        options,
        suspects=known_suspects if options.suspects else None,
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
    # An empty list of suspects, so that no sample is drawn.
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
