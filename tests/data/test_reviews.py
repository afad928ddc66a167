"""Verdicts: never lost, never counted for a text they were not given on, and taken back only by their reviewer."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
from data_helpers import Listener, unlike_pairs
from hypothesis import given
from hypothesis import strategies as st
from review_helpers import add_pairs, judge_next, review, reviewed_project, right, status

from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.data.options import ReviewOptions
from tunewright.data.review.label_models import Suspect
from tunewright.data.review.report import review_report
from tunewright.data.review.reviews import VerdictEvent, append_reviews, read_reviews
from tunewright.data.review.session import ReviewSession
from tunewright.data.versions import load_version


@pytest.fixture
def project(tmp_path: Path) -> ProjectFolder:
    return reviewed_project(tmp_path / "p")


def _judged(key: str, **changes: object) -> VerdictEvent:
    fields = {"key": key, "verdict": "right", "version": "v", "reviewer": "ada", "when": now()}
    return VerdictEvent.model_validate({**fields, **changes})


def test_right_rows_lead_to_acceptance_with_grounds(project: ProjectFolder) -> None:
    session = review(project)
    assert status(project) == "under review: no row checked yet, at least 72 more to check"
    judge_next(session, *right(71))
    assert status(project) == "under review: 0 of 71 wrong, at least 1 more to check"
    judge_next(session, "right")
    assert status(project) == "accepted: 0 of 72 wrong, under 5% at 95%"
    assert session.next() is None


def test_skipped_row_is_unsettled_and_returns_in_the_next_session(project: ProjectFolder) -> None:
    session = review(project)
    (skipped,) = judge_next(session, "skip")
    judge_next(session, "right")
    assert status(project).endswith(", 1 unsettled")
    assert judge_next(review(project), "right") == [skipped]
    assert "unsettled" not in status(project)


def test_skipped_row_is_offered_once_more_when_only_it_keeps_the_sample_from_its_verdict(
    project: ProjectFolder,
) -> None:
    session = review(project)
    (skipped,) = judge_next(session, "skip")
    others = judge_next(session, *right(71))
    assert status(project) == ("under review: 0 of 72 wrong, a skipped or disputed row has to be settled, 1 unsettled")
    assert judge_next(session, "skip") == [skipped]
    (further,) = judge_next(session, "right")
    assert further not in (skipped, *others), "the reviewer cannot judge it, so the sample continues"
    again = review(project)
    assert judge_next(again, "right") == [skipped]
    assert status(project) == "accepted: 0 of 72 wrong, under 5% at 95%"


def test_undo_withdraws_the_latest_verdict_and_is_recorded(
    project: ProjectFolder,
) -> None:
    keys = judge_next(review(project), "right", "wrong")
    later = review(project)
    undone = later.undo()
    assert undone is not None
    assert (undone.member.key, undone.number) == (keys[1], 2)
    card = later.next()
    assert card is not None
    assert card.member.key == keys[1]
    assert status(project).startswith("under review: 0 of 1 wrong")
    log = (project.dataset / "reviews.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in log] == ["draw", "verdict", "verdict", "undo"]


def test_undo_ignores_other_reviewers(project: ProjectFolder) -> None:
    judge_next(review(project, "ada"), "right")
    assert review(project, "ben").undo() is None
    assert status(project).startswith("under review: 0 of 1 wrong")


def test_verdicts_survive_a_new_version(project: ProjectFolder) -> None:
    version = load_version(project.dataset)
    # All rows of the version, so that the first row of the next sample was reviewed.
    append_reviews(project.dataset, [_judged(m.key, version=version.digest) for m in version.members])
    add_pairs(project, [*reversed(unlike_pairs(200)), ("one row more, unlike any other 123", "answer")])
    session = review(project)
    found = session.outcome
    assert found is not None
    new = ({m.key for m in load_version(project.dataset).members} - {m.key for m in version.members}).pop()
    assert found.checked == min(session.order.index(new), 72)


def test_verdict_ends_when_the_text_changes(tmp_path: Path) -> None:
    pairs = unlike_pairs(60)
    before = reviewed_project(tmp_path / "before", pairs=pairs)
    after = reviewed_project(tmp_path / "after", pairs=[(pairs[0][0], "another answer"), *pairs[1:]])
    old, new = load_version(before.dataset), load_version(after.dataset)
    append_reviews(after.dataset, [_judged(m.key) for m in old.members])
    reviews = read_reviews(after.dataset)
    assert [m.example.output for m in new.members if reviews.finding(m.key) is None] == ["another answer"]


def test_disagreement_leaves_a_row_unsettled(project: ProjectFolder) -> None:
    (key,) = judge_next(review(project, "ada"), "right")
    judge_next(review(project, "ben", second=True), "wrong")
    assert read_reviews(project.dataset).finding(key) == "unsettled"
    assert status(project).endswith(", 1 unsettled")
    assert review(project, "ben", second=True).undo() is not None
    judge_next(review(project, "ben", second=True), "right")
    assert read_reviews(project.dataset).finding(key) == "right"


def test_disputed_row_is_shown_to_a_third_reviewer_only(project: ProjectFolder) -> None:
    (key,) = judge_next(review(project, "ada"), "right")
    judge_next(review(project, "ben", second=True), "wrong")
    offered = {name: card.member.key for name in ("ada", "ben", "cyd") if (card := review(project, name).next())}
    assert offered["cyd"] == key
    assert key not in (offered["ada"], offered["ben"])


def test_settled_conflict_ends_the_dispute_and_is_no_agreement(project: ProjectFolder) -> None:
    keys = judge_next(review(project, "ada"), "right", "wrong")
    judge_next(review(project, "ben", second=True), "wrong", "wrong")
    before = review_report(project.dataset, load_version(project.dataset))
    assert before.conflicts == (keys[0],)
    settling = review(project, "ben", conflicts=True)
    assert settling.needed == 1
    assert judge_next(settling, "right") == [keys[0]]
    after = review_report(project.dataset, load_version(project.dataset))
    assert after.conflicts == ()
    assert read_reviews(project.dataset).finding(keys[0]) == "right"
    assert [(found.agreed, found.rows) for found in after.agreements] == [(1, 2)]
    assert after.agreements == before.agreements
    assert settling.undo() is not None
    assert settling.needed == 1


def test_conflicts_are_those_with_a_verdict_of_the_reviewer(project: ProjectFolder) -> None:
    judge_next(review(project, "ada"), "edit", output="one answer")
    judge_next(review(project, "ben", second=True), "edit", output="another answer")
    assert {name: review(project, name, conflicts=True).needed for name in ("ada", "ben", "cyd")} == {
        "ada": 1,
        "ben": 1,
        "cyd": 0,
    }
    with pytest.raises(UserError, match="--conflicts cannot be combined"):
        review(project, "ada", conflicts=True, second=True)


def test_note_is_replaced_removed_and_never_a_secret(project: ProjectFolder) -> None:
    session = review(project)
    card = session.next()
    assert card is not None
    assert session.note(card, " odd ") == "Noted."
    session.note(card, "very odd")
    assert "secret" in session.note(card, "AKIAIOSFODNN7EXAMPLZ")
    assert read_reviews(project.dataset).notes == {card.member.key: {"ada": "very odd"}}
    assert session.next() == card, "a note is no verdict"
    session.note(card, "")
    assert read_reviews(project.dataset).notes == {card.member.key: {}}


def test_second_review_covers_exactly_the_judged_rows(project: ProjectFolder) -> None:
    keys = judge_next(review(project, "ada"), "right", "skip", "wrong")
    second = review(project, "ben", second=True)
    assert judge_next(second, "right", "wrong") == [keys[0], keys[2]]
    assert second.next() is None


def test_redraw_is_another_recorded_sample(project: ProjectFolder) -> None:
    judge_next(review(project), "wrong", "wrong")
    again = review(project, redraw=True)
    judge_next(again, *right(3))
    assert status(project).endswith(", draw 2")
    drawn = [json.loads(line) for line in (project.dataset / "reviews.jsonl").read_text().splitlines()]
    assert [event["draw"] for event in drawn if event["event"] == "draw"] == [0, 1]


def test_another_plan_for_a_sample_is_refused(project: ProjectFolder) -> None:
    review(project)
    version = load_version(project.dataset)
    with pytest.raises(UserError, match="another plan"):
        ReviewSession(project.dataset, version, "ada", Listener(), ReviewOptions(fixed=5))
    ReviewSession(project.dataset, version, "ada", Listener(), ReviewOptions(fixed=5, redraw=True))
    # 208 by the plan, but 200 rows are all there are.
    assert status(project) == "under review: no row checked yet, at least 200 more to check, draw 2"


def test_suspects_are_reviewed_apart_from_the_sample(project: ProjectFolder) -> None:
    version = load_version(project.dataset)
    order = review(project).order
    suspect = Suspect(order[-1], 1.0, "label", "other rows suggest otherwise")
    apart = ReviewSession(project.dataset, version, "ada", Listener(), suspects=[suspect])
    card = apart.next()
    assert card is not None
    assert card.why == "label: other rows suggest otherwise"
    apart.judge(card, "wrong")
    assert apart.next() is None
    assert apart.status == "suspects: 1 of 1 reviewed"
    assert status(project).startswith("under review: no row checked yet")
    assert json.loads((project.dataset / "reviews.jsonl").read_text().splitlines()[-1]).get("draw") is None


def test_edit_that_is_unusable_is_no_verdict(project: ProjectFolder) -> None:
    session = review(project)
    card = session.next()
    assert card is not None
    assert "is unchanged" in session.edit(card, card.member.example.output)
    assert "empty" in session.edit(card, " \n")
    assert "editor failed" in session.edit(card, None)
    assert session.edit(card, "pay with 4539 1488 0343 6467").startswith("The answer contains a secret (payment card")
    assert session.next() == card
    assert session.edit(card, "better") == ""
    assert session.next() != card


def test_half_a_line_loses_only_its_verdict(project: ProjectFolder) -> None:
    keys = judge_next(review(project), "right", "right", "right")
    path = project.dataset / "reviews.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    listener = Listener()
    again = ReviewSession(project.dataset, load_version(project.dataset), "ada", listener)
    assert ["cut off by a crash" in warned for warned in listener.warned] == [True]
    assert judge_next(again, "wrong") == [keys[2]]
    assert [e.event for e in read_reviews(project.dataset).events] == ["draw", *["verdict"] * 3]


@pytest.mark.parametrize("line", ["nonsense", '{"event": "undo", "key": 1}'])
def test_invalid_line_is_named(project: ProjectFolder, line: str) -> None:
    judge_next(review(project), "right")
    path = project.dataset / "reviews.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(UserError) as refused:
        status(project)
    assert refused.value.where == f"{path}:1"


@given(st.binary(max_size=80), st.integers(0, 300))
def test_damaged_log_never_causes_a_traceback(tmp_path_factory: pytest.TempPathFactory, damage: bytes, at: int) -> None:
    folder = tmp_path_factory.mktemp("log")
    append_reviews(folder, [_judged("a"), _judged("b", verdict="edit", output="c")])
    path = folder / "reviews.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
    try:
        read_reviews(folder)
    except UserError as error:
        assert error.where is not None
        assert error.where.startswith(str(path))


def _append_many(folder: Path, name: str) -> None:
    for number in range(25):
        append_reviews(folder, [_judged(f"{name}{number}", reviewer=name, verdict="edit", output="x" * 9000)])


@pytest.mark.slow
def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # at work at once: both write while the other does
    writers = [context.Process(target=_append_many, args=(tmp_path, name)) for name in ("ada", "ben")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_reviews(tmp_path).events) == 50
