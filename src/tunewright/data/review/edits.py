"""Answers that reviewers wrote become a new dataset version."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import file_digest, text_lines
from tunewright.core.progress import Reporter
from tunewright.data.examples import Example
from tunewright.data.pii import told_secrets
from tunewright.data.repeats import count_near_repeats
from tunewright.data.review.reviews import REVIEWS_FILE, Judged, Reviews, event_digest, read_reviews
from tunewright.data.versions import (
    DatasetVersion,
    Manifest,
    Member,
    Source,
    import_files,
    load_version,
    locked,
    save_version,
    short,
)
from tunewright.data.versions.making import LeftOut, new_manifest, renamed


@dataclass(frozen=True)
class Edited:
    """A row that got a better answer: its former and its present pair key, who wrote it and on which line of the log.

    ``review`` is the verdict's digest: it names the verdict also in a log where it is on another line.
    ``collapsed``: the version had the pair with that answer already, so two rows became one.
    """

    before: str
    now: str
    reviewers: tuple[str, ...]
    line: int
    review: str
    collapsed: bool


@dataclass(frozen=True)
class EditResult:
    """The new version, which is current, and the rows in it that were edited."""

    version: Manifest
    edited: tuple[Edited, ...]
    disputed: tuple[str, ...]
    """Pair keys that reviewers gave different answers, or that another called right: left as they are."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        return {
            "version": self.version.model_dump(mode="json"),
            "edited": [asdict(edit) for edit in self.edited],
            "disputed": list(self.disputed),
        }


def apply_edits(project: ProjectFolder, reporter: Reporter, *, message: str = "") -> EditResult:
    """Make a version of the current one in which edited rows have their new answer; splits stay as they are.

    A row keeps its cluster: that depends on its input, and only where data.split_by says so on its output, which the
    next `data add` looks at again. Where the pair with the new answer is there
    already, the two rows become one, and this is told.

    Raises:
        UserError: there is no edit of a row of the current version, or the dataset cannot be read or written.
    """
    dataset = project.dataset
    with locked(dataset):
        parent = load_version(dataset)
        reviews = read_reviews(dataset)
        chosen, disputed = _chosen(reviews, parent)
        if disputed:
            named = ", ".join(short(key) for key in disputed[:10])
            reporter.warn(f"{len(disputed):,} edited rows are left as they are, because reviewers disagree: {named}")
        if not chosen:
            raise UserError(
                "no row of the current version has an edit that reviewers agree on",
                where=str(dataset / REVIEWS_FILE),
                fix="`tunewright data review` records them, with the key e.",
            )
        _refuse_secrets(chosen, project.config.data.allow)
        members, edited = _apply(parent, chosen, reviews)
        collapsed = [e for e in edited if e.collapsed]
        if collapsed:
            named = ", ".join(f"{short(e.before)} became {short(e.now)}" for e in collapsed[:10])
            reporter.warn(f"{len(collapsed):,} edited rows repeat a row that is there, so they became one: {named}")
        names = sorted({name for e in edited for name in e.reviewers})
        own = f"{len(edited):,} answers edited in review ({', '.join(names)})"
        source = Source(
            name=f"{dataset.name}/{REVIEWS_FILE}", sha256=file_digest(dataset / REVIEWS_FILE), rows=len(edited)
        )
        version = new_manifest(
            members,
            parent,
            parent.manifest.settings,
            message=f"{own}: {message}" if message else own,
            sources=[source],
            left_out=LeftOut(duplicates=len(collapsed)),
            mix=parent.manifest.mix,
            near_duplicates=count_near_repeats(members, parent.manifest.settings.dedup_threshold, reporter),
        )
        version = save_version(dataset, version, members, _imports(edited, source), reporter)
    return EditResult(version, tuple(edited), tuple(disputed))


def _chosen(reviews: Reviews, version: DatasetVersion) -> tuple[dict[str, list[Judged]], list[str]]:
    """Return the edits that all who judged a row agree on, by pair key; and the keys of those that they don't."""
    chosen: dict[str, list[Judged]] = {}
    disputed: list[str] = []
    for member in version.domain:
        said = [judged for judged in reviews.standing(member.key).values() if judged.verdict != "skip"]
        edits = [judged for judged in said if judged.verdict == "edit"]
        if not edits:
            continue
        if any(judged.verdict == "right" for judged in said) or len({judged.output for judged in edits}) > 1:
            disputed.append(member.key)
        else:
            chosen[member.key] = edits
    return chosen, disputed


def _refuse_secrets(chosen: dict[str, list[Judged]], allow: Collection[str]) -> None:
    """A log that came from elsewhere may hold what no reviewer here could have recorded."""
    for key, edits in chosen.items():
        if found := told_secrets(edits[0].output or "", allow):
            raise UserError(
                f"the edited answer of row {short(key)} by {edits[0].reviewer} holds a secret ({found})",
                where=REVIEWS_FILE,
                fix="Have the row judged again, without it. Whoever had the log has had it: revoke what can be.",
            )


def _apply(
    parent: DatasetVersion, chosen: dict[str, list[Judged]], reviews: Reviews
) -> tuple[list[Member], list[Edited]]:
    members = {m.key: m for m in parent.members if m.key not in chosen}
    edited: list[Edited] = []
    for member in parent.members:
        if member.key not in chosen:
            continue
        output = chosen[member.key][0].output
        assert output is not None
        last = replace(member.example.messages[-1], content=output)
        example = Example((*member.example.messages[:-1], last))
        key = example.pair_key
        names = tuple(sorted(judged.reviewer for judged in chosen[member.key]))
        first = chosen[member.key][0]
        line, review = reviews.line(first), event_digest(first)
        edited.append(Edited(member.key, key, names, line, review, collapsed=key in members))
        members.setdefault(key, replace(member, example=example, key=key))
    return renamed(list(members.values())), edited


def _imports(edited: Sequence[Edited], source: Source) -> list[dict[str, Any]]:
    return [
        {
            "source": source.name,
            "line": e.line,
            "review": e.review,
            "fate": "edited",
            "key": e.now,
            "before": e.before,
            "reviewers": list(e.reviewers),
        }
        for e in sorted(edited, key=lambda e: e.line)
    ]


def replaced(dataset: Path, manifest: Manifest) -> dict[str, str]:
    """Return the rows that edits took out of a version or those before it: former pair key to the one that came of it.

    A file with the former row may be added again; the row is then known, and its edit stands. Rows that
    `data add --replace` put in another's place count as edits.
    """
    steps: dict[str, str] = {}
    for path in reversed(import_files(dataset, manifest)):
        for line in text_lines(path.read_text(encoding="utf-8")):
            if '"fate":"edited"' in line or '"fate":"replaced"' in line:  # canonical JSON; most lines need no parsing
                entry = json.loads(line)
                for gone in (entry["before"], *entry.get("besides", ())):
                    steps = {before: entry["key"] if now == gone else now for before, now in steps.items()}
                    steps[gone] = entry["key"]
                steps.pop(entry["key"], None)
    return steps


def waiting_edits(reviews: Reviews, version: DatasetVersion) -> tuple[int, int]:
    """Return how many rows of a version have an edit that is not in it yet: agreed on, and disputed."""
    chosen, disputed = _chosen(reviews, version)
    return len(chosen), len(disputed)
