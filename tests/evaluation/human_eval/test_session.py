"""A reviewer's pass: what is said is kept at once, taken back, and gone on with after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from making.human_evaluations import begin, evaluation, evaluation_with_incumbent, side_of_treatment
from tunewright.core.errors import UserError
from tunewright.evaluation.human_eval.results import review_results
from tunewright.evaluation.human_eval.session import BlindPair, BlindReview, Side, reviewers_progress
from tunewright.evidence.files import load_items


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return evaluation(tmp_path / "evaluation")


def _next(review: BlindReview) -> BlindPair:
    pair = review.next()
    assert pair is not None
    return pair


def _prefer_a(review: BlindReview, count: int) -> None:
    for _ in range(count):
        _answer(review, "A")


def _answer(review: BlindReview, *sides: Side) -> list[BlindPair]:
    pairs = []
    for side in sides:
        pairs.append(_next(review))
        review.answer(pairs[-1], side)
    return pairs


def test_incumbent_is_compared_apart_on_the_items_that_it_answered(tmp_path: Path) -> None:
    folder = evaluation_with_incumbent(tmp_path / "evaluation")
    prompting, hosted = begin(folder), begin(folder, against="hosted")
    assert (hosted.sample.treatment, hosted.sample.control) == ("tuned", "incumbent-hosted")
    answers = {item.key: item.answers for item in load_items(folder)}
    assert list(answers)[-1] not in hosted.sample.order
    assert hosted.sample.items == 39
    for review in (prompting, hosted):
        while (pair := review.next()) is not None:
            own = answers[pair.key]
            assert {pair.a, pair.b} == {own[review.sample.treatment], own[review.sample.control]}
            review.answer(pair, "A" if side_of_treatment(review, pair) == "A" else "B")
    shared = sorted(set(prompting.sample.order) & set(hosted.sample.order))
    same = [
        side_of_treatment(prompting, prompting.item(k)) == side_of_treatment(hosted, hosted.item(k)) for k in shared
    ]
    assert len(set(same)) == 2, "one comparison would give the sides of the other away"
    found = review_results(folder, against="hosted")
    assert (found.control, found.preferred) == ("incumbent-hosted", (len(hosted.sample.order), 0))
    assert review_results(folder).control == prompting.sample.control != "incumbent-hosted"
    at = {each.against: each.reviewers["ada"].answered for each in reviewers_progress(folder)}
    assert at == {None: len(prompting.sample.order), "hosted": len(hosted.sample.order)}


def test_unknown_incumbent_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    folder = evaluation_with_incumbent(tmp_path / "evaluation")
    with pytest.raises(UserError, match="no incumbent 'other'") as refused:
        begin(folder, against="other")
    assert refused.value.fix == "Use one of: hosted."
    with pytest.raises(UserError, match="no incumbent 'hosted'"):
        begin(evaluation(tmp_path / "alone"), against="hosted")


def test_pair_sides_follow_the_seed(folder: Path) -> None:
    review = begin(folder)
    items = {item.key: item for item in load_items(folder)}
    sides = set()
    for key in review.open_keys():
        pair, answers = review.item(key), items[key].answers
        side = side_of_treatment(review, pair)
        sides.add(side)
        shown = (answers["tuned"], answers["retrieved-4"])
        assert (pair.a, pair.b) == (shown if side == "A" else shown[::-1])
        assert pair.reference is None
    assert sides == {"A", "B"}


def test_session_resumes_and_each_reviewer_begins_at_the_same_pair(folder: Path) -> None:
    first = _answer(begin(folder), "A", "B", "both")
    again = begin(folder)
    assert again.progress.answered == 3
    assert _next(again).number == 4
    assert _next(begin(folder, "ben")) == first[0]


def test_undo_removes_the_latest_verdict_of_any_pass_and_asks_again(folder: Path) -> None:
    review = begin(folder)
    pairs = _answer(review, "A", "B")
    assert begin(folder).undo() == pairs[1]
    review = begin(folder)
    assert review.progress.answered == 1
    _answer(review, "skip", "A")
    undone = review.undo()
    assert undone is not None
    assert _next(review).key == undone.key
    assert review.undo() is not None  # the skip
    assert review.undo() is not None
    assert review.undo() is None
    assert review.progress.answered == review.progress.skipped == 0


def test_skipped_pair_returns_in_the_next_pass(folder: Path) -> None:
    review = begin(folder, items=12)
    skipped = _answer(review, "skip")[0]
    _prefer_a(review, 11)
    assert review.next() is None
    assert review.progress.skipped == 1
    assert _next(begin(folder)).key == skipped.key


def test_journal_keeps_reference_shown_after_a_crash(folder: Path) -> None:
    review = begin(folder)
    first = review.show_reference(_next(review))
    items = {item.key: item for item in load_items(folder)}
    assert first.reference == items[first.key].reference
    again = begin(folder)
    _answer(again, "A", "B")
    standing = again.log.standing
    assert [standing[key].reference for key in again.sample.order[:2]] == [True, False]


def test_note_is_stored_replaced_and_removed(folder: Path) -> None:
    review = begin(folder)
    key = _next(review).key
    review.note(_next(review), "  both miss the county ")
    assert _next(review).note == begin(folder).item(key).note == "both miss the county"
    review.note(_next(review), "")
    assert _next(review).note == ""
    assert _next(review).key == key


@pytest.mark.parametrize("cut", [2, 20])
def test_journal_ignores_and_reports_half_a_line_after_a_crash(
    folder: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    _answer(begin(folder), "A", "B", "both")
    path = folder / "human-eval" / "ada.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = begin(folder)
    assert "cut off by a crash" in caplog.text
    assert (again.progress.answered, _next(again).number) == (2, 3)
    _answer(again, "neither")
    assert path.read_bytes().count(b"\n") == 3
    assert [e.event for e in begin(folder).log.events] == ["verdict"] * 3


def test_journal_names_an_invalid_line(folder: Path) -> None:
    _answer(begin(folder), "A", "B")
    path = folder / "human-eval" / "ada.jsonl"
    path.write_text(path.read_text().replace('"B"', '"C"'))
    with pytest.raises(UserError, match="Invalid verdict") as caught:
        begin(folder)
    assert caught.value.where == f"{path}:2"


@pytest.mark.parametrize("name", ["Ada Lovelace", "żółć", "../ada", "a/b", "."])
def test_reviewer_name_never_leaves_the_folder(folder: Path, name: str) -> None:
    _answer(begin(folder, name), "A")
    assert begin(folder, name).progress.answered == 1
    assert len(list((folder / "human-eval").glob("*.jsonl"))) == 1


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 300])
def test_reviewer_name_too_long_for_a_file_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="name"):
        begin(folder, name)


def test_two_sessions_of_one_reviewer_keep_all_verdicts(folder: Path) -> None:
    terminal, page = begin(folder), begin(folder)
    pair = _next(terminal)
    terminal.answer(pair, "A")
    page.answer(page.item(page.sample.order[5]), "B")
    assert begin(folder).progress.answered == 2


def test_verdicts_outside_the_sample_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    review = begin(folder, items=60)
    _prefer_a(review, 60)
    (folder / "human-eval" / "sample.json").unlink()
    smaller = begin(folder, items=10)
    assert "outside the sample" in caplog.text
    assert smaller.progress.answered <= 10
