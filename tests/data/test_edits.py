"""Edits become a version: the answers change and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_helpers import Listener, unlike_pairs
from review_helpers import judge_next, review, reviewed_project, status

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.review.edits import apply_edits, superseded_keys
from tunewright.data.review.report import review_report
from tunewright.data.review.session import ReviewItem
from tunewright.data.versions import load_version


@pytest.fixture
def project(tmp_path: Path) -> ProjectFolder:
    return reviewed_project(tmp_path / "p")


def _edit(project: ProjectFolder, key: str, output: str, reviewer: str = "ada") -> None:
    session = review(project, reviewer)
    session.judge(ReviewItem(session.members[key], 1), "edit", output)


def test_apply_edits_changes_answers_but_not_splits_or_clusters(project: ProjectFolder) -> None:
    before = load_version(project.dataset)
    keys = [m.key for m in before.members if m.split == "test"][:2]
    for key in keys:
        _edit(project, key, f"better {key[:4]}")
    result = apply_edits(project, Listener(), message="after the first look")
    after = load_version(project.dataset)
    assert after.digest == result.version.digest != before.digest
    assert after.manifest.parent == before.digest
    assert after.manifest.message == "2 answers edited in review (ada): after the first look"
    outputs = {m.example.input_text: (m.example.output, m.split) for m in after.members}
    for member in before.members:
        output = f"better {member.key[:4]}" if member.key in keys else member.example.output
        assert outputs[member.example.input_text] == (output, member.split)
    assert after.manifest.counts == before.manifest.counts
    assert after.split_digest("train") == before.split_digest("train")
    assert after.split_digest("test") != before.split_digest("test")


def test_apply_edits_names_clusters_after_their_smallest_key(tmp_path: Path) -> None:
    stem = "which court of appeals sits in the county of "
    relatives = [(f"{stem}{name}", f"court {name}") for name in ("Adams", "Adama", "Adamb")]
    project = reviewed_project(tmp_path / "p", pairs=[*unlike_pairs(40), *relatives])
    for number in range(3):  # so that the smallest key changes, whichever way the digests fall
        members = load_version(project.dataset).members
        _edit(project, next(m.key for m in members if m.example.input_text.endswith("Adams")), f"court {number}")
        apply_edits(project, Listener())
        family = [m for m in load_version(project.dataset).members if "county of" in m.example.input_text]
        assert {m.cluster for m in family} == {min(m.key for m in family)}


def test_apply_edits_reports_rows_that_become_one(tmp_path: Path) -> None:
    pairs = [*unlike_pairs(40), ("the same question as ever", "yes"), ("the same question as ever", "no")]
    project = reviewed_project(tmp_path / "p", pairs=pairs)
    before = load_version(project.dataset)
    assert before.manifest.counts.conflicts == 1
    _edit(project, next(m.key for m in before.members if m.example.output == "no"), "yes")
    listener = Listener()
    result = apply_edits(project, listener)
    assert [e.collapsed for e in result.edited] == [True]
    assert any("were merged" in warned for warned in listener.warned)
    counts = load_version(project.dataset).manifest.counts
    assert (counts.rows, counts.conflicts, counts.duplicates) == (41, 0, 1)


def test_apply_edits_reports_and_skips_disputed_edits(project: ProjectFolder) -> None:
    keys = [m.key for m in load_version(project.dataset).members[:3]]
    _edit(project, keys[0], "one answer")
    _edit(project, keys[0], "another answer", "ben")
    _edit(project, keys[1], "agreed")
    _edit(project, keys[1], "agreed", "ben")
    listener = Listener()
    result = apply_edits(project, listener)
    assert result.disputed == (keys[0],)
    assert [(e.before, e.reviewers) for e in result.edited] == [(keys[1], ("ada", "ben"))]
    assert any(keys[0][:12] in warned for warned in listener.warned)
    assert result.edited[0].before == keys[1]


def test_apply_edits_skips_withdrawn_edits(project: ProjectFolder) -> None:
    session = review(project)
    judge_next(session, "edit")
    session.undo()
    before = load_version(project.dataset).digest
    with pytest.raises(UserError, match="No row of the current version has an edit"):
        apply_edits(project, Listener())
    assert load_version(project.dataset).digest == before


def test_applied_edits_keep_the_review_and_are_not_applied_twice(project: ProjectFolder) -> None:
    judge_next(review(project), "edit")
    before = status(project)
    apply_edits(project, Listener())
    assert status(project) == f"{before}, 1 checked in an earlier version"
    with pytest.raises(UserError, match="No row"):
        apply_edits(project, Listener())


def test_superseded_keys_follow_several_edits(project: ProjectFolder) -> None:
    key = start = load_version(project.dataset).members[0].key
    for output in ("first", "second"):
        _edit(project, key, output)
        key = apply_edits(project, Listener()).edited[0].now
    version = load_version(project.dataset)
    assert superseded_keys(project.dataset, version.manifest)[start] == key
    assert {m.key for m in version.members} >= set(superseded_keys(project.dataset, version.manifest).values())


def test_apply_edits_restores_the_first_row_when_edited_back(project: ProjectFolder) -> None:
    first, other = load_version(project.dataset).members[:2]
    _edit(project, first.key, "first")
    changed = apply_edits(project, Listener()).edited[0].now
    _edit(project, changed, first.example.output)
    _edit(project, other.key, "changed with it")
    edited = {e.before: e.now for e in apply_edits(project, Listener()).edited}
    assert edited[changed] == first.key
    version = load_version(project.dataset)
    assert superseded_keys(project.dataset, version.manifest) == edited


def test_apply_edits_makes_an_existing_version_current(project: ProjectFolder) -> None:
    before = load_version(project.dataset)
    first = before.members[0]
    _edit(project, first.key, "first")
    changed = apply_edits(project, Listener()).edited[0].now
    _edit(project, changed, first.example.output)
    listener = Listener()
    assert apply_edits(project, listener).version == before.manifest
    assert load_version(project.dataset).digest == before.digest
    assert any("exists already" in warned for warned in listener.warned)


def test_apply_edits_refuses_secrets(project: ProjectFolder) -> None:
    before = load_version(project.dataset)
    _edit(project, before.members[0].key, "pay with 4539 1488 0343 6467")
    with pytest.raises(UserError, match=r"by ada contains a secret \(payment card number\)"):
        apply_edits(project, Listener())
    assert load_version(project.dataset).digest == before.digest


def test_waiting_edits_exclude_disputed_ones(project: ProjectFolder) -> None:
    version = load_version(project.dataset)
    for reviewer, output in (("ada", "one"), ("ben", "two")):
        _edit(project, version.members[0].key, output, reviewer)
    report = review_report(project.dataset, version)
    assert (report.edits, report.disputed) == (0, 1)
    assert any("disputed edits" in line for line in report.lines)
