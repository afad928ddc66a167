"""Parts of the training rows: nested, by whole clusters, near their shares, and dev and test are as they were."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fold_helpers import version_of
from tunewright.core.errors import UserError
from tunewright.data.splits import Split
from tunewright.data.versions import DatasetVersion, members_digest
from tunewright.evaluation.folds import subset_versions

SHARES = (0.25, 0.5, 1.0)
SPLITS: dict[int, Split] = {3: "dev", 4: "test"}


def _version(sizes: list[int], mixed: int = 0) -> DatasetVersion:
    """A fifth of the clusters is dev, another test; ``mixed`` rows of the training part are of the mix-in."""
    version = version_of(sizes)
    place = {name: number % 5 for number, name in enumerate(sorted({m.cluster for m in version.members}))}
    members = [replace(m, split=SPLITS.get(place[m.cluster], "train")) for m in version.members]
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
