"""A version's members are kept as what differs from the version before, and read back whole and verified."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypothesis_settings import examples
from tunewright.core.errors import UserError
from tunewright.data.versions.files import lines_sha256, members_file, read_members


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
