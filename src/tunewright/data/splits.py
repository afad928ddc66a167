"""Assignment of clusters to train, dev and test: similar rows stay in one split, also in later versions."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import get_args

from tunewright.config import DataConfig
from tunewright.config import Split as Split
from tunewright.core.errors import UserError
from tunewright.core.text import count_of

FEWEST_TRAINING_PAIRS = 50
"""Training on fewer pairs is refused unless forced."""
FEW_TRAINING_PAIRS = 500
"""Training on fewer pairs gets a warning of overfitting."""
SPLITS: tuple[Split, ...] = get_args(Split)

MINIMUM_CLUSTERS = 10  # with fewer clusters, a tenth is less than one
LARGEST = 1 / 3
"""Share of dev or test that a cluster may take while smaller ones fit."""


def too_few(training: int) -> str | None:
    """Return why a set with this number of training pairs cannot be trained on, and what can be done; else None."""
    if training >= FEWEST_TRAINING_PAIRS:
        return None
    few = f"{count_of(training, 'training pair')}, and training requires {FEWEST_TRAINING_PAIRS}"
    return f"{few}: add examples, or compare prompts with `tunewright advise`"


def strictest(splits: Iterable[Split | None]) -> Split | None:
    """Return test if it is among the splits, else dev, else train."""
    there = set(splits)
    return next((split for split in SPLITS[::-1] if split in there), None)


def join_groups(clusters: Mapping[str, Sequence[str]], group_of: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    """Join the clusters whose rows share a group value, through any chain of rows and values.

    Each joined cluster is named after the smallest of its parts' names, which is its smallest pair key. Values, such as
    "customer=ACME", of keys in no cluster (dropped duplicates) are ignored.
    """
    parent = {name: name for name in clusters}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    holder: dict[str, str] = {}
    for name, keys in clusters.items():
        for value in (value for key in keys for value in group_of.get(key, ())):
            one, other = sorted((root(name), root(holder.setdefault(value, name))))
            parent[other] = one
    joined: dict[str, list[str]] = {}
    for name, keys in clusters.items():
        joined.setdefault(root(name), []).extend(keys)
    return joined


def assign_splits(
    clusters: Mapping[str, Sequence[str]],
    former: Mapping[str, Split],
    data: DataConfig,
    seed: int,
    class_of: Mapping[str, str] | None = None,
    train_only: Collection[str] = frozenset(),
    given: Mapping[str, Split] | None = None,
) -> dict[str, Split]:
    """Return the split of each cluster.

    A cluster with a row of the former test split stays in test; likewise for dev, then train. The seed and the names
    decide the order of new clusters, which fill test and then dev up to their shares of the rows. A cluster that does
    not fit is skipped, and the rest is for training. Without classes, clusters larger than a third of a split come
    last, since two of them would dominate its scores.

    Args:
        clusters: cluster name to the pair keys in it.
        former: the split of each pair key in the previous version.
        class_of: the class of each pair key, to stratify as far as whole clusters and settled splits allow; None: do
            not stratify.
        train_only: pair keys of generated rows, whose new clusters are for training. They do not count for the shares
            of the other splits, and no cluster with a row of the former dev or test split contains one.
        given: the split that authors gave to pair keys; that of ``former`` comes first. Nothing is drawn for dev or
            test if they gave it rows. Without a dev split of theirs, dev is drawn from their training rows too.
    """
    given = given or {}
    dev_given = "dev" in given.values()
    settling = {key: split for key, split in given.items() if split != "train" or dev_given} | dict(former)
    splits: dict[str, Split] = {}
    for name, keys in clusters.items():
        settled = strictest("train" if key in train_only else settling.get(key) for key in keys)
        if settled is not None:
            splits[name] = settled
    if train_only:
        clusters = {name: [key for key in keys if key not in train_only] for name, keys in clusters.items()}
    own = {name: keys for name, keys in clusters.items() if keys}
    if len(own) < MINIMUM_CLUSTERS:
        raise _too_few(own, data, generated=len(train_only))
    free = sorted(clusters.keys() - splits.keys(), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    total = sum(len(keys) for keys in clusters.values())
    goals: tuple[tuple[Split, float], ...] = (("test", data.test_size), ("dev", data.val_size))
    by_authors = {name for name, keys in clusters.items() if not given.keys().isdisjoint(keys)}
    for split, share in goals:
        if split in given.values():
            continue
        held = [name for name, s in splits.items() if s == split]
        room = round(share * total) - sum(len(clusters[name]) for name in held)
        # Each empty split reserves one of the free clusters.
        most = len(free) - len({"train", "dev", "test"} - {split} - set(splits.values()))
        drawn = [name for name in free if split == "dev" or name not in by_authors]
        if class_of is None:
            # sorted is stable: the smaller ones keep their order
            small_first = sorted(drawn, key=lambda name: len(clusters[name]) > LARGEST * share * total)
            taken = _fill(small_first, clusters, room, most, lambda _: True)
        else:
            taken = _fill_by_class(drawn, clusters, room, most, _Classes(clusters, class_of, share, held))
        if drawn and not held and not taken and most > 0:
            taken = [min(drawn, key=lambda name: len(clusters[name]))]
        splits |= dict.fromkeys(taken, split)
        free = [name for name in free if name not in splits]
    splits |= dict.fromkeys(free, "train")
    for split in SPLITS:
        if split not in splits.values():
            if given:
                counts = ", ".join(f"{count:,} {name}" for name, count in sorted(Counter(given.values()).items()))
                raise UserError(
                    f"No row for {split}: the authors' split has {counts}, and no other row can be drawn for it",
                    where="data.split_column, data.sources or --split",
                    fix=f"Add the rows for {split} in the same command, or leave some rows without a split.",
                )
            raise UserError(
                f"No cluster is left for {split}: the new rows join separate clusters",
                fix="Add rows that are independent of the existing ones, or leave out the rows that join clusters.",
            )
    return splits


def _fill(
    free: Sequence[str], clusters: Mapping[str, Sequence[str]], room: int, most: int, allowed: Callable[[str], bool]
) -> list[str]:
    """Return the free clusters to put into a split with ``room`` rows left: in order, each that fits."""
    taken: list[str] = []
    for name in free:
        if len(clusters[name]) <= room and len(taken) < most and allowed(name):
            taken.append(name)
            room -= len(clusters[name])
    return taken


class _Classes:
    """Number of rows of each class that a split still lacks."""

    def __init__(
        self,
        clusters: Mapping[str, Sequence[str]],
        class_of: Mapping[str, str],
        share: float,
        held: Sequence[str],
    ) -> None:
        self.counts = {name: Counter(class_of[key] for key in keys) for name, keys in clusters.items()}
        totals: Counter[str] = Counter()
        for counts in self.counts.values():
            totals.update(counts)
        self.lacking = {label: share * count for label, count in totals.items()}
        for name in held:
            self.take(name)

    def take(self, name: str) -> None:
        for label, count in self.counts[name].items():
            self.lacking[label] -= count

    def take_if_lacking(self, name: str) -> bool:
        """Take a cluster if no class of it gets more than its share."""
        fits = all(count <= self.lacking[label] + 1e-9 for label, count in self.counts[name].items())
        if fits:
            self.take(name)
        return fits

    def cost(self, name: str) -> float:
        """Return the increase of the squared distance of its classes from their shares, if the cluster is taken.
        The lacking rows of a class change from l to l - c, so the square changes by c (c - 2 l).
        """
        return sum(count * (count - 2 * self.lacking[label]) for label, count in self.counts[name].items())


def _fill_by_class(
    free: Sequence[str], clusters: Mapping[str, Sequence[str]], room: int, most: int, classes: _Classes
) -> list[str]:
    """Fill a split by class: first clusters within all classes' shares, then the nearest ones.

    For clusters of single rows, the second round is the largest remainder method: it distributes the rows that are left
    when each class has its share rounded down.
    """
    taken = _fill(free, clusters, room, most, classes.take_if_lacking)
    room -= sum(len(clusters[name]) for name in taken)
    gone = set(taken)
    rest = [(classes.cost(name), place, name) for place, name in enumerate(free) if name not in gone]
    heapq.heapify(rest)
    while rest and room > 0 and len(taken) < most:
        cost, place, name = heapq.heappop(rest)
        if len(clusters[name]) > room:
            continue
        now = classes.cost(name)
        if now > cost:  # clusters of its classes were taken since: requeue it at its present cost
            heapq.heappush(rest, (now, place, name))
            continue
        classes.take(name)
        taken.append(name)
        room -= len(clusters[name])
    return taken


def _too_few(clusters: Mapping[str, Sequence[str]], data: DataConfig, generated: int) -> UserError:
    total = sum(len(keys) for keys in clusters.values())
    largest = max((len(keys) for keys in clusters.values()), default=0)
    what = (
        f"Too few independent rows to split: {count_of(total, 'distinct row')} in {count_of(len(clusters), 'cluster')} "
        f"(minimum {MINIMUM_CLUSTERS})"
    )
    fix = "Add more pairs: a few hundred are a good start."
    if generated:
        what += f", without {count_of(generated, 'generated row')} that nobody has accepted"
        fix = "Add pairs of people first: dev and test need them."
    if data.split_by == "output_template" and total >= MINIMUM_CLUSTERS:
        fix = (
            f"data.split_by: output_template joins rows whose outputs differ only in quoted strings and numbers (up to "
            f"{largest} rows here). Set data.split_by: input, or add pairs whose outputs have other forms."
        )
    elif data.group_by and total >= MINIMUM_CLUSTERS:
        fix = (
            f"One cluster holds {largest} rows, because data.group_by ({', '.join(data.group_by)}) joins rows that "
            "share a value. Group by a finer key, or add pairs of other groups."
        )
    elif largest > total / 2 and total >= MINIMUM_CLUSTERS:
        fix = (
            f"One cluster holds {largest} rows, because their inputs are nearly equal. If each row repeats an "
            "instruction, move it to data.system_prompt; else add pairs with other inputs."
        )
    return UserError(what, fix=fix)
