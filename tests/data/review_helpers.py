"""Helpers of the review tests: a small dataset, and verdicts without a terminal."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

from data_helpers import Listener, Pair, new_project, unlike_pairs, write_jsonl

from tunewright.config.project import ProjectFolder
from tunewright.data.add import add
from tunewright.data.options import ReviewOptions
from tunewright.data.review.report import review_status
from tunewright.data.review.reviews import Verdict
from tunewright.data.review.session import ReviewSession
from tunewright.data.versions import DatasetVersion, load_version


def reviewed_project(root: Path, count: int = 200, pairs: list[Pair] | None = None) -> ProjectFolder:
    """A project with a version of pairs that have little in common."""
    if pairs is None:
        shutil.copytree(Path(_unlike(count).name) / "p", root)
        return ProjectFolder(root)
    project = new_project(root, "data: {conflicts: accept}\n")
    add_pairs(project, pairs)
    return project


@cache
def _unlike(count: int) -> tempfile.TemporaryDirectory[str]:
    """Make the project that tests work on copies of."""
    folder = tempfile.TemporaryDirectory(prefix="reviewed-")
    reviewed_project(Path(folder.name) / "p", pairs=unlike_pairs(count))
    return folder


def add_pairs(project: ProjectFolder, pairs: list[Pair]) -> DatasetVersion:
    """Add pairs; the version there is then."""
    add(project, [write_jsonl(project.root / "pairs.jsonl", pairs)], Listener())
    return load_version(project.dataset)


def review(
    project: ProjectFolder,
    reviewer: str = "ada",
    *,
    second: bool = False,
    conflicts: bool = False,
    redraw: bool = False,
) -> ReviewSession:
    """A pass over the current version's sample."""
    version = load_version(project.dataset)
    options = ReviewOptions(second=second, conflicts=conflicts, redraw=redraw)
    return ReviewSession(project.dataset, version, reviewer, Listener(), options)


def judge_next(session: ReviewSession, *verdicts: Verdict, output: str = "a better answer") -> list[str]:
    """Give these verdicts on the next rows; the rows' keys."""
    keys = []
    for verdict in verdicts:
        card = session.next()
        assert card is not None
        session.judge(card, verdict, output if verdict == "edit" else None)
        keys.append(card.member.key)
    return keys


def right(count: int) -> list[Verdict]:
    """Record a number of right verdicts."""
    return ["right"] * count


def status(project: ProjectFolder) -> str:
    """Return the review status of the current version, without its name."""
    reported = review_status(project.dataset)
    assert reported is not None
    name, digest, rest = reported.split(" ", 2)
    assert (name, digest) == ("Version", load_version(project.dataset).digest[:12])
    return rest
