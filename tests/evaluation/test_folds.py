"""Folds: every row is held out once, clusters stay whole, and sizes are as like as whole clusters allow."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fold_helpers import version_of
from tunewright.core.errors import UserError
from tunewright.data.splits import SPLITS
from tunewright.data.versions import members_digest
from tunewright.evaluation.folds import fold_versions

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
