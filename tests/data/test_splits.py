"""Splits by cluster: shares, the seed, and that nothing held out comes back into training."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from data_helpers import Listener, example, jaccard
from hypothesis import given
from hypothesis import strategies as st

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.dedup import find_clusters
from tunewright.data.splits import SPLITS, Split, assign_splits, join_groups

CONFIG = DataConfig()


def _clusters(sizes: list[int], prefix: str = "c") -> dict[str, list[str]]:
    return {f"{prefix}{i}": [f"{prefix}{i}-{k}" for k in range(size)] for i, size in enumerate(sizes)}


def _rows(clusters: dict[str, list[str]], splits: dict[str, Split]) -> Counter[Split]:
    return Counter(splits[name] for name, keys in clusters.items() for _ in keys)


@given(st.lists(st.integers(1, 30), min_size=10, max_size=60), st.integers(0, 5))
def test_assign_splits_fills_every_split_within_its_share(sizes: list[int], seed: int) -> None:
    clusters = _clusters(sizes)
    splits = assign_splits(clusters, {}, CONFIG, seed)
    rows = _rows(clusters, splits)
    assert set(splits) == set(clusters)
    assert set(rows) == set(SPLITS)
    goal = round(0.1 * sum(sizes))
    for held_out in ("test", "dev"):
        names = [name for name, split in splits.items() if split == held_out]
        assert rows[held_out] <= goal or len(names) == 1  # one cluster, where none fits


@pytest.mark.parametrize("seed", range(10))
def test_assign_splits_takes_large_clusters_last(seed: int) -> None:
    clusters = _clusters([1] * 300 + [25] * 10)
    splits = assign_splits(clusters, {}, CONFIG, seed)
    assert all(splits[name] == "train" for name, keys in clusters.items() if len(keys) == 25)


def test_assign_splits_leaves_small_clusters_for_dev_and_train() -> None:
    clusters = _clusters([1] * 9 + [100])
    rows = _rows(clusters, assign_splits(clusters, {}, CONFIG, 0))
    assert rows == {"test": 8, "dev": 1, "train": 100}


@given(st.lists(st.integers(1, 5), min_size=10, max_size=30), st.randoms())
def test_assign_splits_ignores_the_order_of_clusters(sizes: list[int], draw: random.Random) -> None:
    clusters = _clusters(sizes)
    names = list(clusters)
    draw.shuffle(names)
    shuffled = {name: clusters[name] for name in names}
    assert assign_splits(shuffled, {}, CONFIG, 3) == assign_splits(clusters, {}, CONFIG, 3)


def test_assign_splits_depends_on_the_seed() -> None:
    clusters = _clusters([1] * 100)
    assert assign_splits(clusters, {}, CONFIG, 0) != assign_splits(clusters, {}, CONFIG, 1)


@given(st.lists(st.integers(1, 6), min_size=10, max_size=30), st.lists(st.integers(1, 6), max_size=30))
def test_assign_splits_keeps_old_clusters_in_place(old: list[int], new: list[int]) -> None:
    before = _clusters(old)
    first = assign_splits(before, {}, CONFIG, 0)
    former = {key: first[name] for name, keys in before.items() for key in keys}
    both = before | _clusters(new, "n")
    second = assign_splits(both, former, CONFIG, 0)
    assert {name: second[name] for name in before} == first


@pytest.mark.parametrize(
    ("parts", "split"),
    [(("train", "test"), "test"), (("dev", "test"), "test"), (("train", "dev"), "dev"), (("train", "train"), "train")],
)
def test_assign_splits_puts_a_bridge_into_the_held_out_split(parts: tuple[Split, Split], split: Split) -> None:
    former: dict[str, Split] = {"a": parts[0], "b": parts[1], "t": "test", "d": "dev", "r": "train"}
    clusters = {"bridge": ["a", "b", "new"], "t": ["t"], "d": ["d"], "r": ["r"]} | _clusters([1] * 10)
    assert assign_splits(clusters, former, CONFIG, 0)["bridge"] == split


@pytest.mark.parametrize(
    ("sizes", "held", "numbers"),
    [([1] * 3, 0, r"3 distinct rows in 3 clusters .minimum 10"), ([500, 1, 1], 0, "500 rows"), ([1] * 12, 12, "train")],
)
def test_assign_splits_refuses_too_few_clusters(sizes: list[int], held: int, numbers: str) -> None:
    former: dict[str, Split] = {f"c{i}-0": "test" for i in range(held)}
    with pytest.raises(UserError, match=numbers):
        assign_splits(_clusters(sizes), former, CONFIG, 0)


def test_join_groups_joins_clusters_through_chains() -> None:
    clusters = {"a": ["a", "a2"], "b": ["b"], "c": ["c"], "d": ["d"], "e": ["e"]}
    groups = {"d": ["customer=ACME"], "a2": ["customer=ACME", "file=1"], "c": ["file=1"], "b": ["file=2"]}
    assert join_groups(clusters, groups) == {"a": ["a", "a2", "c", "d"], "b": ["b"], "e": ["e"]}
    assert join_groups(clusters, {"not a row": ["file=1"], "a": ["file=1"]}) == clusters


groupings = st.dictionaries(
    st.sampled_from([f"c{i}-0" for i in range(12)]), st.lists(st.sampled_from("xyz"), max_size=2), max_size=12
)


@given(groupings, st.randoms())
def test_join_groups_is_minimal(groups: dict[str, list[str]], draw: random.Random) -> None:
    clusters = _clusters([2] * 12)
    names = list(clusters)
    draw.shuffle(names)
    joined = join_groups({name: clusters[name] for name in names}, groups)
    parts = [set(keys) for keys in clusters.values()]
    for value in "xyz":
        parts.append({key for key, values in groups.items() if value in values})
    merged: list[set[str]] = []
    for part in parts:
        touching = [other for other in merged if other & part]
        merged = [other for other in merged if not other & part] + [part.union(*touching)]
    assert sorted(map(sorted, joined.values())) == sorted(sorted(part) for part in merged if part)
    assert all(name == min(key.split("-")[0] for key in keys) for name, keys in joined.items())


WORDS = ["card", "cash", "loan", "wire", "fees", "bank", "lost", "late"]
rows_of_a_version = st.lists(
    st.tuples(
        st.lists(st.sampled_from(WORDS), min_size=4, max_size=6).map(" ".join),
        st.sampled_from(["", "", "", "customer=A", "customer=B", "customer=C"]),
        st.sampled_from(["yes", "no"]),
    ),
    min_size=1,
    max_size=12,
)


@given(st.lists(rows_of_a_version, min_size=1, max_size=4), st.integers(0, 3), st.booleans())
def test_splits_separate_near_pairs_and_groups_in_any_history(
    batches: list[list[tuple[str, str, str]]], seed: int, by_class: bool
) -> None:
    """Every version's rows are clustered, joined and split as a whole; a test row stays a test row for ever."""
    alone = [(f"{i * 7919:x} {i * 104729:x} {i * 1299709:x}", "", "no") for i in range(1, 40)]
    texts: dict[str, tuple[str, str, str]] = {}
    former: dict[str, Split] = {}
    for batch in [alone, *batches]:
        for row in batch:
            texts.setdefault(example(row[0], row[2]).pair_key, row)
        keys = sorted(texts)
        names = find_clusters([example(texts[key][0], texts[key][2]) for key in keys], 0.6, Listener())
        clusters: dict[str, list[str]] = defaultdict(list)
        for key, name in zip(keys, names, strict=True):
            clusters[name].append(key)
        joined = join_groups(clusters, {key: [group] for key, (_, group, _) in texts.items() if group})
        classes = {key: answer for key, (_, _, answer) in texts.items()}
        splits = assign_splits(joined, former, CONFIG, seed, classes if by_class else None)
        now = {key: splits[name] for name, keys in joined.items() for key in keys}
        for i, a in enumerate(keys):
            for b in keys[:i]:
                group = texts[a][1] and texts[a][1] == texts[b][1]
                if group or jaccard(texts[a][0], texts[b][0]) >= 0.6:
                    assert now[a] == now[b]
        assert all(now[key] == "test" for key, split in former.items() if split == "test")
        assert all(now[key] != "train" for key, split in former.items() if split == "dev")
        former = now


@given(st.lists(st.integers(5, 60), min_size=2, max_size=20), st.integers(0, 3))
def test_assign_splits_gives_each_class_its_exact_share_for_single_rows(sizes: list[int], seed: int) -> None:
    classes = {f"{label}-{i}": str(label) for label, size in enumerate(sizes) for i in range(size)}
    clusters = {key: [key] for key in classes}
    splits = assign_splits(clusters, {}, CONFIG, seed, classes)
    for held_out in ("test", "dev"):
        counts = Counter(classes[key] for key, split in splits.items() if split == held_out)
        assert sum(counts.values()) == max(round(0.1 * sum(sizes)), 1)
        for label, size in enumerate(sizes):
            assert abs(counts[str(label)] - 0.1 * size) < 1 + 1e-9


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=60, max_size=200), st.integers(0, 3))
def test_assign_splits_gives_classes_their_shares_within_whole_clusters(
    kinds: list[tuple[int, int]], seed: int
) -> None:
    """No further off than the largest cluster is large, and the split as a whole is as full as without classes."""
    clusters = _clusters([size for size, _ in kinds])
    classes = {key: str(kind) for (_, kind), keys in zip(kinds, clusters.values(), strict=True) for key in keys}
    splits = assign_splits(clusters, {}, CONFIG, seed, classes)
    totals, rows = Counter(classes.values()), _rows(clusters, splits)
    for held_out in ("test", "dev"):
        assert 0 <= round(0.1 * sum(totals.values())) - rows[held_out] <= 6
        counts = Counter(classes[k] for name, keys in clusters.items() for k in keys if splits[name] == held_out)
        for kind, total in totals.items():
            assert abs(counts[kind] - 0.1 * total) <= 6


def test_assign_splits_puts_a_rare_class_into_test() -> None:
    classes = {f"r{i}": "rare" for i in range(10)} | {f"o{i}": "often" for i in range(990)}
    clusters = {key: [key] for key in classes}
    for seed in range(20):
        splits = assign_splits(clusters, {}, CONFIG, seed, classes)
        assert [sum(splits[key] == s for key in classes if classes[key] == "rare") for s in SPLITS] == [8, 1, 1]


def test_assign_splits_fills_lacking_classes_of_test_later() -> None:
    clusters = {f"a{i}": [f"a{i}"] for i in range(100)}
    classes = dict.fromkeys(clusters, "a")
    first = assign_splits(clusters, {}, CONFIG, 0, classes)
    more = {f"b{i}": [f"b{i}"] for i in range(100)}
    both = classes | dict.fromkeys(more, "b")
    second = assign_splits(clusters | more, first, CONFIG, 0, both)
    assert {name: second[name] for name in clusters} == first
    assert Counter((both[name], split) for name, split in second.items()) == {
        (kind, split): count for kind in "ab" for split, count in (("train", 80), ("dev", 10), ("test", 10))
    }
