"""Push and pull of versions and reviews: what the other side lacks, verified, HEAD last, never over another's work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from data_helpers import Listener
from remote_helpers import Place, add_rows, pull_from, push_to
from review_helpers import judge_next, review

from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.remote import RemoteStore, pull, push
from tunewright.data.review.edits import apply_edits
from tunewright.data.review.reviews import read_reviews
from tunewright.data.trace import blame, find_row
from tunewright.data.verify import verify
from tunewright.data.versions import checkout, list_versions, load_version, short

pytest_plugins = ["remote_helpers"]


def test_pull_creates_the_pushed_versions(one: ProjectFolder, two: ProjectFolder, place: Place) -> None:
    add_rows(one, 30, 2)
    pushed = push_to(one, place)
    pulled = pull_from(two, place)
    assert load_version(two.dataset) == load_version(one.dataset)
    assert list_versions(two.dataset) == list_versions(one.dataset)
    assert verify(OpenFolder(two, Listener())).ok
    assert (pushed.rows, pulled.rows) == (90, 90)
    assert pushed.versions == pulled.versions == tuple(m.digest for m in list_versions(one.dataset))


def test_push_copies_only_what_is_missing(one: ProjectFolder, two: ProjectFolder, place: Place) -> None:
    first = push_to(one, place)
    before = place.files
    pull_from(two, place)
    again = push_to(one, place)
    assert (again.versions, again.rows, again.bytes) == ((), 0, 0)
    assert place.files == before
    second = add_rows(one, 3, 2)
    more = push_to(one, place)
    assert (more.versions, more.rows) == ((second,), 3)
    assert {name for name, data in place.files.items() if before.get(name) != data} == {
        "HEAD",
        *(f"versions/{short(second)}/{n}" for n in ("rows.jsonl", "members.tsv", "imports.jsonl", "manifest.json")),
    }
    pulled = pull_from(two, place)
    assert (pulled.versions, pulled.rows) == ((second,), 3)
    assert load_version(two.dataset) == load_version(one.dataset)
    again = pull_from(two, place)
    assert (again.versions, again.rows, again.bytes, again.ahead) == ((), 0, 0, 0)
    assert first.bytes > more.bytes


def test_push_does_not_change_a_copy_that_is_ahead(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    first = load_version(one.dataset).digest
    push_to(one, folder)
    pull_from(two, folder)
    second = add_rows(one, 30, 2)
    ahead = pull_from(one, folder)
    assert (ahead.head, ahead.ahead, ahead.versions) == (second, 1, ())
    push_to(one, folder)
    before = folder.files
    behind = push_to(two, folder)
    assert (behind.head, behind.ahead, behind.versions) == (second, 1, ())
    assert folder.files == before
    assert load_version(two.dataset).digest == first


def test_push_refuses_diverged_histories(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    common = load_version(one.dataset).digest
    push_to(one, folder)
    pull_from(two, folder)
    mine, theirs = add_rows(one, 5, 2), add_rows(two, 5, 3)
    push_to(two, folder)
    before = folder.files
    for refused in (push_to, pull_from):
        with pytest.raises(UserError) as caught:
            refused(one, folder)
        assert f"after version {short(common)}" in caught.value.what
        assert f"only here: {short(mine)} (seed 2)" in caught.value.what
        assert f"only there: {short(theirs)} (seed 3)" in caught.value.what
    assert folder.files == before
    assert load_version(one.dataset).digest == mine
    # The way out that the message names.
    checkout(one.dataset, common)
    pull_from(one, folder)
    add_rows(one, 5, 2)
    push_to(one, folder)
    pull_from(two, folder)
    assert len(load_version(two.dataset).members) == 70


def test_push_refuses_unrelated_datasets(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    push_to(one, folder)
    add_rows(two, 30, 9)
    for refused in (push_to, pull_from):
        with pytest.raises(UserError, match="from the start"):
            refused(two, folder)


def test_interrupted_push_keeps_the_former_version_and_can_be_repeated(
    one: ProjectFolder, two: ProjectFolder, folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_version(one.dataset).digest
    push_to(one, folder)
    add_rows(one, 30, 2)
    add_rows(one, 30, 3)
    write = RemoteStore.write
    for stop in range(8, -1, -1):
        calls = iter(range(100))

        def stopping(self: Any, name: str, data: bytes, stop: int = stop, calls: Iterator[int] = calls) -> None:
            if next(calls) == stop:
                raise KeyboardInterrupt
            write(self, name, data)

        monkeypatch.setattr(RemoteStore, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            push_to(one, folder)
        monkeypatch.setattr(RemoteStore, "write", write)
        if stop == 5:
            pull_from(two, folder)
            assert load_version(two.dataset).digest == first
        for name in [n for n in folder.files if n.startswith("versions/") and short(first) not in n]:
            folder.remove(name)
    push_to(one, folder)
    pull_from(two, folder)
    assert load_version(two.dataset) == load_version(one.dataset)


@pytest.mark.parametrize("name", ["rows.jsonl", "members.tsv", "imports.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "lost"])
def test_pull_refuses_changed_files(
    one: ProjectFolder, two: ProjectFolder, folder: Place, name: str, damage: str
) -> None:
    first = load_version(one.dataset).digest
    push_to(one, folder)
    pull_from(two, folder)
    path = f"versions/{short(add_rows(one, 30, 2))}/{name}"
    push_to(one, folder)
    if damage == "lost":
        folder.remove(path)
    else:
        data = folder.files[path]
        at = data.index(b"answer") if name == "rows.jsonl" else data.index(b"2")
        folder.write(path, data[:at] + b"7" + data[at + 1 :])
    with pytest.raises(UserError) as caught:
        pull_from(two, folder)
    assert f"{path}" in str(caught.value.where)
    assert load_version(two.dataset).digest == first
    assert verify(OpenFolder(two, Listener())).ok


def test_pull_reports_a_missing_row(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    version = load_version(one.dataset)
    push_to(one, folder)
    path = f"versions/{short(version.digest)}/rows.jsonl"
    lines = folder.files[path].splitlines(keepends=True)
    folder.write(path, b"".join(lines[1:]))
    with pytest.raises(UserError, match=f"The row {version.members[0].key} is missing"):
        pull_from(two, folder)
    assert list_versions(two.dataset) == []


def test_push_refuses_a_changed_version(one: ProjectFolder, folder: Place) -> None:
    member = load_version(one.dataset).members[0]
    path = one.dataset / "rows" / f"{member.key[:2]}.jsonl"
    path.write_text(path.read_text().replace(member.example.output, "something else"))
    with pytest.raises(UserError, match="was changed"):
        push_to(one, folder)
    assert folder.files == {}


def test_push_and_pull_refuse_what_is_not_there(one: ProjectFolder, two: ProjectFolder, folder: Place) -> None:
    for verb, where in ((pull_from, folder.url), (push_to, str(two.dataset))):
        with pytest.raises(UserError) as caught:
            verb(two, folder)
        assert caught.value.where == where
    folder.write("HEAD", b"ref: refs/heads/main\n")
    for refused in (push_to, pull_from):
        with pytest.raises(UserError) as caught:
            refused(one, folder)
        assert caught.value.where == f"{folder.url}/HEAD"


def test_push_detects_a_concurrent_push(one: ProjectFolder, folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    head = RemoteStore.head
    answers = iter([None, "0" * 64])
    monkeypatch.setattr(RemoteStore, "head", lambda self: next(answers))
    with pytest.raises(UserError, match="at the same time"):
        push_to(one, folder)
    monkeypatch.setattr(RemoteStore, "head", head)
    assert "HEAD" not in folder.files


def test_push_of_a_copy_that_is_behind_allows_a_concurrent_push(
    one: ProjectFolder, two: ProjectFolder, folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to(one, folder)
    pull_from(two, folder)
    second = add_rows(one, 30, 2)
    push_to(one, folder)
    answers = iter([second, "0" * 64])
    monkeypatch.setattr(RemoteStore, "head", lambda self: next(answers))
    assert push_to(two, folder).ahead == 1


def test_push_refuses_a_projects_dataset_folder(one: ProjectFolder, two: ProjectFolder) -> None:
    add_rows(two, 30, 2)
    before = sorted(p for p in two.dataset.rglob("*"))
    for verb in (push, pull):
        with pytest.raises(UserError, match="a project's dataset folder"):
            verb(OpenFolder(one, Listener()), str(two.dataset))
    assert sorted(p for p in two.dataset.rglob("*")) == before


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "http://127.0.0.1:9/x"])
def test_unusable_remote_is_a_user_error(one: ProjectFolder, url: str) -> None:
    with pytest.raises(UserError) as caught:
        push(OpenFolder(one, Listener()), url)
    assert caught.value.where == url


def test_push_reports_a_lost_version_that_is_needed(one: ProjectFolder, folder: Place) -> None:
    first = load_version(one.dataset).digest
    add_rows(one, 3, 2)
    shutil.rmtree(one.dataset / "versions" / short(first))
    with pytest.raises(UserError, match="Cannot read the members") as caught:
        push_to(one, folder)
    assert short(first) in caught.value.what
    assert folder.files == {}


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
