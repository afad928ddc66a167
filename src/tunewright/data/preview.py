"""Checking files before they are added: every fault, and the effect of `data add` on the dataset."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.config import DataConfig
from tunewright.config.project import OpenFolder
from tunewright.core.errors import UserError
from tunewright.data import notices
from tunewright.data.add import map_columns, prepare_add
from tunewright.data.add_plan import AddPlan, plan_add
from tunewright.data.given_split import require_given_rows, settings_of
from tunewright.data.notices import Conflict
from tunewright.data.options import AddOptions, ColumnMapping
from tunewright.data.readers import SourceRow, file_check, has_generated_rows, source_size, unmapped
from tunewright.data.readers.file_check import Change, FileCheck
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.sources import first_rows, is_workbook, open_source
from tunewright.data.screening import screen
from tunewright.data.splits import SPLITS, Split


@dataclass(frozen=True)
class SplitSize:
    """Size of one split in the planned version: rows, new rows and clusters."""

    split: Split
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
    """Near-duplicates among the added rows, each in the cluster of the row it resembles."""
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
    overlapping: int
    """Rows near a held-out row that is given to another split: left out, moved or kept (data.on_overlap)."""
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


def check_files(project: OpenFolder, files: Iterable[str | Path] | None, options: AddOptions = AddOptions()) -> Preview:
    """Check files against the current version as ``add`` would with the same arguments; memory holds the rows' keys.

    Raises:
        UserError: a template or JMESPath of the config is invalid, or the dataset was changed by hand.
    """
    folder, reporter = project.folder, project.reporter
    rows: list[SourceRow] = []
    refusals: list[UserError] = []
    with prepare_add(folder, files, reporter, options) as (folder, paths, workers):
        data = folder.config.data
        own = {path: settings_of(path, folder) for path in paths}
        checked = file_check.check_files(list(paths), data, reporter, rows, workers, paths, own)
        if checked.faults and options.skip_bad:
            reporter.warn(notices.skipped(checked.faults))
        elif checked.faults:
            refusals.append(notices.faulty(checked.faults))
        try:
            require_given_rows(paths, rows)
            rows = screen(
                rows, data.allow, reporter, redact=options.redact, presidio=options.presidio, workers=workers
            ).rows
        except UserError as refusal:
            refusals.append(refusal)
        effect, conflicts = None, list[Conflict]()
        metadata = Counter(key for row in rows for key in row.metadata)
        if rows or (checked.faults and options.skip_bad):
            try:
                planned = plan_add(folder, rows, reporter, options, refuse_conflicts=False, workers=workers)
            except UserError as refusal:
                refusals.append(refusal)
            else:
                effect, conflicts = _effect(planned), planned.merged.fresh_conflicts
                if conflicts and data.conflicts == "error":
                    refusals.append(planned.merged.refusal)
    for number, error in enumerate(refusals):  # in the conditional mood, since a check adds nothing
        what = re.sub(r"(nothing) was (added|replaced)", r"\1 would be \2", error.what, flags=re.IGNORECASE)
        refusals[number] = UserError(what, where=error.where, fix=error.fix)
    return Preview(checked, dict(metadata.most_common()), tuple(refusals), effect, tuple(conflicts))


def _effect(plan: AddPlan) -> Effect:
    merged = plan.merged
    fates = [(row, plan.fate(row)) for row in merged.rows]
    counts = Counter(fate["fate"] for _, fate in fates)
    repeats = [(row.example, merged.kept[fate["of"]]) for row, fate in fates if fate["fate"] == "duplicate"]
    # Their outputs are equal in any case.
    exact = sum(example.prompt_key == kept.prompt_key for example, kept in repeats)
    sizes = []
    for split in SPLITS:
        members = [member for member in plan.members if member.split == split]
        new = sum(member.key in merged.first for member in members)
        sizes.append(SplitSize(split, len(members), new, len({member.cluster for member in members})))
    superseded = len(merged.left_out_as_superseded)
    return Effect(
        added=counts["added"],
        known=counts["known"] - superseded,
        superseded=superseded,
        exact_duplicates=exact,
        near_kept=len(plan.near),
        near_dropped=len(repeats) - exact,
        replaced=counts["replaced"],
        removed=counts["removed"],
        conflicts=len(merged.fresh_conflicts),
        contaminated=len({hit.row for hit in plan.hits}),
        overlapping=len(plan.overlapping),
        moved=len(plan.moved),
        splits=tuple(sizes),
    )


@dataclass(frozen=True)
class FilePreview:
    """The columns (or keys) of a file and its first rows without a fault."""

    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]


def preview_file(project: OpenFolder, file: str | Path, mapping: ColumnMapping = ColumnMapping()) -> FilePreview:
    """Return the columns of a file of pairs, regardless of their names, and its first three rows.

    Raises:
        UserError: the file cannot be read, or two columns have the same name.
    """
    given = {key: value for key, value in mapping.given.items() if key in ("rows", "sheet", "header_row")}
    rows = first_rows(Path(file), settings_of(Path(file), project.folder).model_copy(update=given))[:3]
    return FilePreview(tuple(dict.fromkeys(key for row in rows for key in row)), tuple(rows))


def rows_at(file: Path, data: DataConfig, lines: Collection[int]) -> dict[int, dict[str, Any]]:
    """Return a file's unchecked rows at these lines or rows, as far as they can be parsed."""
    found: dict[int, dict[str, Any]] = {}
    last = max(lines, default=0)
    for raw in open_source(file, unmapped(data) if has_generated_rows(file) else data, []).rows:
        if raw.line > last:
            break
        if raw.line in lines and not isinstance(raw.row, RowError):
            found[raw.line] = raw.row
    return found


def sheets(_project: OpenFolder, file: str | Path) -> tuple[str, ...]:
    """Return the titles of a workbook's visible sheets; empty for other files."""
    if not is_workbook(Path(file)):
        return ()
    from tunewright.data.readers.workbooks import visible_sheets

    return visible_sheets(Path(file))


def fix_file(
    project: OpenFolder,
    file: str | Path,
    out: str | Path,
    mapping: ColumnMapping = ColumnMapping(),
    *,
    leave_out: Collection[int] = (),
    answers: Mapping[int, str] | None = None,
) -> list[Change]:
    """Write a corrected copy of a file of pairs, and list every change.

    The copy lacks the rows at ``leave_out`` lines, and has ``answers`` where those at their lines are empty.
    """
    data = map_columns(settings_of(Path(file), project.folder), mapping, [Path(file)])
    with project.reporter.task("correcting", source_size(Path(file)), "bytes") as task:
        return file_check.fix_file(Path(file), Path(out), data, task, leave_out, answers)
