"""Push and pull: only what the other side lacks, verified, HEAD last, and never over another's work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener
from remote_helpers import Place, add_rows, pull_from, push_to

from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.remote import RemoteStore, pull, push
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


def test_push_and_pull_alternate_between_copies(one: ProjectFolder, two: ProjectFolder, place: Place) -> None:
    for turn in range(3):
        for mine, other in ((one, two), (two, one)):
            push_to(mine, place)
            pull_from(other, place)
            assert load_version(mine.dataset) == load_version(other.dataset)
            add_rows(other, 5, 10 + 2 * turn + (other is one))
    assert len(list_versions(two.dataset)) == 6


def test_push_does_not_change_a_copy_that_is_ahead(one: ProjectFolder, two: ProjectFolder, place: Place) -> None:
    first = load_version(one.dataset).digest
    push_to(one, place)
    pull_from(two, place)
    second = add_rows(one, 30, 2)
    ahead = pull_from(one, place)
    assert (ahead.head, ahead.ahead, ahead.versions) == (second, 1, ())
    push_to(one, place)
    before = place.files
    behind = push_to(two, place)
    assert (behind.head, behind.ahead, behind.versions) == (second, 1, ())
    assert place.files == before
    assert load_version(two.dataset).digest == first


def test_push_refuses_diverged_histories(one: ProjectFolder, two: ProjectFolder, place: Place) -> None:
    common = load_version(one.dataset).digest
    push_to(one, place)
    pull_from(two, place)
    mine, theirs = add_rows(one, 5, 2), add_rows(two, 5, 3)
    push_to(two, place)
    before = place.files
    for refused in (push_to, pull_from):
        with pytest.raises(UserError) as caught:
            refused(one, place)
        assert f"after version {short(common)}" in caught.value.what
        assert f"only here: {short(mine)} (seed 2)" in caught.value.what
        assert f"only there: {short(theirs)} (seed 3)" in caught.value.what
    assert place.files == before
    assert load_version(one.dataset).digest == mine
    # The way out that the message names.
    checkout(one.dataset, common)
    pull_from(one, place)
    add_rows(one, 5, 2)
    push_to(one, place)
    pull_from(two, place)
    assert len(load_version(two.dataset).members) == 70


def test_push_refuses_unrelated_datasets(one: ProjectFolder, two: ProjectFolder, place: Place) -> None:
    push_to(one, place)
    add_rows(two, 30, 9)
    for refused in (push_to, pull_from):
        with pytest.raises(UserError, match="from the start"):
            refused(two, place)


def test_interrupted_push_keeps_the_former_version_and_can_be_repeated(
    one: ProjectFolder, two: ProjectFolder, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_version(one.dataset).digest
    push_to(one, place)
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
            push_to(one, place)
        monkeypatch.setattr(RemoteStore, "write", write)
        if stop == 5:
            pull_from(two, place)
            assert load_version(two.dataset).digest == first
        for name in [n for n in place.files if n.startswith("versions/") and short(first) not in n]:
            place.remove(name)
    push_to(one, place)
    pull_from(two, place)
    assert load_version(two.dataset) == load_version(one.dataset)


@pytest.mark.parametrize("name", ["rows.jsonl", "members.tsv", "imports.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "lost"])
def test_pull_refuses_changed_files(
    one: ProjectFolder, two: ProjectFolder, place: Place, name: str, damage: str
) -> None:
    first = load_version(one.dataset).digest
    push_to(one, place)
    pull_from(two, place)
    path = f"versions/{short(add_rows(one, 30, 2))}/{name}"
    push_to(one, place)
    if damage == "lost":
        place.remove(path)
    else:
        data = place.files[path]
        at = data.index(b"answer") if name == "rows.jsonl" else data.index(b"2")
        place.write(path, data[:at] + b"7" + data[at + 1 :])
    with pytest.raises(UserError) as caught:
        pull_from(two, place)
    assert f"{path}" in str(caught.value.where)
    assert load_version(two.dataset).digest == first
    assert verify(OpenFolder(two, Listener())).ok


def test_pull_reports_a_missing_row(one: ProjectFolder, two: ProjectFolder, place: Place) -> None:
    version = load_version(one.dataset)
    push_to(one, place)
    path = f"versions/{short(version.digest)}/rows.jsonl"
    lines = place.files[path].splitlines(keepends=True)
    place.write(path, b"".join(lines[1:]))
    with pytest.raises(UserError, match=f"The row {version.members[0].key} is missing"):
        pull_from(two, place)
    assert list_versions(two.dataset) == []


def test_push_refuses_a_changed_version(one: ProjectFolder, place: Place) -> None:
    member = load_version(one.dataset).members[0]
    path = one.dataset / "rows" / f"{member.key[:2]}.jsonl"
    path.write_text(path.read_text().replace(member.example.output, "something else"))
    with pytest.raises(UserError, match="was changed"):
        push_to(one, place)
    assert place.files == {}


def test_pull_refuses_an_invalid_head(one: ProjectFolder, place: Place) -> None:
    place.write("HEAD", b"ref: refs/heads/main\n")
    for refused in (push_to, pull_from):
        with pytest.raises(UserError, match="Invalid version digest in HEAD"):
            refused(one, place)


def test_pull_refuses_an_empty_remote(two: ProjectFolder, place: Place) -> None:
    with pytest.raises(UserError, match="The remote has no dataset"):
        pull_from(two, place)


def test_push_refuses_a_dataset_without_versions(two: ProjectFolder, place: Place) -> None:
    with pytest.raises(UserError, match="no dataset"):
        push_to(two, place)


def test_push_detects_a_concurrent_push(one: ProjectFolder, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    head = RemoteStore.head
    answers = iter([None, "0" * 64])
    monkeypatch.setattr(RemoteStore, "head", lambda self: next(answers))
    with pytest.raises(UserError, match="at the same time"):
        push_to(one, place)
    monkeypatch.setattr(RemoteStore, "head", head)
    assert "HEAD" not in place.files


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


def test_push_reports_a_folder_without_write_permission(one: ProjectFolder, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    there = tmp_path / "there"
    there.mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        push(OpenFolder(one, Listener()), str(there))


def test_push_copies_versions_that_do_not_need_a_lost_one(one: ProjectFolder, two: ProjectFolder, place: Place) -> None:
    first = load_version(one.dataset).digest
    add_rows(one, 200, 2)
    shutil.rmtree(one.dataset / "versions" / short(first))
    push_to(one, place)
    pull_from(two, place)
    assert load_version(two.dataset) == load_version(one.dataset)


def test_push_reports_a_lost_version_that_is_needed(one: ProjectFolder, place: Place) -> None:
    first = load_version(one.dataset).digest
    add_rows(one, 3, 2)
    shutil.rmtree(one.dataset / "versions" / short(first))
    with pytest.raises(UserError, match="Cannot read the members") as caught:
        push_to(one, place)
    assert short(first) in caught.value.what
    assert place.files == {}
