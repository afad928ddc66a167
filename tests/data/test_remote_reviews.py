"""Reviews travel by push and pull: none is lost, and none is taken that was changed."""

from __future__ import annotations

import json

import pytest
from data_helpers import Listener
from remote_helpers import Place, add_rows, pull_from, push_to
from review_helpers import judge_next, review

from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.remote import RemoteStore, push
from tunewright.data.review.edits import apply_edits
from tunewright.data.review.reviews import read_reviews
from tunewright.data.trace import blame, find_row
from tunewright.data.verify import verify
from tunewright.data.versions import load_version

pytest_plugins = ["remote_helpers"]


def test_push_and_pull_share_verdicts(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    push_to(one, folder)
    pull_from(two, folder)
    judge_next(review(one, "ada"), "right", "wrong")
    pushed = push_to(one, folder)
    assert (pushed.versions, pushed.reviews, pushed.verdicts) == ((), 3, 2)
    mine = judge_next(review(two, "ben"), "wrong", "skip", "right")
    undone = review(two, "ben").undo()
    assert undone is not None
    pulled = pull_from(two, folder)
    assert (pulled.versions, pulled.reviews, pulled.verdicts) == ((), 3, 2)
    back = push_to(two, folder)
    assert (back.reviews, back.verdicts) == (5, 3)
    pull_from(one, folder)
    here, there = read_reviews(one.dataset), read_reviews(two.dataset)
    assert here.events == there.events
    assert here.stacks == there.stacks
    assert here.finding(mine[0]) == "unsettled"  # Ada called right what Ben called wrong
    assert here.current_verdicts(mine[2]).get("ben") is None  # taken back
    before = folder.files
    for verb, project in ((push_to, one), (pull_from, one), (push_to, two), (pull_from, two)):
        assert (verb(project, folder).reviews, verb(project, folder).bytes) == (0, 0)
    assert folder.files == before
    assert verify(OpenFolder(one, Listener())).ok


def test_concurrent_pushes_lose_no_reviews(
    one: ProjectFolder, two: ProjectFolder, folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to(one, folder)
    pull_from(two, folder)
    judge_next(review(one, "ada"), "right")
    judge_next(review(two, "ben"), "wrong")
    with monkeypatch.context() as patched:
        # Both look before either writes.
        patched.setattr(RemoteStore, "reviews", lambda self, reporter: [])
        push_to(one, folder)
        push_to(two, folder)
    pull_from(one, folder)
    pull_from(two, folder)
    assert read_reviews(one.dataset).events == read_reviews(two.dataset).events
    assert len(read_reviews(one.dataset).events) == 4


def test_reviews_are_copied_when_one_copy_is_ahead(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    push_to(one, folder)
    pull_from(two, folder)
    add_rows(one, 30, 2)
    push_to(one, folder)
    judge_next(review(two, "ben"), "right")
    pushed = push_to(two, folder)
    assert (pushed.ahead, pushed.verdicts) == (1, 1)
    add_rows(one, 30, 3)
    pulled = pull_from(one, folder)
    assert (pulled.ahead, pulled.verdicts) == (1, 1)


@pytest.mark.parametrize("damage", ["changed", "shortened"])
def test_pull_refuses_changed_reviews(one: ProjectFolder, two: ProjectFolder, folder: Place, damage: str) -> None:
    push_to(one, folder)
    pull_from(two, folder)
    judge_next(review(one, "ada"), "right", "wrong")
    push_to(one, folder)
    add_rows(one, 10, 2)
    push_to(one, folder)
    (name,) = [name for name in folder.files if name.startswith("reviews/")]
    data = folder.files[name]
    folder.write(name, data.replace(b'"wrong"', b'"right"') if damage == "changed" else data[: data.index(b"\n") + 1])
    head = load_version(two.dataset).digest
    with pytest.raises(UserError, match="was changed") as caught:
        pull_from(two, folder)
    assert name in str(caught.value.where)
    assert load_version(two.dataset).digest == head
    assert not (two.dataset / "reviews.jsonl").exists()


def test_edit_record_finds_its_verdict_on_another_line(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    push_to(one, folder)
    pull_from(two, folder)
    judge_next(review(two, "ben"), "right", "right", "right", "right")
    judge_next(review(one, "ada"), "right", "edit", output="the better answer")
    now = apply_edits(one, Listener()).edited[0].now
    push_to(one, folder)
    pull_from(two, folder)
    for project, line in ((one, 3), (two, 8)):
        version = load_version(project.dataset)
        found = blame(project.dataset, version, now)
        assert (found.source, found.line, found.reviewers) == ("dataset/reviews.jsonl", line, ("ada",))
        log = (project.dataset / "reviews.jsonl").read_text().splitlines()
        assert json.loads(log[line - 1])["output"] == "the better answer"
        assert find_row(project.dataset, version, f"reviews.jsonl:{line}").key == now


def test_push_skips_and_reports_half_a_review(one: ProjectFolder, folder: Place) -> None:
    judge_next(review(one), "right")
    path = one.dataset / "reviews.jsonl"
    path.write_bytes(path.read_bytes() + b'{"draw":0,"ev')
    listener = Listener()
    assert push(OpenFolder(one, listener), folder.url, options=folder.options).reviews == 2
    assert any("cut off by a crash" in warning for warning in listener.warned)
