"""Applying reviewers' edits: a new dataset version with the corrected answers, without the rows to leave out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import file_digest
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of
from tunewright.data.dedup import count_near_repeats
from tunewright.data.examples import Example
from tunewright.data.pii import secret_kinds
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.validate import edited_answer
from tunewright.data.review.reviews import (
    CHANGES,
    REVIEWS_FILE,
    ReviewLog,
    VerdictEvent,
    append_reviews,
    continued_draw,
    event_digest,
    read_reviews,
)
from tunewright.data.splits import MINIMUM_CLUSTERS, SPLITS
from tunewright.data.versions import (
    DatasetVersion,
    Manifest,
    Member,
    SourceFile,
    import_files,
    import_records,
    load_version,
    locked,
    save_version,
    short,
)
from tunewright.data.versions.logs import Removal, append_removals
from tunewright.data.versions.version import new_manifest, rename_clusters


@dataclass(frozen=True)
class AppliedEdit:
    """A row with an edited answer: former and present pair key, reviewers, and line of the log.

    ``review`` is the verdict's digest, which identifies it in a log where it has another line. ``collapsed`` is true if
    the version already had the pair with that answer, so that two rows became one.
    """

    before: str
    now: str
    reviewers: tuple[str, ...]
    line: int
    review: str
    collapsed: bool


@dataclass(frozen=True)
class EditResult:
    """The new version, which is current, and its edited rows."""

    version: Manifest
    edited: tuple[AppliedEdit, ...]
    disputed: tuple[str, ...]
    """Pair keys of disputed edits (different answers, or a verdict "right"), left unchanged."""
    left_out: tuple[str, ...] = ()
    """Pair keys of the rows that the new version lacks, because reviewers left them out."""


def apply_edits(project: ProjectFolder, reporter: Reporter, *, message: str = "") -> EditResult:
    """Create a version from the current one with the edited answers; splits are unchanged.

    Rows with the verdict ``leave-out`` are removed as by `data remove`: adding their file does not bring them back.

    A row keeps its cluster, which depends on its input. With data.split_by: output_template it also
    depends on the output; the next `data add` recomputes it. If the pair with the new answer exists
    already, the two rows become one, with a warning.
    """
    dataset = project.dataset
    with locked(dataset):
        parent = load_version(dataset)
        reviews = read_reviews(dataset)
        agreed, disputed = _chosen(reviews, parent)
        chosen = {key: said for key, said in agreed.items() if said[0].verdict == "edit"}
        gone = {m.key: m.example for m in parent.members if m.key in agreed.keys() - chosen.keys()}
        if disputed:
            named = ", ".join(short(key) for key in disputed[:10])
            reporter.warn(f"{len(disputed):,} rows stay unchanged, because reviewers disagree: {named}")
        if not agreed:
            raise UserError(
                "No row of the current version has an edit that reviewers agree on, or is to be left out",
                where=str(dataset / REVIEWS_FILE),
                fix="Record edits in `tunewright data review` with the key e, and rows to leave out with l.",
            )
        _require_no_secrets(chosen, project)
        members, edited = _apply(parent, chosen, reviews)
        if twice := [e for e in edited if e.now in gone]:
            edited_key, same = short(twice[0].before), short(twice[0].now)
            raise UserError(
                f"Row {edited_key} is edited into the text of row {same}, which is to be left out",
                where=REVIEWS_FILE,
                fix="Take one of the two verdicts back.",
            )
        members = [member for member in members if member.key not in gone]
        if gone:
            require_enough(members, "data review")
        collapsed = [e for e in edited if e.collapsed]
        if collapsed:
            named = ", ".join(f"{short(e.before)} became {short(e.now)}" for e in collapsed[:10])
            reporter.warn(f"{len(collapsed):,} edited rows duplicate an existing row and were merged: {named}")
        names = ", ".join(sorted({judged.reviewer for said in agreed.values() for judged in said}))
        parts = [f"{count_of(len(edited), 'answer')} edited"] if edited else []
        parts += [f"{count_of(len(gone), 'row')} left out"] if gone else []
        own = f"{' and '.join(parts)} in review ({names})"
        source = SourceFile(
            name=f"{dataset.name}/{REVIEWS_FILE}", sha256=file_digest(dataset / REVIEWS_FILE), rows=len(agreed)
        )
        now = {e.now for e in edited}
        members = rename_clusters(without_unaccepted(dataset, parent.manifest, members, reporter, now))
        version = new_manifest(
            members,
            parent,
            parent.manifest.settings,
            message=f"{own}: {message}" if message else own,
            sources=[source],
            duplicates=len(collapsed),
            mix=parent.manifest.mix,
            near_duplicates=count_near_repeats(members, parent.manifest.settings.dedup_threshold, reporter),
        )
        because = f"left out in review ({names})"
        imports = _records(source.name, edited, {key: reviews.line(agreed[key][0]) for key in gone}, because)
        # The log comes first, as in `data remove`.
        append_removals(dataset, Removal.of_rows("removed", gone, because, dataset.parent))
        version = save_version(dataset, version, members, imports, reporter)
        # The new version continues its parent's sample, so that an edit does not cost the review.
        before = (parent.digest, [m.key for m in parent.domain])
        after = (version.digest, [m.key for m in members if not m.mixed])
        drawn = continued_draw(read_reviews(dataset), before, after, {edit.before: edit.now for edit in edited})
        if drawn is not None:
            append_reviews(dataset, [drawn])
    return EditResult(version, tuple(edited), tuple(disputed), tuple(gone))


def _require_no_secrets(chosen: Mapping[str, Sequence[VerdictEvent]], project: ProjectFolder) -> None:
    """Refuse edited answers with secrets, which a log from elsewhere may contain."""
    for key, edits in chosen.items():
        if found := secret_kinds(edits[0].output or "", project.config.data.allow):
            raise UserError(
                f"The edited answer of row {short(key)} by {edits[0].reviewer} contains a secret ({found})",
                where=REVIEWS_FILE,
                fix="Review the row again without the secret. Revoke the secret: it is in the log.",
            )


def _records(source: str, edited: Sequence[AppliedEdit], gone: Mapping[str, int], because: str) -> list[dict[str, Any]]:
    """Return the records of imports.jsonl; ``gone`` are the rows left out, by pair key, with their lines of the log."""
    changed = [
        {
            "source": source,
            "line": e.line,
            "review": e.review,
            "fate": "edited",
            "key": e.now,
            "before": e.before,
            "reviewers": list(e.reviewers),
        }
        for e in sorted(edited, key=lambda e: e.line)
    ]
    removed = [
        {"source": source, "line": line, "fate": "removed", "key": key, "reason": because} for key, line in gone.items()
    ]
    return changed + removed


def _chosen(reviews: ReviewLog, version: DatasetVersion) -> tuple[dict[str, list[VerdictEvent]], list[str]]:
    """Return the changes that all reviewers of a row agree on, by pair key, and the keys of disputed ones."""
    chosen: dict[str, list[VerdictEvent]] = {}
    disputed: list[str] = []
    for member in version.domain:
        if member.key not in reviews.stacks:
            continue
        edits = [judged for judged in reviews.current_verdicts(member.key).values() if judged.verdict in CHANGES]
        if not edits:
            continue
        if reviews.disputed(member.key):
            disputed.append(member.key)
        else:
            chosen[member.key] = edits
    return chosen, disputed


def _apply(
    parent: DatasetVersion, chosen: dict[str, list[VerdictEvent]], reviews: ReviewLog
) -> tuple[list[Member], list[AppliedEdit]]:
    members = {m.key: m for m in parent.members if m.key not in chosen}
    edited: list[AppliedEdit] = []
    for member in parent.members:
        if member.key not in chosen:
            continue
        output = chosen[member.key][0].output
        assert output is not None
        try:
            last = edited_answer(member.example, output)
        except RowError as error:
            by = chosen[member.key][0].reviewer
            raise UserError(
                f"The edited answer of row {short(member.key)} by {by} is not valid: {error}",
                where=REVIEWS_FILE,
                fix=f"{error.fix} Review the row again.",
            ) from None
        example = Example((*member.example.prompt, last))
        key = example.pair_key
        names = tuple(sorted(judged.reviewer for judged in chosen[member.key]))
        first = chosen[member.key][0]
        line, review = reviews.line(first), event_digest(first)
        edited.append(AppliedEdit(member.key, key, names, line, review, collapsed=key in members))
        members.setdefault(key, replace(member, example=example, key=key))
    return rename_clusters(list(members.values())), edited


def require_enough(left: Iterable[Member], where: str) -> None:
    """Refuse a version with too few clusters, or without rows in a split; ``left`` are its members."""
    domain = [m for m in left if not m.mixed]
    clusters = len({m.cluster for m in domain})
    empty = next((split for split in SPLITS if all(m.split != split for m in domain)), None)
    what = f"No {empty} row would be left, nothing was removed"
    if empty is None:
        what = (
            f"Only {len(domain):,} rows in {clusters} independent clusters would be left (minimum {MINIMUM_CLUSTERS} "
            "clusters), nothing was removed"
        )
    if empty is not None or clusters < MINIMUM_CLUSTERS:
        raise UserError(what, where=where, fix="Add rows first, or remove fewer.")


def superseded_keys(dataset: Path, manifest: Manifest) -> dict[str, str]:
    """Return the pair keys that edits replaced in a version or its ancestors: former key to present key.

    If a file with the former row is added again, the row is known and the edit stays. Rows that `data add --replace`
    replaced count as edits.
    """
    steps: dict[str, str] = {}
    for entry in import_records(reversed(import_files(dataset, manifest)), "edited", "replaced"):
        for gone in (entry["before"], *entry.get("besides", ())):
            steps = {before: entry["key"] if now == gone else now for before, now in steps.items()}
            steps[gone] = entry["key"]
        steps.pop(entry["key"], None)
    return steps


def unaccepted_keys(dataset: Path, manifest: Manifest | None, generated: Collection[str]) -> frozenset[str]:
    """Return the generated rows that no person has accepted: by the verdict "right", or by an applied edit.

    ``manifest`` is the version that has the edits; None means that there is no version.
    """
    if not generated:
        return frozenset()
    reviews = read_reviews(dataset)
    files = import_files(dataset, manifest) if manifest else []
    edited = {record["key"] for record in import_records(files, "edited")}

    def accepted(key: str) -> bool:
        found = reviews.finding(key)
        return found == "right" or (found is None and key in edited)

    return frozenset(key for key in generated if not accepted(key))


def without_unaccepted(
    dataset: Path, manifest: Manifest, members: Sequence[Member], reporter: Reporter, edited: Collection[str] = ()
) -> list[Member]:
    """Return the members of a new version without held-out generated rows whose acceptance was withdrawn.

    ``manifest`` is the previous version's; ``edited`` are rows that a person edits in the new version.
    """
    held_out = {m.key for m in members if m.generated and m.split != "train"} - set(edited)
    gone = unaccepted_keys(dataset, manifest, held_out)
    if gone:
        named = ", ".join(short(key) for key in sorted(gone)[:10])
        what = count_of(len(gone), "generated row")
        reporter.warn(f"{what} of dev or test left out, because the acceptance was withdrawn: {named}")
    return [m for m in members if m.key not in gone]


@dataclass(frozen=True)
class PendingEdit:
    """A row with changes that are in no version yet: reviewer to new answer, None to leave the row out."""

    member: Member
    outputs: dict[str, str | None]
    disputed: bool


def pending_edits(reviews: ReviewLog, version: DatasetVersion) -> list[PendingEdit]:
    """Return the rows of a version with pending edits, the disputed ones last, which :func:`apply_edits` leaves out."""
    chosen, disputed = _chosen(reviews, version)
    members = {member.key: member for member in version.domain}
    return [
        PendingEdit(members[key], {name: e.output for name, e in said.items() if e.verdict in CHANGES}, key in disputed)
        for key in (*chosen, *disputed)
        if (said := reviews.current_verdicts(key))
    ]
