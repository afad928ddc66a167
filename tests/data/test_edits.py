"""Edits become a version: the answers change and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import Listener, Pair, unlike_pairs
from review_helpers import judge_next, review, reviewed_project, status

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.review.edits import apply_edits, replaced
from tunewright.data.review.passes import Card
from tunewright.data.review.report import review_report
from tunewright.data.versions import load_version
from tunewright.data.versions.find import find_row


@pytest.fixture
def project(tmp_path: Path) -> ProjectFolder:
    return reviewed_project(tmp_path / "p")


def _edit(project: ProjectFolder, key: str, output: str, reviewer: str = "ada") -> None:
    under_way = review(project, reviewer)
    under_way.judge(Card(under_way.members[key], 1), "edit", output)


def test_an_edit_changes_the_answer_and_neither_split_nor_cluster_of_any_row(project: ProjectFolder) -> None:
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


def _family() -> list[Pair]:
    stem = "which court of appeals sits in the county of "
    return [*unlike_pairs(40), *((f"{stem}{name}", f"court {name}") for name in ("Adams", "Adama", "Adamb"))]


def test_a_cluster_stays_together_under_the_name_of_its_smallest_key(tmp_path: Path) -> None:
    project = reviewed_project(tmp_path / "p", pairs=_family())
    before = load_version(project.dataset)
    first = next(m for m in before.members if m.example.input_text.endswith("Adams"))
    for number in range(3):  # so that the smallest key changes, whichever way the digests fall
        _edit(project, first.key, f"another court {number}")
        apply_edits(project, Listener())
        after = load_version(project.dataset)
        family = [m for m in after.members if "county of" in m.example.input_text]
        assert {m.cluster for m in family} == {min(m.key for m in family)}
        first = next(m for m in family if m.example.input_text.endswith("Adams"))


def test_an_edit_that_makes_two_rows_one_is_told(tmp_path: Path) -> None:
    pairs = [*unlike_pairs(40), ("the same question as ever", "yes"), ("the same question as ever", "no")]
    project = reviewed_project(tmp_path / "p", pairs=pairs)
    before = load_version(project.dataset)
    assert before.manifest.counts.conflicts == 1
    _edit(project, next(m.key for m in before.members if m.example.output == "no"), "yes")
    listener = Listener()
    result = apply_edits(project, listener)
    assert [e.collapsed for e in result.edited] == [True]
    assert any("became one" in warned for warned in listener.warned)
    counts = load_version(project.dataset).manifest.counts
    assert (counts.rows, counts.conflicts, counts.duplicates) == (41, 0, 1)


def test_edits_that_reviewers_disagree_on_are_left_and_told(project: ProjectFolder) -> None:
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
    assert json.loads(json.dumps(result.as_dict()))["edited"][0]["before"] == keys[1]


def test_an_edit_taken_back_is_not_applied(project: ProjectFolder) -> None:
    under_way = review(project)
    judge_next(under_way, "edit")
    under_way.undo()
    before = load_version(project.dataset).digest
    with pytest.raises(UserError, match="no row of the current version has an edit"):
        apply_edits(project, Listener())
    assert load_version(project.dataset).digest == before


def test_a_new_version_is_reviewed_anew_and_applied_edits_are_not_applied_twice(project: ProjectFolder) -> None:
    judge_next(review(project), "edit")
    apply_edits(project, Listener())
    assert status(project) == "not reviewed"
    with pytest.raises(UserError, match="no row"):
        apply_edits(project, Listener())


def test_an_edited_row_is_found_by_its_line_in_the_log(project: ProjectFolder) -> None:
    judge_next(review(project), "right", "edit", output="found by its line")
    apply_edits(project, Listener())
    version = load_version(project.dataset)
    assert find_row(project.dataset, version, "reviews.jsonl:3").example.output == "found by its line"


def test_what_was_replaced_leads_to_the_present_row_through_several_edits(project: ProjectFolder) -> None:
    key = start = load_version(project.dataset).members[0].key
    for output in ("first", "second"):
        _edit(project, key, output)
        key = apply_edits(project, Listener()).edited[0].now
    version = load_version(project.dataset)
    assert replaced(project.dataset, version.manifest)[start] == key
    assert {m.key for m in version.members} >= set(replaced(project.dataset, version.manifest).values())


def test_an_edit_back_to_the_first_answer_brings_the_first_row_back(project: ProjectFolder) -> None:
    first, other = load_version(project.dataset).members[:2]
    _edit(project, first.key, "first")
    changed = apply_edits(project, Listener()).edited[0].now
    _edit(project, changed, first.example.output)
    _edit(project, other.key, "changed with it")
    edited = {e.before: e.now for e in apply_edits(project, Listener()).edited}
    assert edited[changed] == first.key
    version = load_version(project.dataset)
    assert replaced(project.dataset, version.manifest) == edited


def test_edits_that_lead_back_to_an_earlier_version_make_it_current_and_say_so(project: ProjectFolder) -> None:
    before = load_version(project.dataset)
    first = before.members[0]
    _edit(project, first.key, "first")
    changed = apply_edits(project, Listener()).edited[0].now
    _edit(project, changed, first.example.output)
    listener = Listener()
    assert apply_edits(project, listener).version == before.manifest
    assert load_version(project.dataset).digest == before.digest
    assert any("was there already" in warned for warned in listener.warned)


def test_a_secret_in_a_log_from_elsewhere_does_not_become_a_version(project: ProjectFolder) -> None:
    before = load_version(project.dataset)
    _edit(project, before.members[0].key, "pay with 4539 1488 0343 6467")
    with pytest.raises(UserError, match=r"by ada holds a secret \(payment card number\)"):
        apply_edits(project, Listener())
    assert load_version(project.dataset).digest == before.digest


def test_disputed_edits_are_not_offered_to_be_applied(project: ProjectFolder) -> None:
    version = load_version(project.dataset)
    for reviewer, output in (("ada", "one"), ("ben", "two")):
        _edit(project, version.members[0].key, output, reviewer)
    report = review_report(project.dataset, version)
    assert (report.edits, report.disputed) == (0, 1)
    assert any("reviewers disagree" in line for line in report.lines)
