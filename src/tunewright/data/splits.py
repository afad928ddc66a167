"""Train, dev and test, by cluster: what is alike stays on one side, in this version and in every later one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from tunewright.errors import UserError
from tunewright.recipe import DataRecipe

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

MINIMUM_CLUSTERS = 10  # with fewer, a tenth of them is less than one


def assign_splits(
    clusters: Mapping[str, Sequence[str]], former: Mapping[str, Split], data: DataRecipe, seed: int
) -> dict[str, Split]:
    """The split of every cluster.

    A cluster with a row that was ever held out for the test stays in the test, then likewise for dev and train. New
    clusters come in an order drawn from the seed and their names; they fill the test and then dev up to their shares
    of the rows, without going over (a cluster too large for what is left is passed over), and the rest is for training.

    Args:
        clusters: cluster name to the pair keys in it.
        former: the split of each pair key in the version before.
        data: the shares of dev and test.
        seed: decides the order of new clusters.

    Raises:
        UserError: too few clusters for three splits.
    """
    if len(clusters) < MINIMUM_CLUSTERS:
        raise _too_few(clusters)
    splits: dict[str, Split] = {}
    for name, keys in clusters.items():
        before = {former[key] for key in keys if key in former}
        for split in ("test", "dev", "train"):
            if split in before:
                splits[name] = split
                break
    free = sorted(clusters.keys() - splits.keys(), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    total = sum(len(keys) for keys in clusters.values())
    goals: tuple[tuple[Split, float], ...] = (("test", data.test), ("dev", data.dev))
    for split, share in goals:
        held = sum(len(clusters[name]) for name, s in splits.items() if s == split)
        # Each split that still has nothing keeps a claim on one of the free clusters.
        claims = len({"train", "dev", "test"} - {split} - set(splits.values()))
        for name in _fill(free, clusters, round(share * total) - held, len(free) - claims, must=held == 0):
            splits[name] = split
            free.remove(name)
    splits |= dict.fromkeys(free, "train")
    for split in SPLITS:
        if split not in splits.values():
            raise UserError(
                f"no cluster is left for {split}: the new rows join clusters that were apart",
                fix="Add rows that are independent of those already there, or leave out the ones that join clusters.",
            )
    return splits


def _fill(free: Sequence[str], clusters: Mapping[str, Sequence[str]], room: int, most: int, *, must: bool) -> list[str]:
    """Which free clusters go into a split with room for so many rows; at least one if it ``must`` not stay empty."""
    taken: list[str] = []
    for name in free:
        if len(clusters[name]) <= room and len(taken) < most:
            taken.append(name)
            room -= len(clusters[name])
    if must and not taken and most > 0:
        taken = [min(free, key=lambda name: len(clusters[name]))]
    return taken


def _too_few(clusters: Mapping[str, Sequence[str]]) -> UserError:
    total = sum(len(keys) for keys in clusters.values())
    largest = max((len(keys) for keys in clusters.values()), default=0)
    what = (
        f"too few to split: {total} different rows make {len(clusters)} independent clusters, and train, dev and test "
        f"need at least {MINIMUM_CLUSTERS}"
    )
    fix = "Add more pairs: some hundreds are a fair start."
    if largest > total / 2 and total >= MINIMUM_CLUSTERS:
        fix = (
            f"One cluster holds {largest} rows, because their inputs are nearly equal. If that is an instruction "
            "written into each of them, move it to data.system; else add pairs with other inputs."
        )
    return UserError(what, fix=fix)
