"""Dataset versions on disk: verified when loaded, whole after a crash, and their members kept as differences."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from review_helpers import review

from making.property_examples import examples
from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.options import RemoveOptions
from tunewright.data.remove import remove
from tunewright.data.review.edits import apply_edits
from tunewright.data.review.session import ReviewItem
from tunewright.data.trace import find_key, find_row
from tunewright.data.versions import checkout, list_versions, load_version, locked, manifest_seal, short
from tunewright.data.versions.files import lines_sha256, members_file, read_members

FIRST = unlike_pairs(60, seed=1)
SECOND = unlike_pairs(60, seed=2)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A project with one version of 60 rows; tests work on copies."""
    project = new_project(tmp_path_factory.mktemp("pristine") / "p")
    add(project, [write_jsonl(project.root.parent / "first.jsonl", FIRST)], Listener(), message="first")
    return project


@pytest.fixture
def project(pristine: ProjectFolder, tmp_path: Path) -> ProjectFolder:
    return ProjectFolder(Path(shutil.copytree(pristine.root, tmp_path / "p")))


def _add_second(project: ProjectFolder) -> str:
    path = write_jsonl(project.root.parent / "second.jsonl", SECOND)
    return add(project, [path], Listener(), message="second").version.digest


def test_list_versions_sorts_from_first_to_last(project: ProjectFolder) -> None:
    first = load_version(project.dataset).digest
    second = _add_second(project)
    manifests = list_versions(project.dataset)
    assert [(m.digest, m.parent, m.message) for m in manifests] == [(first, None, "first"), (second, first, "second")]
    assert load_version(project.dataset).digest == second
    for begin in (first, short(first), first[:8]):
        assert load_version(project.dataset, begin).digest == first


def _row(project: ProjectFolder, name: str) -> str:
    return find_row(project.dataset, load_version(project.dataset), name).example.input_text


def test_rows_are_numbered_in_the_order_of_their_files_and_no_number_is_given_again(
    project: ProjectFolder,
) -> None:
    first = load_version(project.dataset).digest
    assert [_row(project, str(number)) for number in (1, 2, 60)] == [FIRST[place][0] for place in (0, 1, 59)]
    last = find_row(project.dataset, load_version(project.dataset), "60").key
    keys = project.root / "keys.txt"
    keys.write_text(last)
    remove(OpenFolder(project, Listener()), RemoveOptions(because="wrong", keys=keys))
    assert find_key(project.dataset, load_version(project.dataset), "60") == last
    with pytest.raises(UserError, match="no row '60'"):
        _row(project, "60")
    _add_second(project)
    assert _row(project, "61") == SECOND[0][0]
    assert [m.numbers.version for m in list_versions(project.dataset) if m.numbers] == [1, 2, 3]
    # The next numbers of another branch follow all that the dataset has.
    checkout(project.dataset, "1")
    third = write_jsonl(project.root.parent / "third.jsonl", unlike_pairs(5, seed=3))
    numbers = add(project, [third], Listener()).version.numbers
    assert numbers is not None
    assert (numbers.version, numbers.first_row, numbers.last_row) == (4, 121, 125)
    assert load_version(project.dataset, "1").digest == first


def test_edited_row_keeps_its_number(project: ProjectFolder) -> None:
    session = review(project, "ada")
    member = find_row(project.dataset, session.version, "7")
    session.judge(ReviewItem(member, 1), "edit", "a better answer")
    apply_edits(project, Listener())
    found = find_row(project.dataset, load_version(project.dataset), "7")
    assert (found.example.input_text, found.example.output) == (FIRST[6][0], "a better answer")
    _add_second(project)
    assert _row(project, "61") == SECOND[0][0]


def test_number_that_two_copies_gave_is_refused_by_name(project: ProjectFolder, tmp_path: Path) -> None:
    other = ProjectFolder(Path(shutil.copytree(project.root, tmp_path / "other")))
    ours = _add_second(project)
    theirs = add(other, [write_jsonl(tmp_path / "b.jsonl", unlike_pairs(9, seed=4))], Listener()).version.digest
    for part in ("rows", "versions"):
        shutil.copytree(other.dataset / part, project.dataset / part, dirs_exist_ok=True)
    with pytest.raises(UserError, match="2 dataset versions have the number 2: they were made in separate") as refused:
        load_version(project.dataset, "2")
    assert {short(ours), short(theirs)} == set(re.findall("[0-9a-f]{12}", refused.value.fix or ""))


def test_rows_of_a_version_without_numbers_are_counted(project: ProjectFolder) -> None:
    manifest = project.dataset / "versions" / short(load_version(project.dataset).digest) / "manifest.json"
    document = {**json.loads(manifest.read_bytes()), "numbers": None}
    manifest.write_text(json.dumps({**document, "seal": manifest_seal(document)}))
    assert _row(project, "3") == FIRST[2][0]
    _add_second(project)
    assert (_row(project, "3"), _row(project, "61")) == (FIRST[2][0], SECOND[0][0])


def test_digests_can_be_recomputed(project: ProjectFolder) -> None:
    version = load_version(project.dataset)
    folder = project.dataset / "versions" / short(version.digest)
    assert hashlib.sha256((folder / "members.tsv").read_bytes()).hexdigest() == version.digest
    keys = [m.key for m in version.examples("test")]
    assert keys == sorted(keys)
    assert version.split_digest("test") == hashlib.sha256("".join(f"{k}\n" for k in keys).encode()).hexdigest()
    assert version.manifest.splits["test"] == version.split_digest("test")


def _without(text: str, key: str) -> str:
    return "".join(line for line in text.splitlines(True) if key not in line)


@pytest.mark.parametrize(
    ("file", "change", "at"),
    [
        ("rows", lambda text, _: text.replace("answer", "another", 1), ":1"),
        ("rows", _without, ""),
        *(
            ("rows", lambda _, __, line=line: line + "\n", ":1")
            for line in (
                "?",
                "[]",
                "{}",
                '{"key": 1, "messages": null}',
                '{"key": "a", "messages": [{"role": "user"}]}',
            )
        ),
        ("members.tsv", lambda text, _: text.replace("\ttest\t", "\ttrain\t", 1), ""),
        ("members.tsv", lambda text, _: text.split("\n", 1)[1], ""),
        ("members.tsv", lambda text, _: text.replace("\t", " "), ""),
        ("manifest.json", lambda text, _: text.replace('"rows"', '"row"', 1), ""),
        ("manifest.json", lambda text, _: re.sub(r'"digest": "[0-9a-f]{64}"', f'"digest": "{"0" * 64}"', text), ""),
        ("manifest.json", lambda *_: "[]", ""),
        *(("HEAD", lambda _, __, head=head: head, "") for head in ("", "0" * 64, "..", "\x00")),
    ],
)
def test_load_version_names_the_changed_file(
    project: ProjectFolder, file: str, change: Callable[[str, str], str], at: str
) -> None:
    version = load_version(project.dataset)
    key = version.members[0].key
    places = {"rows": project.dataset / "rows" / f"{key[:2]}.jsonl", "HEAD": project.dataset / "HEAD"}
    path = places.get(file, project.dataset / "versions" / short(version.digest) / file)
    path.write_text(change(path.read_text(), key))
    with pytest.raises(UserError) as caught:
        load_version(project.dataset)
    assert caught.value.where == f"{path}{at}"


def test_locked_allows_one_writer(project: ProjectFolder) -> None:
    with locked(project.dataset), pytest.raises(UserError, match="Another command is changing"):
        _add_second(project)
    assert _add_second(project) == load_version(project.dataset).digest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_leaves_the_old_version_complete(small_disk: Path, tmp_path: Path) -> None:
    project = new_project(small_disk / "p")
    add(project, [write_jsonl(tmp_path / "first.jsonl", FIRST)], Listener())
    old = load_version(project.dataset)
    many = write_jsonl(tmp_path / "many.jsonl", [(q, a * 40) for q, a in unlike_pairs(400, seed=3)])
    filler = small_disk / "filler"
    refusals = 0
    for pages in (0, 1, 4, 16, 64, 128, 256):  # free pages of 4 KB: the disk fills up at a later write each time
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))
        os.truncate(filler, filler.stat().st_size - pages * 4096)
        try:
            add(project, [many], Listener())
        except UserError as error:
            assert "disk is full" in error.what
            refusals += 1
            assert load_version(project.dataset) == old
        filler.unlink()
    assert refusals >= 4
    assert len(load_version(project.dataset).members) in (60, 460)
    add(project, [many], Listener())
    assert len(load_version(project.dataset).members) == 460
    assert load_version(project.dataset, old.digest) == old


def _text(members: dict[str, str]) -> str:
    return "".join(sorted(f"{key}\t{split}\t{key}\n" for key, split in members.items()))


def _save(dataset: Path, text: str, parent: str | None) -> str:
    digest = lines_sha256([text])
    folder = dataset / "versions" / digest[:12]
    if not folder.exists():
        content = "".join(members_file(dataset, [text], parent))
        folder.mkdir(parents=True)
        (folder / "members.tsv").write_text(content)
    return digest


@examples(60)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 12), most=st.integers(1, 30))
def test_members_of_any_history_round_trip(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int, most: int
) -> None:
    dataset = tmp_path_factory.mktemp("members")
    draw = random.Random(seed)
    members = {f"{i:064x}": draw.choice(["train", "dev", "test"]) for i in range(40)}
    saved: dict[str, str] = {}
    parent = None
    for _ in range(steps):
        text = _text(members)
        parent = _save(dataset, text, parent)
        saved[parent] = text
        for key in draw.sample(sorted(members), k=min(len(members) - 1, draw.randrange(most))):
            if draw.random() < 0.5:
                del members[key]
            else:
                members[key] = draw.choice(["train", "dev", "test"])
        members |= {f"{draw.getrandbits(256):064x}": "train" for _ in range(draw.randrange(most))}
    for digest, text in saved.items():
        assert read_members(dataset, digest) == text


def _history(dataset: Path, versions: int) -> list[str]:
    members = {f"{i:064x}": "train" for i in range(100)}
    digests: list[str] = []
    for version in range(versions):
        members[f"{1000 + version:064x}"] = "test"
        digests.append(_save(dataset, _text(members), digests[-1] if digests else None))
    return digests


def test_members_file_grows_by_a_line_and_chains_stay_short(tmp_path: Path) -> None:
    digests = _history(tmp_path, 120)
    sizes = [(tmp_path / "versions" / d[:12] / "members.tsv").stat().st_size for d in digests]
    whole = [len(read_members(tmp_path, d)) for d in digests]
    small = [size for size, full in zip(sizes, whole, strict=True) if size != full]
    assert len(small) > 110
    assert max(small) < 300
    through = 0
    for size, full in zip(sizes, whole, strict=True):
        through = 0 if size == full else through + size
        assert 2 * through <= full


@pytest.mark.parametrize(
    ("line", "old", "new", "at"),
    [
        (0, "from\t", "fram\t", ""),
        (0, "from\t", "from\t!", ":1"),
        (1, "+", "*", ":2"),
        (1, "+", "-", ":2"),
        (1, "te", "tr", ""),
    ],
)
def test_changed_members_are_reported_by_file(tmp_path: Path, line: int, old: str, new: str, at: str) -> None:
    digests = _history(tmp_path, 3)
    path = tmp_path / "versions" / digests[1][:12] / "members.tsv"
    lines = path.read_text().splitlines()
    lines[line] = lines[line].replace(old, new, 1)
    path.write_text("\n".join(lines) + "\n")
    for digest in digests[1:]:
        with pytest.raises(UserError) as caught:
            read_members(tmp_path, digest)
        assert caught.value.where == f"{path}{at}"


def test_versions_that_build_on_each_other_are_refused(tmp_path: Path) -> None:
    digests = _history(tmp_path, 2)
    path = tmp_path / "versions" / digests[0][:12] / "members.tsv"
    path.write_text(f"from\t{digests[1][:12]}\n")
    with pytest.raises(UserError, match="builds on itself"):
        read_members(tmp_path, digests[1])


# A dataset lives in git: what one more row adds to the repository


def _git(project: ProjectFolder, *arguments: str, stdin: bytes = b"") -> bytes:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, cwd=project.root, input=stdin, capture_output=True, check=True).stdout


def _commit(project: ProjectFolder) -> None:
    _git(project, "add", "-A")
    _git(project, "commit", "-qm", "data")


def _add(project: ProjectFolder, pairs: list[tuple[str, str]], name: str = "pairs.jsonl") -> None:
    add(project, [write_jsonl(project.root / name, pairs)], Listener())
    (project.root / name).unlink()


@pytest.fixture(scope="module", params=["a file of its own", "the file that grew"])
def repository(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A repository with 2,000 rows in one commit, and one more row in the next."""
    project = new_project(tmp_path_factory.mktemp("git") / "p")
    pairs = unlike_pairs(2_001)
    _git(project, "init", "-q")
    _add(project, pairs[:-1])
    _commit(project)
    _git(project, "gc", "-q")
    if request.param == "a file of its own":
        _add(project, pairs[-1:], "one.jsonl")
    else:
        _add(project, pairs)
    _commit(project)
    return project


@pytest.mark.slow
def test_version_takes_under_4_kb_when_one_row_of_2000_is_new(repository: ProjectFolder) -> None:
    pack = _git(repository, "pack-objects", "--revs", "--thin", "--stdout", "-q", stdin=b"HEAD\n^HEAD~1\n")
    lines = _git(repository, "diff", "HEAD~1", "HEAD", "--unified=0", "--no-color").splitlines(keepends=True)
    changed = [line for line in lines if line[:1] in b"+-" and line[:3] not in (b"+++", b"---")]
    assert 0 < len(pack) < 4096
    assert 0 < sum(map(len, changed)) < 4096
