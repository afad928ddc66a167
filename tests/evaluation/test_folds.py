"""Folds hold out every row once, and parts of the training rows are nested; clusters stay whole in both."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making.versions import version_of
from tunewright.core.errors import UserError
from tunewright.data.splits import SPLITS, Split
from tunewright.data.versions import DatasetVersion, members_digest
from tunewright.evaluation.folds import fold_versions, subset_versions

SIZES = st.lists(st.integers(1, 6), min_size=12, max_size=40)


@given(SIZES, st.integers(2, 6), st.integers(0, 99))
def test_folds_test_every_row_once_and_keep_clusters_whole(sizes: list[int], folds: int, seed: int) -> None:
    version = version_of(sizes)
    made = fold_versions(version, folds, seed)
    held_out = Counter(m.key for fold in made for m in fold.examples("test"))
    assert held_out == Counter(m.key for m in version.members)
    for fold in made:
        assert [m.key for m in fold.members] == [m.key for m in version.members]
        sides = {split: {m.cluster for m in fold.examples(split)} for split in SPLITS}
        assert all(sides.values())
        assert sum(map(len, sides.values())) == len({m.cluster for m in version.members})


@given(SIZES, st.integers(2, 6), st.integers(0, 99))
def test_folds_differ_by_no_more_than_the_largest_cluster(sizes: list[int], folds: int, seed: int) -> None:
    rows = [len(fold.examples("test")) for fold in fold_versions(version_of(sizes), folds, seed)]
    assert max(rows) - min(rows) <= max(sizes)


@given(SIZES, st.integers(2, 6), st.integers(0, 99))
def test_dev_is_within_its_share_unless_one_cluster_is_more(sizes: list[int], folds: int, seed: int) -> None:
    for fold in fold_versions(version_of(sizes), folds, seed):
        dev = fold.examples("dev")
        assert len(dev) <= round(0.1 * sum(sizes)) or len({m.cluster for m in dev}) == 1


def test_single_rows_make_folds_of_the_same_size() -> None:
    made = fold_versions(version_of([1] * 200), 5, 0)
    assert [[len(fold.examples(split)) for split in SPLITS] for fold in made] == [[140, 20, 40]] * 5


def test_folds_depend_on_the_seed() -> None:
    version = version_of([1, 2] * 30)
    first, again, other = (fold_versions(version, 5, seed) for seed in (0, 0, 1))
    assert [f.digest for f in first] == [f.digest for f in again]
    assert not {f.digest for f in first} & {f.digest for f in other}


def test_fold_digest_covers_its_members_and_names_the_parent() -> None:
    version = version_of([1] * 40)
    for fold in fold_versions(version, 4, 0):
        assert fold.digest == members_digest(fold.members) != version.digest
        assert fold.manifest.parent == version.digest
        assert fold.manifest.counts.test == len(fold.examples("test"))


@pytest.mark.parametrize(("sizes", "folds"), [([1] * 4, 5), ([1, 1], 2), ([5, 1, 1], 2)])
def test_folds_refuse_too_few_clusters(sizes: list[int], folds: int) -> None:
    with pytest.raises(UserError, match=f"too few for {folds} folds") as caught:
        fold_versions(version_of(sizes), folds, 0)
    assert caught.value.where == "--folds"


# Nested parts

SHARES = (0.25, 0.5, 1.0)
HELD_OUT: dict[int, Split] = {3: "dev", 4: "test"}


def _version(sizes: list[int], mixed: int = 0) -> DatasetVersion:
    """A fifth of the clusters is dev, another test; ``mixed`` rows of the training part are of the mix-in."""
    version = version_of(sizes)
    place = {name: number % 5 for number, name in enumerate(sorted({m.cluster for m in version.members}))}
    members = [replace(m, split=HELD_OUT.get(place[m.cluster], "train")) for m in version.members]
    left = mixed
    for number, member in enumerate(members):
        if left and member.split == "train":
            members[number] = replace(member, mixed=True, cluster=f"mixed {member.key}")
            left -= 1
    return DatasetVersion(version.manifest, tuple(members))


@given(st.lists(st.integers(1, 9), min_size=25, max_size=80), st.integers(0, 5), st.integers(0, 40))
def test_subsets_are_nested_and_clusters_whole(sizes: list[int], seed: int, mixed: int) -> None:
    version = _version(sizes, mixed)
    try:
        parts = subset_versions(version, SHARES, seed)
    except UserError:
        return  # covered in the test below
    every = version.members
    for part in parts:
        kept = {m.key for m in part.members}
        assert [m for m in part.members if m.split != "train"] == [m for m in every if m.split != "train"]
        taken = {m.cluster for m in part.examples("train")}
        assert {m.key for m in every if m.split == "train" and m.cluster in taken} <= kept
        assert part.digest == (members_digest(part.members) if part is not version else version.digest)
        assert part.manifest.counts.train == len(part.examples("train")) or part is version
    for smaller, larger in pairwise(parts):
        assert {m.key for m in smaller.members} < {m.key for m in larger.members}
    assert parts[-1] is version


@given(st.lists(st.integers(1, 4), min_size=40, max_size=80), st.integers(0, 5), st.sampled_from([0, 20]))
def test_subset_is_as_near_to_its_share_as_whole_clusters_allow(sizes: list[int], seed: int, mixed: int) -> None:
    version = _version(sizes, mixed)
    for share, part in zip(SHARES, subset_versions(version, SHARES, seed), strict=True):
        rows, of = len(part.domain_of("train")), len(version.domain_of("train"))
        assert abs(rows - share * of) <= max(sizes) / 2
        generic = len(part.examples("train")) - rows
        assert generic == pytest.approx(share * mixed, abs=0.5)


def test_subset_depends_on_the_seed() -> None:
    version = _version([1] * 60)
    first, second = (subset_versions(version, SHARES, seed)[0] for seed in (0, 1))
    assert first.split_digest("train") != second.split_digest("train")
    assert first.split_digest("dev") == second.split_digest("dev")
    assert subset_versions(version, SHARES, 0)[0].digest == first.digest


def test_subset_refuses_too_few_clusters() -> None:
    with pytest.raises(UserError, match=r"too few independent clusters to divide.*25%: 0, 50%: 0, 100%: 30"):
        subset_versions(version_of([30]), SHARES, 0)
