"""Splits by cluster: shares, the seed, and that nothing held out comes back into training."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.data.splits import SPLITS, Split, assign_splits
from tunewright.errors import UserError
from tunewright.recipe import DataRecipe

RECIPE = DataRecipe()


def _clusters(sizes: list[int], prefix: str = "c") -> dict[str, list[str]]:
    return {f"{prefix}{i}": [f"{prefix}{i}-{k}" for k in range(size)] for i, size in enumerate(sizes)}


def _rows(clusters: dict[str, list[str]], splits: dict[str, Split]) -> Counter[Split]:
    return Counter(splits[name] for name, keys in clusters.items() for _ in keys)


def test_single_rows_are_split_80_10_10() -> None:
    clusters = _clusters([1] * 1000)
    assert _rows(clusters, assign_splits(clusters, {}, RECIPE, 0)) == {"train": 800, "dev": 100, "test": 100}


@given(st.lists(st.integers(1, 30), min_size=10, max_size=60), st.integers(0, 5))
def test_every_split_has_rows_and_shares_are_not_overrun(sizes: list[int], seed: int) -> None:
    clusters = _clusters(sizes)
    splits = assign_splits(clusters, {}, RECIPE, seed)
    rows = _rows(clusters, splits)
    assert set(splits) == set(clusters)
    assert set(rows) == set(SPLITS)
    goal = round(0.1 * sum(sizes))
    for held_out in ("test", "dev"):
        names = [name for name, split in splits.items() if split == held_out]
        assert rows[held_out] <= goal or len(names) == 1  # one cluster, where none fits


def test_small_clusters_are_left_for_dev_and_train_where_the_rest_is_one_large_family() -> None:
    clusters = _clusters([1] * 9 + [100])
    rows = _rows(clusters, assign_splits(clusters, {}, RECIPE, 0))
    assert rows == {"test": 8, "dev": 1, "train": 100}


@given(st.lists(st.integers(1, 5), min_size=10, max_size=30), st.randoms())
def test_the_order_of_clusters_decides_nothing_and_the_seed_does(sizes: list[int], draw: random.Random) -> None:
    clusters = _clusters(sizes)
    names = list(clusters)
    draw.shuffle(names)
    shuffled = {name: clusters[name] for name in names}
    assert assign_splits(shuffled, {}, RECIPE, 3) == assign_splits(clusters, {}, RECIPE, 3)


def test_another_seed_draws_another_test_set() -> None:
    clusters = _clusters([1] * 100)
    assert assign_splits(clusters, {}, RECIPE, 0) != assign_splits(clusters, {}, RECIPE, 1)


@given(st.lists(st.integers(1, 6), min_size=10, max_size=30), st.lists(st.integers(1, 6), max_size=30))
def test_old_clusters_stay_where_they_are_when_new_ones_come(old: list[int], new: list[int]) -> None:
    before = _clusters(old)
    first = assign_splits(before, {}, RECIPE, 0)
    former = {key: first[name] for name, keys in before.items() for key in keys}
    both = before | _clusters(new, "n")
    second = assign_splits(both, former, RECIPE, 0)
    assert {name: second[name] for name in before} == first


@pytest.mark.parametrize(
    ("parts", "split"),
    [(("train", "test"), "test"), (("dev", "test"), "test"), (("train", "dev"), "dev"), (("train", "train"), "train")],
)
def test_a_bridge_between_clusters_goes_to_the_side_that_was_held_out(parts: tuple[Split, Split], split: Split) -> None:
    former: dict[str, Split] = {"a": parts[0], "b": parts[1], "t": "test", "d": "dev", "r": "train"}
    clusters = {"bridge": ["a", "b", "new"], "t": ["t"], "d": ["d"], "r": ["r"]} | _clusters([1] * 10)
    assert assign_splits(clusters, former, RECIPE, 0)["bridge"] == split


def test_too_few_clusters_say_how_many_there_are_and_how_many_are_needed() -> None:
    with pytest.raises(UserError, match=r"3 different rows make 3 independent clusters.*at least 10"):
        assign_splits(_clusters([1, 1, 1]), {}, RECIPE, 0)


def test_one_giant_cluster_points_at_the_instruction_in_every_input() -> None:
    with pytest.raises(UserError, match=r"One cluster holds 500 rows.*data\.system"):
        assign_splits(_clusters([500, 1, 1]), {}, RECIPE, 0)


def test_a_split_that_would_be_left_empty_is_refused() -> None:
    former: dict[str, Split] = {f"c{i}-0": "test" for i in range(12)}
    with pytest.raises(UserError, match="no cluster is left for train"):
        assign_splits(_clusters([1] * 12), former, RECIPE, 0)
