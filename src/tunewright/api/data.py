"""Commands on pairs, versions and reviews: ``tunewright data …``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.api.context import ProjectGroup
from tunewright.core.errors import UserError
from tunewright.data.add import AddResult, add
from tunewright.data.add_options import AddOptions, ColumnMapping
from tunewright.data.add_plan import map_columns, preview
from tunewright.data.trace import find_row
from tunewright.data.versions import DatasetVersion, Manifest, Member, checkout, list_versions, load_version
from tunewright.evaluation import label_review
from tunewright.evaluation.access_log import load_checked
from tunewright.evaluation.verbs import current_split_power
from tunewright.evidence.schema import Item, find_evaluation, load_items
from tunewright.evidence.split_power import (
    report_split_power,
    split_power,
    warn_of_few_dev_clusters,
)
from tunewright.synthesis import verbs as synthesis

if TYPE_CHECKING:
    from tunewright.data.add_plan import Preview
    from tunewright.data.dedup.decontaminate import Contamination
    from tunewright.data.dedup.leakage import BandScore, LeakageReport, TemplateScore
    from tunewright.data.readers.file_check import Change
    from tunewright.data.readers.file_preview import FilePreview
    from tunewright.data.remote import Transfer
    from tunewright.data.remove import RemoveResult
    from tunewright.data.splits import Split
    from tunewright.data.trace import RowOrigin, RowUse
    from tunewright.data.verify import Verification
    from tunewright.data.versions.diff import Diff
    from tunewright.data.versions.export import Exported, Format
    from tunewright.training.lengths import LengthReport


class ProjectData(ProjectGroup):
    """Verbs on a project's data."""

    split_power = current_split_power

    apply_reviews = label_review.apply_reviews
    import_reviews = label_review.import_reviews
    review = label_review.review
    review_status = label_review.review_status
    stored_suspects = label_review.stored_suspects
    suspects = label_review.find_suspects

    estimate_from_documents = synthesis.estimate_from_documents
    estimate_generate = synthesis.estimate_generate
    from_documents = synthesis.from_documents
    generate = synthesis.generate
    generated_effect = synthesis.generated_effect

    def add(
        self,
        files: Iterable[str | Path],
        options: AddOptions = AddOptions(),
        *,
        message: str = "",
    ) -> AddResult:
        """Add files of pairs to the dataset as a new version, unless all rows are known."""
        added = add(self.folder, files, self.reporter, options, message=message)
        warn_of_few_dev_clusters(added.dev_clusters, self.reporter)
        report_split_power(
            split_power(added.version.counts.domain, added.clusters, self.folder.config.data.test_size),
            self.reporter,
        )
        return added

    def remove(
        self,
        *,
        because: str = "",
        keys: str | Path | None = None,
        where: str | None = None,
        source: str | None = None,
        groups: Iterable[str] = (),
        dry_run: bool = False,
        purge: bool = False,
    ) -> RemoveResult:
        """Remove the rows that match all given conditions, which creates a new version.

        Args:
            because: the reason; optional only in a dry run.
            keys: a file with one row key, or its first digits, per line.
            where: a JMESPath condition on a row's document.
            source: the added file that the rows came from.
            groups: groups such as ``customer=ACME``; a row must have one of them.
            dry_run: only report the rows that would be removed.
            purge: also erase the rows' text from all versions.

        Raises:
            UserError: no row matches, or too few rows would remain.
        """
        from tunewright.data.remove import remove
        from tunewright.data.selection import Selection

        selection = Selection(None if keys is None else Path(keys), where, source, tuple(groups))
        return remove(self.folder, selection, because, self.reporter, dry_run=dry_run, purge_text=purge)

    def check_files(self, files: Iterable[str | Path], options: AddOptions = AddOptions()) -> Preview:
        """Preview :meth:`add` on files of pairs, with every fault."""
        return preview(self.folder, files, self.reporter, options)

    def preview_file(self, file: str | Path, mapping: ColumnMapping = ColumnMapping()) -> FilePreview:
        """Return the columns of a file of pairs, whatever their names, and its first three rows.

        Raises:
            UserError: the file cannot be read.
        """
        from tunewright.data.readers.file_preview import preview_file

        wanted = {"rows": mapping.rows, "sheet": mapping.sheet}
        given = {key: value for key, value in wanted.items() if value is not None}
        return preview_file(Path(file), self.folder.config.data.model_copy(update=given))

    def sheets(self, file: str | Path) -> tuple[str, ...]:
        """Return the titles of a workbook's visible sheets; of another file, nothing."""
        from tunewright.data.readers.file_preview import sheet_titles

        return sheet_titles(Path(file))

    def fix_file(self, file: str | Path, out: str | Path, mapping: ColumnMapping = ColumnMapping()) -> list[Change]:
        """Write a corrected copy of a file of pairs, and list every change."""
        from tunewright.data.readers import source_size
        from tunewright.data.readers.file_check import fix_file

        data = map_columns(self.folder.config.data, mapping, [Path(file)])
        with self.reporter.task("correcting", source_size(Path(file)), "bytes") as task:
            return fix_file(Path(file), Path(out), data, task)

    def version(self, digest: str | None = None) -> DatasetVersion:
        """Return a dataset version (None: the current one)."""
        return load_version(self.folder.dataset, digest)

    def log(self) -> list[Manifest]:
        """Return the dataset's versions, newest last."""
        return list_versions(self.folder.dataset)

    def show(self, row: str) -> Member:
        """Return one row of the current version, by the beginning of its key or by ``FILE:LINE``."""
        return find_row(self.folder.dataset, self.version(), row)

    def metadata(self, key: str) -> dict[str, Any]:
        """Return a current row's metadata from its source file, by the row's full key."""
        from tunewright.data.trace import metadata_by_key

        return metadata_by_key(self.folder.dataset, self.version().manifest).get(key, {})

    def cluster_counts(self, member: Member) -> tuple[int, int]:
        """Return the number of rows in a row's cluster, and how many of them share its output."""
        from tunewright.data.dedup import cluster_counts

        return cluster_counts(self.version(), member)

    def check(self) -> LengthReport:
        """Encode every row of the current version as training does, and measure the lengths."""
        from tunewright.models.loading import context_length
        from tunewright.training.lengths import measure_lengths

        base = self.base
        limit = min(self.folder.config.train.max_length, context_length(base))
        chat, version = self.chat, self.version()
        with self.workers() as workers:
            return measure_lengths(chat, base.spec, version, limit, self.reporter, workers)

    def leakage(self) -> LeakageReport:
        """Return the similarity of held-out rows to training rows, compared with that under a random split."""
        from tunewright.data.dedup.leakage import measure_leakage

        return measure_leakage(self.version(), self.folder.config.seed, self.reporter)

    def scores_by_distance(self, report: LeakageReport, evaluation: str | Path) -> list[BandScore]:
        """Return an evaluation's exact match by the items' similarity to the training rows.

        Raises:
            UserError: no such evaluation, or it covers another version or more than one split.
        """
        from tunewright.data.dedup.leakage import score_by_distance

        return score_by_distance(self._held_out_items(evaluation), report)

    def exact_match_misleads(self, evaluation: str | Path) -> str | None:
        """Return the reason why exact match is uninformative for an evaluation; None if it is informative.

        Raises:
            UserError: no such evaluation.
        """
        from tunewright.metrics import metric_label

        place = find_evaluation(self.folder.evaluations, evaluation)
        evidence = load_checked(place, self.folder.evaluations, self.reporter)
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

    def scores_by_template(self, evaluation: str | Path) -> list[TemplateScore]:
        """Return an evaluation's exact match on items with trained output templates, and with new ones.

        The list is empty if outputs are alike by nature; :meth:`leakage` gives the reason.

        Raises:
            UserError: as for :meth:`scores_by_distance`.
        """
        from tunewright.data.dedup.leakage import score_by_template
        from tunewright.data.dedup.output_leakage import new_templates

        version = self.version()
        new = new_templates(version.members, ("dev", "test"))
        items = self._held_out_items(evaluation)
        return score_by_template(items, new, version.digest) if new is not None else []

    def _held_out_items(self, evaluation: str | Path) -> list[Item]:
        folder = find_evaluation(self.folder.evaluations, evaluation)
        if load_checked(folder, self.folder.evaluations, self.reporter).design != "held-out":
            raise UserError(
                "The evaluation is cross-fitted: its items were also training rows, so they have no distance from them",
                where=str(folder),
                fix="Name one of `tunewright evaluate`.",
            )
        return load_items(folder)

    def contamination(self, files: Iterable[str | Path] = ()) -> Contamination:
        """Find training rows that contain a test input, a benchmark item of the config, or an item of these files."""
        from tunewright.data.dedup.decontaminate import contamination

        paths = [Path(file) for file in files]
        with self.workers() as workers:
            return contamination(self.folder, self.version(), paths, self.reporter, workers)

    def diff(self, a: str, b: str | None = None) -> Diff:
        """Return the differences between two versions (the second: the current one by default)."""
        from tunewright.data.versions.diff import diff

        before, after = (load_version(self.folder.dataset, digest, without_purged=True) for digest in (a, b))
        return diff(before, after)

    def blame(self, row: str) -> RowOrigin:
        """Return a current row's origin: its file and the version that added it; ``row`` as in :meth:`show`."""
        from tunewright.data.trace import blame

        version = self.version()
        return blame(self.folder.dataset, version, find_row(self.folder.dataset, version, row).key)

    def trained_by(self, row: str) -> tuple[str, tuple[RowUse, ...]]:
        """Return a row's key and its use in each adapter's training.

        Args:
            row: as in :meth:`show`; also the key of an earlier version's row, since adapters may have seen it there.
        """
        from tunewright.data.trace import find_key, uses_of_row

        key = find_key(self.folder.dataset, self.version(), row)
        return key, uses_of_row(self.folder.dataset, self.folder.adapters, key)

    def checkout(self, version: str) -> Manifest:
        """Make an existing version the current one, by its digest or the beginning of it."""
        return checkout(self.folder.dataset, version)

    def export(
        self,
        out: str | Path,
        form: Format = "chat",
        *,
        split: Split | None = None,
        version: str | None = None,
        metadata: bool = False,
    ) -> Exported:
        """Export a version (the current one by default), or one of its splits, as a file for other tools.

        ``metadata`` adds the source files' other keys to chat rows.
        """
        from tunewright.data.trace import metadata_by_key, rejected_answers
        from tunewright.data.versions.export import export

        chosen = self.version(version)
        extra = metadata_by_key(self.folder.dataset, chosen.manifest) if metadata else None
        rejected = rejected_answers(self.folder.dataset, chosen.manifest) if form == "preference" else None
        return export(chosen, Path(out), form, self.reporter, split=split, metadata=extra, rejected=rejected)

    def push(self, url: str) -> Transfer:
        """Copy the current version with its ancestors and reviews to a folder or bucket."""
        from tunewright.data.remote import push

        return push(self.folder.dataset, url, self.reporter)

    def pull(self, url: str) -> Transfer:
        """Copy the current version and reviews from a shared folder or bucket, verify and check them out."""
        from tunewright.data.remote import pull

        return pull(self.folder.dataset, url, self.reporter)

    def verify(self) -> Verification:
        """Check every row, version and review against its digest."""
        from tunewright.data.verify import verify

        return verify(self.folder.dataset, self.reporter)
