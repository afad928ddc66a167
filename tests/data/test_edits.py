"""Edits become a version: the answers change and nothing else does; the random sample continues with what was found."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from data_helpers import Listener, unlike_pairs
from review_helpers import add_pairs, judge_next, review, reviewed_project, right, status

from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.data.review.acceptance import SequentialPlan
from tunewright.data.review.edits import apply_edits, pending_edits, superseded_keys
from tunewright.data.review.report import review_report
from tunewright.data.review.reviews import (
    DrawEvent,
    ReviewLog,
    Sample,
    VerdictEvent,
    continued_draw,
    read_reviews,
    sample_of,
)
from tunewright.data.review.session import ReviewItem
from tunewright.data.versions import load_version
from tunewright.data.versions.logs import read_removals


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


def test_rows_left_out_are_gone_with_the_edits_and_do_not_come_back_with_their_file(project: ProjectFolder) -> None:
    before = load_version(project.dataset)
    gone, edited, disputed = (m.key for m in [m for m in before.members if m.split == "train"][:3])
    _edit(project, edited, "a better answer")
    ada, ben = review(project), review(project, "ben")
    ada.judge(ReviewItem(ada.members[gone], 1), "leave-out")
    ben.judge(ReviewItem(ben.members[gone], 1), "wrong")
    ada.judge(ReviewItem(ada.members[disputed], 1), "leave-out")
    _edit(project, disputed, "another answer", "ben")
    assert [each.member.key for each in pending_edits(read_reviews(project.dataset), before)][2:] == [disputed]
    result = apply_edits(project, Listener())
    after = load_version(project.dataset)
    assert (result.left_out, result.disputed) == ((gone,), (disputed,))
    assert after.manifest.message == "1 answer edited and 1 row left out in review (ada)"
    assert {m.example.question_key for m in before.members} - {m.example.question_key for m in after.members} == {
        next(m.example.question_key for m in before.members if m.key == gone)
    }
    assert read_removals(project.dataset).out[gone].because == "left out in review (ada)"
    again = add_pairs(project, [(m.example.input_text, m.example.output) for m in before.members if m.key == gone])
    assert gone not in {m.key for m in again.members}
    assert "not reviewed" in status(project)


def test_leaving_out_too_many_rows_changes_nothing(project: ProjectFolder) -> None:
    before, session = load_version(project.dataset), review(project)
    for member in [m for m in before.members if m.split == "test"]:
        session.judge(ReviewItem(member, 1), "leave-out")
    with pytest.raises(UserError, match="No test row would be left, nothing was removed"):
        apply_edits(project, Listener())
    assert load_version(project.dataset).digest == before.digest
    assert not read_removals(project.dataset).events


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


# The random sample after edits


def test_one_edit_costs_no_judgement_of_an_accepted_version(project: ProjectFolder) -> None:
    judge_next(review(project), *right(72))
    assert status(project) == "accepted: 0 of 72 wrong, under 5% at 95%"
    unseen = review(project).order[150]
    _edit(project, unseen, "another word")
    apply_edits(project, Listener())
    assert status(project) == "accepted: 0 of 72 wrong, under 5% at 95%, 72 checked in an earlier version"
    assert review(project).next() is None
    report = review_report(project.dataset, load_version(project.dataset))
    assert "72 judgements of the sample carry over from an earlier version." in report.lines


def test_row_of_the_sample_stays_wrong_after_its_edit(project: ProjectFolder) -> None:
    judge_next(review(project), *right(5), "edit", *right(4))
    before = review(project).needed
    apply_edits(project, Listener())
    assert status(project).startswith("under review: 1 of 10 wrong")
    assert review(project).needed == before
    # Judging the new text again changes nothing: the sample stands for rows that were not mended.
    (edited,) = (m.key for m in load_version(project.dataset).domain if m.example.output == "a better answer")
    session = review(project)
    assert edited not in session.order
    session.judge(ReviewItem(session.members[edited], 1), "right")
    assert status(project).startswith("under review: 1 of 10 wrong")


def test_rejected_version_is_followed_by_a_sample_of_its_own(project: ProjectFolder) -> None:
    judge_next(review(project), "edit", "edit", output="mended")
    assert status(project).startswith("rejected")
    apply_edits(project, Listener())
    assert status(project) == "not reviewed"
    version = load_version(project.dataset)
    ordered = sorted(
        (m.key for m in version.domain), key=lambda key: hashlib.sha256(f"{version.digest}:0:{key}".encode()).digest()
    )
    assert review(project).order == ordered


def test_added_rows_need_a_sample_of_their_own(project: ProjectFolder) -> None:
    judge_next(review(project), *right(3))
    add_pairs(project, [*unlike_pairs(200), ("one more question", "one more answer")])
    assert status(project) == "not reviewed"


def test_rows_that_become_one_keep_both_places(tmp_path: Path) -> None:
    pairs = [*unlike_pairs(40), ("the same question as ever", "yes"), ("the same question as ever", "no")]
    project = reviewed_project(tmp_path / "p", pairs=pairs)
    judge_next(review(project), "right")
    output = {m.key: m.example.output for m in load_version(project.dataset).domain}
    gone = next(key for key, text in output.items() if text == "no")
    _edit(project, gone, "yes")
    apply_edits(project, Listener())
    version = load_version(project.dataset)
    drawn = read_reviews(project.dataset).latest_draw(version.digest)
    assert drawn is not None
    sample = sample_of(drawn, [m.key for m in version.domain])
    assert len(sample.order) == 42 and len(set(sample.order)) == 41
    assert len(review(project).order) == 41


@dataclass
class _Row:
    """A row of the brute-force model: where it was drawn from, its key now, and what people said about it."""

    first: str
    key: str
    said: str | None = None
    frozen: bool = False


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_rows_that_need_a_look_are_those_of_a_model_without_versions(tmp_path: Path, seed: int) -> None:
    """The model keeps one list of rows in the order of the first draw, whatever versions there are."""
    project = reviewed_project(tmp_path / "p", 60)
    chance = random.Random(seed)
    version = load_version(project.dataset)
    rows = [
        _Row(m.key, m.key)
        for m in sorted(version.domain, key=lambda m: hashlib.sha256(f"{version.digest}:0:{m.key}".encode()).digest())
    ]
    judged = edits = 0
    for turn in range(4):
        for _ in range(chance.randint(4, 9)):
            card = review(project).next()
            open_rows = [row for row in rows if row.said is None]
            assert (card is None) == (not open_rows)
            if card is None:
                break
            row = open_rows[0]
            assert card.member.key == row.key
            said = "edit" if not edits and chance.random() < 0.2 else "right"
            edits += said == "edit"
            judge_next(review(project), said, output=f"mended {turn} {row.first[:6]}")  # type: ignore[arg-type]
            row.said, judged = said, judged + 1
        first_open = next((place for place, row in enumerate(rows) if row.said is None), len(rows))
        for row in chance.sample(rows[first_open + 1 :], 2):  # suspects that the sample has not reached
            if row.said is None:
                _edit(project, row.key, f"suspect {turn} {row.first[:6]}")
                row.said = "edit"
        if not any(row.said == "edit" and not row.frozen for row in rows):
            continue
        checked = next((place for place, row in enumerate(rows) if row.said is None), len(rows))
        now_of = {each.before: each.now for each in apply_edits(project, Listener()).edited}
        for place, row in enumerate(rows):
            if row.key in now_of:
                row.key = now_of[row.key]
                row.frozen, row.said = (True, "wrong") if place < checked else (False, None)
        wrong = sum(row.said in ("wrong", "edit") for row in rows[:checked])
        assert f"{wrong} of {checked} wrong" in status(project)


_ROWS, _RUNS, _SEEN = 400, 150, 40


def _log(draws: list[DrawEvent], said: dict[str, str]) -> ReviewLog:
    judged = [
        VerdictEvent(
            key=key,
            verdict=verdict,  # type: ignore[arg-type]
            output="x" if verdict == "edit" else None,
            version="v",
            reviewer="ada",
            when=now(),
        )
        for key, verdict in said.items()
    ]
    return ReviewLog((*draws, *judged))


def _accepts(sample: Sample, said: dict[str, str], bad: set[str]) -> bool:
    judged = {key: said.get(key, "wrong" if key in bad else "right") for key in sample.order}
    return sample.outcome(_log([], judged)).decision == "accepted"


def test_version_at_the_limit_is_seldom_accepted_however_it_was_mended() -> None:
    """Each version has 8% wrong rows. After 40 rows, people mend what they found and suspects, until 5% are left."""
    accepted = naive = continued = 0
    for run in range(_RUNS):
        chance = random.Random(run)
        keys = [f"{run}-{number}" for number in range(_ROWS)]
        bad = set(chance.sample(keys, round(0.08 * _ROWS)))
        drawn = DrawEvent(draw=0, plan=SequentialPlan(), version=f"{run}", reviewer="ada", when=now())
        order = sample_of(drawn, keys).order
        said = {key: "edit" if key in bad else "right" for key in order[:_SEEN]}
        found = [key for key in order[:_SEEN] if key in bad]
        left = sorted(key for key in order[_SEEN:] if key in bad)
        chance.shuffle(left)  # people who edit suspects do not see the order of the sample
        mended = [*found, *left[: max(0, len(bad) - len(found) - round(0.05 * _ROWS))]]
        edits = {key: f"{key}'" for key in mended}
        after = [edits.get(key, key) for key in keys]
        still = bad - edits.keys()
        assert len(still) >= 0.05 * _ROWS
        reviews = _log([drawn], said | dict.fromkeys(left[: len(mended) - len(found)], "edit"))
        made = continued_draw(reviews, (f"{run}", keys), (f"{run}'", after), edits)
        if made is None:  # rejected: the sample that follows is independent, and its error is the plan's own
            continue
        continued += 1
        assert made.continues is not None
        known = {key: verdict for key, verdict in said.items() if key not in edits}
        accepted += _accepts(sample_of(made, after), known, still)
        forgetful = made.model_copy(update={"continues": made.continues.model_copy(update={"wrong": ()})})
        naive += _accepts(sample_of(forgetful, after), known, still)
    assert continued > _RUNS / 4
    # At most 5% of all runs, and three standard errors; a sample that forgets what it found accepts far more.
    assert accepted <= 0.05 * _RUNS + 3 * (_RUNS * 0.05 * 0.95) ** 0.5
    assert naive > 2 * accepted and naive > 0.05 * _RUNS
