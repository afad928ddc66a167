"""What adding files would do, without writing anything: the same steps as ``add``, every refusal collected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data import notices
from tunewright.data.add import Arrival, Plan, plan
from tunewright.data.notices import Conflict
from tunewright.data.readers import SourceRow
from tunewright.data.readers.file_check import FileCheck, check_files
from tunewright.data.screening import screen
from tunewright.data.splits import SPLITS


@dataclass(frozen=True)
class SplitSize:
    """One split of the version that would be made: its rows, how many of them are new, and its clusters."""

    split: str
    rows: int
    new: int
    clusters: int


@dataclass(frozen=True)
class Effect:
    """What would become of the rows without faults; rows in ``contaminated`` hold a test row or a benchmark item."""

    added: int
    known: int
    exact_duplicates: int
    """Left out."""
    near_kept: int
    """Among those added: near-duplicates, in the cluster of the row that they are like."""
    near_dropped: int
    """Near-duplicates left out, where data.duplicates is "drop"."""
    replaced: int
    """Rows that would take the place of known ones with their input and another output."""
    superseded: int
    """Rows that an earlier `data add --replace` took out and that stay out."""
    removed: int
    """Rows that were removed earlier and stay out."""
    conflicts: int
    contaminated: int
    moved: int
    splits: tuple[SplitSize, ...]


@dataclass(frozen=True)
class Preview:
    """What is in some files, and what `data add` would do with them; ``effect`` is None where it could not be told."""

    files: FileCheck
    metadata: dict[str, int]
    """Keys that would be kept as metadata, with their rows."""
    refusals: tuple[UserError, ...]
    """Why `data add` would add nothing."""
    effect: Effect | None
    conflicts: tuple[Conflict, ...] = ()
    """All conflicts that new rows make."""

    @property
    def ok(self) -> bool:
        """True if `data add` would add the files with the same options."""
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
    paths: Sequence[Path],
    reporter: Reporter,
    *,
    skip_bad: bool = False,
    redact: bool = False,
    presidio: str | None = None,
    arrival: Arrival | None = None,
) -> Preview:
    """Check files against the current version; rows are held in memory, as by ``add``.

    Args:
        project: as for ``add``.
        paths: the files.
        reporter: is warned as by ``add``.
        skip_bad, redact, presidio: as for ``add``.
        arrival: the other options of ``add``; by default it is called without them.

    Raises:
        UserError: the config's templates or JMESPath are invalid, or the dataset was changed by hand.
    """
    rows: list[SourceRow] = []
    checked = check_files(paths, project.config.data, reporter, rows)
    refusals: list[UserError] = []
    if checked.faults and skip_bad:
        reporter.warn(notices.skipped(checked.faults))
    elif checked.faults:
        refusals.append(notices.faulty(checked.faults))
    try:
        rows = screen(rows, project.config.data.allow, reporter, redact=redact, presidio=presidio).rows
    except UserError as refusal:
        refusals.append(refusal)
    effect, conflicts = None, list[Conflict]()
    metadata = Counter(key for row in rows for key in row.metadata)
    if rows or (checked.faults and skip_bad):
        try:
            planned = plan(project, rows, reporter, arrival or Arrival(), refuse_conflicts=False)
        except UserError as refusal:
            refusals.append(refusal)
        else:
            effect, conflicts = _effect(planned), planned.fresh_conflicts
            if planned.fresh_conflicts and project.config.data.conflicts == "error":
                refusals.append(planned.merged.refusal(planned.fresh_conflicts))
    return Preview(checked, dict(metadata.most_common()), tuple(map(_beforehand, refusals)), effect, tuple(conflicts))


def _beforehand(refusal: UserError) -> UserError:
    """Return the refusal of ``add`` as a check words it: nothing has been tried yet."""
    what = refusal.what.replace("nothing was added", "nothing would be added").replace(
        "nothing was replaced", "nothing would be replaced"
    )
    return UserError(what, where=refusal.where, fix=refusal.fix)


def _effect(planned: Plan) -> Effect:
    merged, found = planned.merged, planned.found
    fates = [found.fate(row, merged) for row in planned.rows]
    counts = Counter(fate["fate"] for fate in fates)
    repeats = [
        (row.example, merged.kept[fate["of"]])
        for row, fate in zip(planned.rows, fates, strict=True)
        if fate["fate"] == "duplicate"
    ]
    exact = sum(example.asked == kept.asked for example, kept in repeats)  # their outputs are equal in any case
    sizes = []
    for split in SPLITS:
        members = [member for member in found.members if member.split == split]
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
        contaminated=len({hit.row for hit in found.hits}),
        moved=len(found.moved),
        splits=tuple(sizes),
    )
