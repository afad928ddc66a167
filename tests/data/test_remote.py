"""Push and pull: only what the other side lacks, verified, HEAD last, and never over another's work."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl

from tunewright.data.add import add
from tunewright.data.versions import checkout, list_versions, load_version, remote, short
from tunewright.data.versions.remote import Transfer, pull, push
from tunewright.data.versions.verify import verify
from tunewright.errors import UserError
from tunewright.project import Project


@dataclass
class Place:
    """Somewhere to push to."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        """All files there, by their path below the URL."""
        fs, root = fsspec.core.url_to_fs(self.url, **self.options)
        fs.invalidate_cache()
        return {str(path)[len(root.rstrip("/")) + 1 :]: fs.cat_file(path) for path in fs.find(root)}

    def write(self, name: str, data: bytes) -> None:
        """Change a file behind the dataset's back."""
        fs, root = fsspec.core.url_to_fs(self.url, **self.options)
        if not self.options:
            fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/{name}", data)

    def remove(self, name: str) -> None:
        """Lose a file."""
        fs, root = fsspec.core.url_to_fs(self.url, **self.options)
        fs.rm_file(f"{root}/{name}")


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """A real S3 API on loopback."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A folder, a dictionary, a bucket."""
    if request.param == "folder":
        return Place(str(tmp_path / "there"))
    if request.param == "memory":
        return Place(f"memory://{uuid.uuid4().hex}/there")
    endpoint = request.getfixturevalue("s3_endpoint")
    options = {"key": "testing", "secret": "testing", "client_kwargs": {"endpoint_url": endpoint}}
    bucket = uuid.uuid4().hex
    fsspec.filesystem("s3", **options).mkdir(bucket)
    return Place(f"s3://{bucket}/there", options)


@pytest.fixture
def one(tmp_path: Path) -> Project:
    """A project with one version of 60 rows."""
    project = new_project(tmp_path / "one")
    _add(project, 60, 1)
    return project


@pytest.fixture
def two(tmp_path: Path) -> Project:
    """A project without data."""
    return new_project(tmp_path / "two")


def _add(project: Project, count: int, seed: int) -> str:
    path = write_jsonl(project.root.parent / f"{seed}.jsonl", unlike_pairs(count, seed))
    return add(project, [path], Listener(), message=f"seed {seed}").version.digest


def _push(project: Project, place: Place) -> Transfer:
    return push(project.dataset, place.url, Listener(), options=place.options)


def _pull(project: Project, place: Place) -> Transfer:
    return pull(project.dataset, place.url, Listener(), options=place.options)


def test_what_is_pushed_is_pulled_as_the_same_versions(one: Project, two: Project, place: Place) -> None:
    _add(one, 30, 2)
    pushed = _push(one, place)
    pulled = _pull(two, place)
    assert load_version(two.dataset) == load_version(one.dataset)
    assert list_versions(two.dataset) == list_versions(one.dataset)
    assert verify(two.dataset, Listener()).ok
    assert (pushed.rows, pulled.rows) == (90, 90)
    assert pushed.versions == pulled.versions == tuple(m.digest for m in list_versions(one.dataset))


def test_only_what_the_other_side_lacks_is_copied(one: Project, two: Project, place: Place) -> None:
    first = _push(one, place)
    before = place.files
    _pull(two, place)
    again = _push(one, place)
    assert (again.versions, again.rows, again.bytes) == ((), 0, 0)
    assert place.files == before
    second = _add(one, 3, 2)
    more = _push(one, place)
    assert (more.versions, more.rows) == ((second,), 3)
    assert {name for name, data in place.files.items() if before.get(name) != data} == {
        "HEAD",
        *(f"versions/{short(second)}/{n}" for n in ("rows.jsonl", "members.tsv", "imports.jsonl", "manifest.json")),
    }
    pulled = _pull(two, place)
    assert (pulled.versions, pulled.rows) == ((second,), 3)
    assert load_version(two.dataset) == load_version(one.dataset)
    again = _pull(two, place)
    assert (again.versions, again.rows, again.bytes, again.ahead) == ((), 0, 0, 0)
    assert first.bytes > more.bytes


def test_work_goes_back_and_forth(one: Project, two: Project, place: Place) -> None:
    for turn in range(3):
        for mine, other in ((one, two), (two, one)):
            _push(mine, place)
            _pull(other, place)
            assert load_version(mine.dataset) == load_version(other.dataset)
            _add(other, 5, 10 + 2 * turn + (other is one))
    assert len(list_versions(two.dataset)) == 6


def test_the_side_that_is_ahead_stays_as_it_is(one: Project, two: Project, place: Place) -> None:
    first = load_version(one.dataset).digest
    _push(one, place)
    _pull(two, place)
    second = _add(one, 30, 2)
    ahead = _pull(one, place)
    assert (ahead.head, ahead.ahead, ahead.versions) == (second, 1, ())
    _push(one, place)
    before = place.files
    behind = _push(two, place)
    assert (behind.head, behind.ahead, behind.versions) == (second, 1, ())
    assert place.files == before
    assert load_version(two.dataset).digest == first


def test_histories_that_went_apart_are_refused_with_what_differs(one: Project, two: Project, place: Place) -> None:
    common = load_version(one.dataset).digest
    _push(one, place)
    _pull(two, place)
    mine, theirs = _add(one, 5, 2), _add(two, 5, 3)
    _push(two, place)
    before = place.files
    for refused in (_push, _pull):
        with pytest.raises(UserError) as caught:
            refused(one, place)
        assert f"after version {short(common)}" in caught.value.what
        assert f"only here: {short(mine)} (seed 2)" in caught.value.what
        assert f"only there: {short(theirs)} (seed 3)" in caught.value.what
    assert place.files == before
    assert load_version(one.dataset).digest == mine
    # The way out that the message names.
    checkout(one.dataset, common)
    _pull(one, place)
    _add(one, 5, 2)
    _push(one, place)
    _pull(two, place)
    assert len(load_version(two.dataset).members) == 70


def test_two_datasets_with_nothing_in_common_are_refused(one: Project, two: Project, place: Place) -> None:
    _push(one, place)
    _add(two, 30, 9)
    for refused in (_push, _pull):
        with pytest.raises(UserError, match="from the start"):
            refused(two, place)


def test_an_interrupted_push_leaves_the_former_version_current_and_can_be_repeated(
    one: Project, two: Project, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_version(one.dataset).digest
    _push(one, place)
    _add(one, 30, 2)
    _add(one, 30, 3)
    write = remote._Place.write
    for stop in range(8, -1, -1):
        calls = iter(range(100))

        def stopping(self: Any, name: str, data: bytes, stop: int = stop, calls: Iterator[int] = calls) -> None:
            if next(calls) == stop:
                raise KeyboardInterrupt
            write(self, name, data)

        monkeypatch.setattr(remote._Place, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            _push(one, place)
        monkeypatch.setattr(remote._Place, "write", write)
        if stop == 5:
            _pull(two, place)
            assert load_version(two.dataset).digest == first
        for name in [n for n in place.files if n.startswith("versions/") and short(first) not in n]:
            place.remove(name)
    _push(one, place)
    _pull(two, place)
    assert load_version(two.dataset) == load_version(one.dataset)


@pytest.mark.parametrize("name", ["rows.jsonl", "members.tsv", "imports.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "lost"])
def test_nothing_that_was_changed_becomes_current(
    one: Project, two: Project, place: Place, name: str, damage: str
) -> None:
    first = load_version(one.dataset).digest
    _push(one, place)
    _pull(two, place)
    path = f"versions/{short(_add(one, 30, 2))}/{name}"
    _push(one, place)
    if damage == "lost":
        place.remove(path)
    else:
        data = place.files[path]
        at = data.index(b"answer") if name == "rows.jsonl" else data.index(b"2")
        place.write(path, data[:at] + b"7" + data[at + 1 :])
    with pytest.raises(UserError) as caught:
        _pull(two, place)
    assert f"{path}" in str(caught.value.where)
    assert load_version(two.dataset).digest == first
    assert verify(two.dataset, Listener()).ok


def test_a_row_that_is_not_in_the_push_is_named(one: Project, two: Project, place: Place) -> None:
    version = load_version(one.dataset)
    _push(one, place)
    path = f"versions/{short(version.digest)}/rows.jsonl"
    lines = place.files[path].splitlines(keepends=True)
    place.write(path, b"".join(lines[1:]))
    with pytest.raises(UserError, match=f"the row {version.members[0].key} is missing"):
        _pull(two, place)
    assert list_versions(two.dataset) == []


def test_a_version_that_was_changed_here_is_not_pushed(one: Project, place: Place) -> None:
    member = load_version(one.dataset).members[0]
    path = one.dataset / "rows" / f"{member.key[:2]}.jsonl"
    path.write_text(path.read_text().replace(member.example.output, "something else"))
    with pytest.raises(UserError, match="was changed"):
        _push(one, place)
    assert place.files == {}


def test_a_head_that_is_none_is_told(one: Project, place: Place) -> None:
    place.write("HEAD", b"ref: refs/heads/main\n")
    for refused in (_push, _pull):
        with pytest.raises(UserError, match="HEAD is no digest"):
            refused(one, place)


def test_pulling_from_where_nothing_was_pushed_is_told(two: Project, place: Place) -> None:
    with pytest.raises(UserError, match="no dataset was pushed there"):
        _pull(two, place)


def test_pushing_without_a_version_is_told(two: Project, place: Place) -> None:
    with pytest.raises(UserError, match="no dataset"):
        _push(two, place)


def test_somebody_who_pushes_at_the_same_time_is_noticed(
    one: Project, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = remote._Place.head
    answers = iter([None, "0" * 64])
    monkeypatch.setattr(remote._Place, "head", lambda self: next(answers))
    with pytest.raises(UserError, match="at the same time"):
        _push(one, place)
    monkeypatch.setattr(remote._Place, "head", head)
    assert "HEAD" not in place.files


def test_a_project_s_own_dataset_folder_is_no_place_to_push_to(one: Project, two: Project) -> None:
    _add(two, 30, 2)
    before = sorted(p for p in two.dataset.rglob("*"))
    for verb in (push, pull):
        with pytest.raises(UserError, match="own dataset folder"):
            verb(one.dataset, str(two.dataset), Listener())
    assert sorted(p for p in two.dataset.rglob("*")) == before


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "http://127.0.0.1:9/x"])
def test_a_place_that_cannot_be_used_is_the_user_s_to_mend(one: Project, url: str) -> None:
    with pytest.raises(UserError) as caught:
        push(one.dataset, url, Listener())
    assert caught.value.where == url


def test_a_bucket_that_is_not_there_is_not_made(one: Project, s3_endpoint: str) -> None:
    options = {"key": "testing", "secret": "testing", "client_kwargs": {"endpoint_url": s3_endpoint}}
    with pytest.raises(UserError, match="cannot be reached or used"):
        push(one.dataset, "s3://not-there-1/x", Listener(), options=options)
    assert not fsspec.filesystem("s3", **options).exists("not-there-1")


def test_a_folder_that_may_not_be_written_is_told(one: Project, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    there = tmp_path / "there"
    there.mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        push(one.dataset, str(there), Listener())


def test_where_an_old_version_is_lost_the_later_ones_are_pushed_that_do_not_build_on_it(
    one: Project, two: Project, place: Place
) -> None:
    first = load_version(one.dataset).digest
    _add(one, 200, 2)
    shutil.rmtree(one.dataset / "versions" / short(first))
    _push(one, place)
    _pull(two, place)
    assert load_version(two.dataset) == load_version(one.dataset)


def test_where_a_lost_version_is_needed_the_push_names_it(one: Project, place: Place) -> None:
    first = load_version(one.dataset).digest
    _add(one, 3, 2)
    shutil.rmtree(one.dataset / "versions" / short(first))
    with pytest.raises(UserError, match="cannot be read") as caught:
        _push(one, place)
    assert short(first) in caught.value.what
    assert place.files == {}
