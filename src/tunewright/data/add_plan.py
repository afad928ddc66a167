"""Planning an import: merge, cluster and split without writing, for ``add`` and for its preview."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.compute import open_workers
from tunewright.config import DataConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.workers import THIS_PROCESS, Workers
from tunewright.data import notices
from tunewright.data.add_options import AddOptions, ColumnMapping
from tunewright.data.merge import Merge, compared, merge
from tunewright.data.notices import Conflict, Duplicate
from tunewright.data.readers import SourceRow, require_columns
from tunewright.data.readers.file_check import FileCheck, check_files
from tunewright.data.readers.sources import is_workbook, source_files
from tunewright.data.remove import removals_ended_by, removed_rows_notice
from tunewright.data.screening import screen
from tunewright.data.splits import SPLITS
from tunewright.data.version_builder import (
    InheritedSplit,
    VersionDraft,
    draft_version,
    inherit_split,
    inheritance_notice,
    refuse_split_templates,
)
from tunewright.data.versions import (
    DatasetVersion,
    members_digest,
)
from tunewright.data.versions.logs import Removal


@dataclass(frozen=True)
class SplitSize:
    """Size of one split in the planned version: rows, new rows and clusters."""

    split: str
    rows: int
    new: int
    clusters: int


@dataclass(frozen=True)
class Effect:
    """Effect of an import on the valid rows; ``contaminated`` rows contain a test row or a benchmark item."""

    added: int
    known: int
    exact_duplicates: int
    """Left out."""
    near_kept: int
    """Near-duplicates among those added, each in the cluster of the row it resembles."""
    near_dropped: int
    """Near-duplicates left out, if data.duplicates is "drop"."""
    replaced: int
    """Rows that would replace known ones with the same input and another output."""
    superseded: int
    """Rows that an earlier `data add --replace` superseded and that stay out."""
    removed: int
    """Rows that were removed earlier and stay out."""
    conflicts: int
    contaminated: int
    moved: int
    splits: tuple[SplitSize, ...]


@dataclass(frozen=True)
class Preview:
    """Contents of some files, and the effect of `data add` on the dataset; ``effect`` is None if unknown."""

    files: FileCheck
    metadata: dict[str, int]
    """Keys that would be kept as metadata: number of rows."""
    refusals: tuple[UserError, ...]
    """Errors that `data add` would raise."""
    effect: Effect | None
    conflicts: tuple[Conflict, ...] = ()
    """Conflicts that new rows cause."""

    @property
    def ok(self) -> bool:
        """True if `data add` would accept the files with the same options."""
        return not self.refusals and all(file.unreadable is None for file in self.files.files)

    def as_dict(self) -> dict[str, Any]:
        """Return the preview as ``--json`` prints it."""
        return {
            **self.files.as_dict(),
            "ok": self.ok,
            "metadata": self.metadata,
            "refusals": [refusal.as_dict() for refusal in self.refusals],
            "effect": asdict(self.effect) if self.effect else None,
            "conflicts": [asdict(conflict) for conflict in self.conflicts],
        }


def preview(
    project: ProjectFolder,
    files: Iterable[str | Path],
    reporter: Reporter,
    options: AddOptions = AddOptions(),
) -> Preview:
    """Check files against the current version as ``add`` would with the same arguments; memory holds the rows' keys.

    Raises:
        UserError: a template or JMESPath of the config is invalid, or the dataset was changed by hand.
    """
    rows: list[SourceRow] = []
    refusals: list[UserError] = []
    with prepare_add(project, files, reporter, options) as (project, paths, workers):
        data = project.config.data
        checked = check_files(paths, data, reporter, rows, workers)
        if checked.faults and options.skip_bad:
            reporter.warn(notices.skipped(checked.faults))
        elif checked.faults:
            refusals.append(notices.faulty(checked.faults))
        try:
            rows = screen(
                rows, data.allow, reporter, redact=options.redact, presidio=options.presidio, workers=workers
            ).rows
        except UserError as refusal:
            refusals.append(refusal)
        effect, conflicts = None, list[Conflict]()
        metadata = Counter(key for row in rows for key in row.metadata)
        if rows or (checked.faults and options.skip_bad):
            try:
                planned = plan_add(project, rows, reporter, options, refuse_conflicts=False, workers=workers)
            except UserError as refusal:
                refusals.append(refusal)
            else:
                effect, conflicts = _effect(planned), planned.fresh_conflicts
                if planned.fresh_conflicts and data.conflicts == "error":
                    refusals.append(planned.merged.refusal(planned.fresh_conflicts))
    return Preview(checked, dict(metadata.most_common()), tuple(map(_beforehand, refusals)), effect, tuple(conflicts))


def _beforehand(refusal: UserError) -> UserError:
    """Return the error of ``add`` in the conditional, since a check tries nothing."""
    what = re.sub(r"(nothing) was (added|replaced)", r"\1 would be \2", refusal.what, flags=re.IGNORECASE)
    return UserError(what, where=refusal.where, fix=refusal.fix)


def _effect(planned: AddPlan) -> Effect:
    merged, draft = planned.merged, planned.draft
    fates = [draft.fate(row, merged) for row in planned.rows]
    counts = Counter(fate["fate"] for fate in fates)
    repeats = [
        (row.example, merged.kept[fate["of"]])
        for row, fate in zip(planned.rows, fates, strict=True)
        if fate["fate"] == "duplicate"
    ]
    exact = sum(
        example.prompt_key == kept.prompt_key for example, kept in repeats
    )  # their outputs are equal in any case
    sizes = []
    for split in SPLITS:
        members = [member for member in draft.members if member.split == split]
        new = sum(member.key in merged.first for member in members)
        sizes.append(SplitSize(split, len(members), new, len({member.cluster for member in members})))
    return Effect(
        added=counts["added"],
        known=counts["known"] - len(planned.superseded),
        superseded=len(planned.superseded),
        exact_duplicates=exact,
        near_kept=len(planned.near),
        near_dropped=len(repeats) - exact,
        replaced=counts["replaced"],
        removed=counts["removed"],
        conflicts=len(planned.fresh_conflicts),
        contaminated=len({hit.row for hit in draft.hits}),
        moved=len(draft.moved),
        splits=tuple(sizes),
    )


@contextmanager
def prepare_add(
    project: ProjectFolder,
    files: Iterable[str | Path],
    reporter: Reporter,
    options: AddOptions,
    workers: Workers | None = None,
) -> Iterator[tuple[ProjectFolder, Sequence[Path], Workers]]:
    """Yield the project with the options in its config, the files to read, and the workers.

    Args:
        workers: check and compare the rows (None: those of ``compute.cluster``).

    Raises:
        UserError: no such file, or a mapping that no file uses.
    """
    paths = source_files(files, reporter)
    data = map_columns(project.config.data, options.mapping, paths)
    if options.accept_conflicts:
        data = data.model_copy(update={"conflicts": "accept"})
    optioned = ProjectFolder(project.root, project.config.model_copy(update={"data": data}))
    with open_workers(project.config, reporter) if workers is None else nullcontext(workers) as opened:
        yield optioned, paths, opened


def map_columns(data: DataConfig, mapping: ColumnMapping, paths: Sequence[Path]) -> DataConfig:
    """Return the config's data section with a mapping's values.

    Raises:
        UserError: a value is empty, or no file uses it.
    """
    options = {
        "rows": mapping.rows,
        "sheet": mapping.sheet,
        "input": mapping.input_column,
        "output": mapping.output_column,
    }
    given = {key: option for key, option in options.items() if option is not None}
    empty = [key for key, option in given.items() if not option]
    if empty:
        raise UserError("Must not be empty", where=f"--{empty[0]}", fix="Omit it to use the config's value.")
    data = data.model_copy(update=given)
    if mapping.sheet is not None and not any(map(is_workbook, paths)):
        raise UserError("No file is an .xlsx workbook", where="--sheet", fix="Leave it out for these files.")
    columns = [key for key in given if key in ("input", "output")]
    if columns:
        require_columns(paths, data, "--" + "/--".join(columns))
    return data


@dataclass(frozen=True)
class AddPlan:
    """A planned version; nothing is written yet."""

    rows: Sequence[SourceRow]
    merged: Merge
    conflicts: tuple[Conflict, ...]
    duplicates: tuple[Duplicate, ...]
    near: tuple[Duplicate, ...]
    draft: VersionDraft
    inherited: InheritedSplit | None
    restored: Sequence[Removal]

    @property
    def fresh_conflicts(self) -> list[Conflict]:
        """Conflicts that involve a new row."""
        return self.merged.fresh(self.conflicts)

    @property
    def superseded(self) -> list[SourceRow]:
        """Rows that an earlier replacement superseded and that stay out."""
        gone = self.merged.superseded & self.merged.edited.keys()
        return [row for row in self.rows if row.example.pair_key in gone]

    @property
    def created(self) -> bool:
        """True if the planned version differs from the current one."""
        return self.merged.parent is None or self.merged.parent.digest != members_digest(self.draft.members)


def plan_add(
    project: ProjectFolder,
    rows: Sequence[SourceRow],
    reporter: Reporter,
    options: AddOptions,
    *,
    refuse_conflicts: bool = True,
    workers: Workers = THIS_PROCESS,
) -> AddPlan:
    """Merge screened rows into the current version, cluster and split them, without writing anything.

    Args:
        project: as for ``add``.
        rows: the rows to add.
        reporter: receives warnings on rows left out, moved or doubtful.
        options: as for ``add``.
        refuse_conflicts: raise for new conflicts, unless data.conflicts accepts them; else see ``fresh_conflicts``.
        workers: compare the rows.

    Raises:
        UserError: new conflicts, too few rows to split, a dataset changed by hand.
    """
    data = project.config.data
    with reporter.task("merging", len(rows), "examples") as task:
        merged = merge(
            project.dataset,
            rows,
            data.dedup_threshold,
            reporter,
            duplicates=data.duplicates,
            replace=options.replace,
            restore=options.restore,
            accept=data.conflicts == "accept",
            workers=workers,
        )
        task.advance(len(rows))
    rows = merged.rows
    conflicts = merged.conflicts()
    accepted = data.conflicts == "accept"
    if refuse_conflicts and not accepted and (fresh := merged.fresh(conflicts)):
        raise merged.refusal(fresh)
    if data.duplicates == "keep":
        merged = compared(merged, data.dedup_threshold, reporter, workers)
    duplicates = merged.duplicates(rows)
    if duplicates:
        reporter.warn(notices.duplicates(duplicates, data.duplicates))
    _report_merge(merged, rows, options, reporter)
    inherited = (
        inherit_split(options.split_from, merged.parent, merged.kept) if options.split_from is not None else None
    )
    if inherited and data.split_by == "output_template":
        refuse_split_templates(inherited, merged.kept)
    draft = draft_version(project, merged, rows, reporter, inherited.splits if inherited else None, workers)
    if inherited:
        reporter.say(inheritance_notice(inherited, draft.members))
    near = merged.near_duplicates({m.key for m in draft.members})
    if near:
        reporter.say(notices.near_duplicates(near))
    back = removals_ended_by(project.dataset, [merged.first[key] for key in merged.first if key in merged.kept])
    if options.restore and not back and not merged.superseded:
        reporter.say("Nothing to restore: no row of these files was removed earlier.")
    planned = AddPlan(rows, merged, conflicts, duplicates, near, draft, inherited, back)
    if planned.superseded:
        reporter.say(notices.superseded(planned.superseded))
    if planned.created:
        _warn(merged, draft, merged.fresh(conflicts) if accepted else [], reporter)
    return planned


def _report_merge(merged: Merge, rows: Sequence[SourceRow], options: AddOptions, reporter: Reporter) -> None:
    """Report rows that stay out, replace others or have other weights."""
    if merged.withheld:
        reporter.warn(removed_rows_notice(rows, merged.withheld))
    if options.replace and not merged.replacement.olds:
        reporter.say("Nothing to replace: no input in these files has another output in the dataset.")
    if merged.replacement.edits_kept:
        reporter.warn(notices.kept_edits(merged.replacement.edits_kept))
    if merged.replacement.olds:
        reporter.say(notices.replaced(merged.replaced()))
        tested = sum(merged.former.get(key) == "test" for key in merged.replacement.olds)
        if tested:
            reporter.warn(f"{tested:,} test rows were replaced: scores of the two versions are not comparable.")
    if merged.replacement.sets.inputs:
        reporter.say(f"{merged.replacement.sets}.")
    if merged.reweighted:
        reporter.warn(notices.reweighted([merged.kept[key] for key in merged.reweighted]))


def _warn(merged: Merge, draft: VersionDraft, accepted: Sequence[Conflict], reporter: Reporter) -> None:
    parent: DatasetVersion | None = merged.parent
    notices.warn_of_another_system_turn(
        [m.example for m in parent.domain] if parent else [],
        [merged.kept[key] for key in merged.first if key in merged.kept],
        reporter,
    )
    domain = [m for m in draft.members if not m.mixed]
    notices.warn_of_contents(domain, accepted, draft.moved, draft.largest, reporter)
    if draft.largest:
        reporter.say(notices.largest(draft.largest))
    if draft.held:
        reporter.warn(notices.contaminated(draft.held, dropping=False))
    notices.warn_of_untrained_answers(domain, reporter)
    if draft.outputs.high:
        reporter.warn(notices.known_outputs(draft.outputs))
    if draft.mixed:
        about, wanted, left_out = draft.mixed.about, draft.mixed.wanted, draft.mixed.left_out
        if about.drawn < wanted:
            reporter.warn(
                f"{about.source.name} has only {about.drawn:,} usable rows to mix in (data.mix asks for {wanted:,})."
            )
        if left_out:
            reporter.warn(notices.not_mixed([(f"{row.source}:{row.line}", reason) for row, reason in left_out]))
        reporter.say(f"Mixed in: {about.drawn:,} of {about.source.rows:,} rows of {about.source.name} (training only)")
