"""All pairs of texts whose character 4-grams overlap enough, found exactly.

``partition`` and sketches (``shingles``) find candidates, which are verified here. They miss no pair, unlike MinHash: a
missed pair would be a leak into the test split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from tunewright.core.progress import LogTask, Reporter, Task
from tunewright.core.spill import TextFile, numbered
from tunewright.core.workers import THIS_PROCESS, Workers
from tunewright.data.dedup.partition import SizeClass, members_of, size_ranges
from tunewright.data.dedup.shingles import Indices, Mask, ShingleFile, ShingleRows, Sketches, Wanted, shingle_matrix

Similarities = npt.NDArray[np.float64]

_MANY_IN_GROUP = 128  # size from which a group is compared with its kept texts only
_CHAINED = 20_000  # size from which a group may be split into chains first
_SAMPLE = 5_000  # texts that show whether a group has few repeats
_BLOCK = 512  # texts of a large group compared at once
_BATCH = 50_000  # candidates verified at once; pairs linked by one batch are skipped in the next
_CELLS = 4_000_000  # shingles held at once during verification; bounds the memory, not the result
_ALIKE = 20_000  # texts of similar size from which several workers share the search
_SENT = 50_000_000  # shingles sent to a worker at once: bounds its memory, and not the result
_TOGETHER = 100_000  # texts whose groups one worker compares
_DENSE_ROWS, _DENSE_CELLS = 128, 16_000_000  # rows, and similarities held at once; bound the memory, not the result


class Pairs(NamedTuple):
    """Pairs of text indices at or above the threshold, with ``first`` > ``second``, each once."""

    first: Indices
    second: Indices
    similarity: Similarities

    @classmethod
    def joined(cls, found: Iterable[Pairs]) -> Pairs:
        """Return the pairs of several results."""
        none = cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0))
        return cls(*(np.concatenate(parts) for parts in zip(none, *found, strict=True)))

    def where(self, mask: Mask | Indices) -> Pairs:
        """Return the pairs for which the mask is true, or those at these places."""
        return Pairs(self.first[mask], self.second[mask], self.similarity[mask])

    def best(self) -> Pairs:
        """Return the most similar second text of each first text."""
        order = np.lexsort((self.second, -self.similarity, self.first))
        return self.where(order[np.flatnonzero(np.diff(self.first[order], prepend=-1))])


def near_pairs(
    texts: Sequence[str], threshold: float, wanted: Wanted, reporter: Reporter, title: str
) -> Iterator[Pairs]:
    """Yield the wanted pairs with a Jaccard similarity of their shingles at or above the threshold, each once."""
    rows = shingle_matrix(texts)
    sizes = np.diff(rows.indptr).astype(np.int64)
    with reporter.task(title, len(texts), "examples") as task:
        for low, high in size_ranges(sizes):
            group = SizeClass(rows, sizes, threshold, low, high)
            candidates = _batches(group.candidates(None, task), wanted)
            found = Pairs.joined(verified(rows, sizes, first, second, threshold) for first, second in candidates)
            yield found.where(np.unique(found.first * len(texts) + found.second, return_index=True)[1])


def link(texts: Sequence[str], threshold: float, task: Task, workers: Workers = THIS_PROCESS) -> Indices:
    """Return the index of the first text that each text is linked with by a chain of near-equal texts, [texts]."""
    same = numbered(texts)
    first_of = np.unique(same, return_index=True)[1]
    # From short to long, so that texts of similar size are close to each other in the file.
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    order = np.argsort(lengths[first_of], kind="stable")
    different = TextFile(texts[i] for i in first_of[order])
    task.advance(len(texts) - len(order))
    del texts  # and the file of texts, unless the caller still refers to it
    with ShingleFile(different) as rows:
        del different
        labels: Indices = np.arange(len(order), dtype=np.int64)
        parts = _by_size(rows, threshold, labels, workers.count)
        for here, some in groupby(parts, key=lambda alike: alike.large):
            for places, linked in (THIS_PROCESS if here else workers).map(_link_texts, threshold, some, task):
                _join(labels, places, places[linked])
    first = np.full(len(order), len(order), dtype=np.int64)
    np.minimum.at(first, labels, order)
    label_of = np.empty(len(order), dtype=np.int64)
    label_of[order] = first_of[first[labels]]
    return label_of[same]


@dataclass(frozen=True)
class _SizeRange:
    """Texts of similar size to link, in part: ``part`` of ``parts`` says which of the texts look for others."""

    places: Indices
    """Indices among all texts."""
    rows: Any
    """Their shingles: a matrix, or ``ShingleRows``."""
    sizes: Indices
    labels: Indices
    """For each text, the place of the first text that it is known to be linked with."""
    low: int
    high: int
    large: bool
    """True if there are too many texts for a worker: they are compared here, and their shingles stay in the file."""
    part: int = 0
    parts: int = 1


def _by_size(texts: ShingleFile, threshold: float, labels: Indices, most: int) -> Iterator[_SizeRange]:
    """Yield the texts of each size, with the links that are known by then, in at most ``most`` parts."""
    sizes = texts.sizes
    for low, high in size_ranges(sizes):
        places = members_of(sizes, threshold, low, high)
        some = ShingleRows(texts, places)
        large = int(sizes[places].sum()) > _SENT
        parts = 1 if large else min(most, math.ceil(np.count_nonzero(sizes[places] >= low) / _ALIKE))
        for part in range(parts):
            _, first, number = np.unique(labels[places], return_index=True, return_inverse=True)
            yield _SizeRange(places, some, sizes[places], first[number], low, high, large, part, parts)


def _link_texts(threshold: float, alike: _SizeRange, task: Task) -> tuple[Indices, Indices]:
    """Return the texts, and for each the place of the first text that it is linked with."""
    rows, sizes, labels = alike.rows, alike.sizes, alike.labels.copy()

    def wanted(first: Indices, second: Indices) -> Mask:
        mask: Mask = labels[first] != labels[second]  # already linked: one link more changes nothing
        return mask

    group = SizeClass(rows, sizes, threshold, alike.low, alike.high, alike.part, alike.parts)
    # All pairs of linked texts are marked before the rest begins, which can then skip them.
    for candidates in (group.in_line, partial(group.candidates, labels, task)):
        for pairs in _batches(candidates(), wanted):
            first, second, _ = verified(rows, sizes, *pairs, threshold)
            _join(labels, first, second)
    return alike.places, labels


def nearest_kept(
    texts: Sequence[str],
    groups: Indices,
    kept: int,
    threshold: float,
    reporter: Reporter,
    title: str,
    workers: Workers = THIS_PROCESS,
) -> Pairs:
    """Return each text that is near a kept earlier text of its group, with the most similar one, in ascending order.

    A text is kept unless it is near a kept one; of equally similar ones the first is taken. Texts are in order
    of preference, and the first ``kept`` ones stay. Only texts of one group are compared, by one worker.
    """
    groups = _in_chains(texts, groups, threshold, reporter, title, workers)
    sizes = np.bincount(groups)[groups]
    used = np.flatnonzero(sizes > 1)
    order = used[np.argsort(groups[used], kind="stable")]
    with reporter.task(title, len(texts), "examples") as task:
        task.advance(len(texts) - len(used), f"{len(texts) - len(used):,} with a unique output")
        parts = (
            _Groups(places, [texts[i] for i in order[places].tolist()], groups[order[places]], order[places] < kept)
            for places in _whole_groups(groups[order])
        )
        found = [
            Pairs(order[places[first]], order[places[second]], similarity)
            for places, (first, second, similarity) in workers.map(_nearest_in_groups, threshold, parts, task)
        ]
    pairs = Pairs.joined(found)
    return pairs.where(np.argsort(pairs.first))


def _in_chains(
    texts: Sequence[str], groups: Indices, threshold: float, reporter: Reporter, title: str, workers: Workers
) -> Indices:
    """Split large groups with few repeats by the chains of near-equal texts, outside of which no two texts are near.

    A text is compared with all kept ones of its group. If most are kept, the cost is the square of the group's size.
    """
    large = [np.flatnonzero(groups == group) for group in np.flatnonzero(np.bincount(groups) >= _CHAINED)]
    large = [some for some in large if _mostly_kept(texts, some, threshold)]
    if not large:
        return groups
    places = np.sort(np.concatenate(large))
    with reporter.task(title, len(places), "examples") as task:
        chains = link(TextFile(texts[i] for i in places.tolist()), threshold, task, workers)
    split = groups.copy()
    split[places] = groups.max() + 1 + np.unique(groups[places] * len(places) + chains, return_inverse=True)[1]
    return split


def _mostly_kept(texts: Sequence[str], places: Indices, threshold: float) -> bool:
    """Return True if at least half of a sample of these texts are near no other."""
    sample = [texts[i] for i in places[:: math.ceil(len(places) / _SAMPLE)].tolist()]
    search = _KeptSearch(sample, np.zeros(len(sample), dtype=bool), threshold)
    dropped = sum(len(first) for first, _, _ in search.large_group(np.arange(len(sample)), LogTask()))
    return dropped <= len(sample) / 2


@dataclass(frozen=True)
class _Groups:
    """Some groups, whole and in order: texts, places among all, groups, and whether each is always kept."""

    places: Indices
    texts: Sequence[str]
    groups: Indices
    always: Mask


def _whole_groups(groups: Indices) -> Iterator[Indices]:
    """Yield the places of some whole groups at a time, given each text's group in order."""
    begins = np.append(np.flatnonzero(np.diff(groups, prepend=-1)), len(groups))
    at = 0
    while at < len(begins) - 1:
        to = max(at + 1, int(np.searchsorted(begins, begins[at] + _TOGETHER, side="right")) - 1)
        yield np.arange(begins[at], begins[to])
        at = to


def _nearest_in_groups(threshold: float, some: _Groups, task: Task) -> tuple[Indices, Pairs]:
    """Return the texts' places, and the pairs of :func:`nearest_kept` by their position among these texts."""
    search = _KeptSearch(some.texts, some.always, threshold)
    begins = np.flatnonzero(np.diff(some.groups, prepend=-1))
    sizes = np.diff(begins, append=len(some.groups))
    found: list[Pairs] = []
    few = np.flatnonzero(np.repeat(sizes <= _MANY_IN_GROUP, sizes))
    if len(few):
        found += search.small_groups(few, np.repeat(begins, sizes)[few], task)
    for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True):
        if size > _MANY_IN_GROUP:
            found += search.large_group(np.arange(begin, begin + size), task)
    return some.places, Pairs.joined(found)


class _KeptSearch:
    """State of :func:`nearest_kept`, over texts sorted by group and index; pairs are positions in that order."""

    def __init__(self, texts: Sequence[str], always: Mask, threshold: float) -> None:
        self._rows, self._threshold, self._always = shingle_matrix(texts), threshold, always
        self._sizes = np.diff(self._rows.indptr).astype(np.int64)
        typical = int(np.quantile(self._sizes, 0.9)) if len(texts) else 1
        self._sketches = Sketches(self._rows, self._sizes, threshold, typical)
        self._gone = np.zeros(len(texts), dtype=bool)

    def small_groups(self, places: Indices, begins: Indices, task: Task) -> Iterator[Pairs]:
        """Settle all pairs of small groups, many groups at once; ``begins`` has the begin of each place's group."""
        pairs = np.concatenate([[0], np.cumsum(places - begins)])
        at = 0
        while at < len(places):
            to = max(at + 1, int(np.searchsorted(pairs, pairs[at] + _CELLS, side="right")) - 1)
            entry = np.repeat(np.arange(at, to), np.diff(pairs[at : to + 1]))
            first, second = places[entry], np.arange(pairs[at], pairs[to]) - pairs[entry] + begins[entry]
            ask = ~self._always[first]
            ask[ask] = self._sketches.likely(first[ask], second[ask])
            yield self._settle(verified(self._rows, self._sizes, first[ask], second[ask], self._threshold))
            task.advance(to - at)
            at = to

    def large_group(self, places: Indices, task: Task) -> Iterator[Pairs]:
        """Settle a large group by comparing each text with the kept texts, which are few if most are near-equal."""
        new = np.flatnonzero(~self._always[places])
        kept = [places[self._always[places]]]
        task.advance(len(places) - len(new))
        for some in np.array_split(places[new], math.ceil(len(new) / _BLOCK)) if len(new) else ():
            near = self._near(some, np.concatenate(kept))
            # Texts near a kept one are not kept, so only the other texts have to be compared with each other.
            self._gone[near.first] = True
            yield self._settle(self._near(some[~self._gone[some]], None))
            added = some[~self._gone[some]]
            yield Pairs.joined([near, self._near(np.unique(near.first), added)]).best()
            kept.append(added)
            task.advance(len(some), f"{sum(map(len, kept)):,} kept of an output with {len(places):,} rows")

    def _near(self, places: Indices, others: Indices | None) -> Pairs:
        """Return the near pairs of these places with earlier ones among ``others``, or with each other."""
        if others is not None:
            return near(self._rows, self._sketches, self._threshold, places, others, lambda one, other: other < one)
        first, second, similarity = near(self._rows, self._sketches, self._threshold, places, None)
        return Pairs(np.maximum(first, second), np.minimum(first, second), similarity)

    def _settle(self, near: Pairs) -> Pairs:
        """Decide in order which of these texts are dropped, given all near pairs with an earlier text."""
        near = near.where(np.argsort(near.first, kind="stable"))
        first, second, _ = near
        begins = np.flatnonzero(np.diff(first, prepend=-1))
        for place, begin, end in zip(first[begins].tolist(), begins, np.append(begins, len(first))[1:], strict=True):
            self._gone[place] = not self._gone[second[begin:end]].all()
        return near.where(~self._gone[second]).best()


def _join(labels: Indices, first: Indices, second: Indices) -> None:
    """Merge the labels of each pair's texts, in place: all texts with either label get the lowest index."""
    one, other = labels[first], labels[second]
    apart = one != other
    names, numbers = np.unique(np.concatenate([one[apart], other[apart]]), return_inverse=True)
    if not len(names):
        return
    links = coo_array((np.ones(len(numbers) // 2, dtype=np.int8), np.split(numbers, 2)), shape=(len(names), len(names)))
    components = connected_components(links, directed=False)[1]
    lowest = names[np.unique(components, return_index=True)[1]]
    now = np.arange(len(labels))
    now[names] = lowest[components]
    labels[:] = now[labels]


def _batches(candidates: Iterator[tuple[Indices, Indices]], wanted: Wanted) -> Iterator[tuple[Indices, Indices]]:
    """Yield the wanted candidates in batches, with first > second."""
    held: list[tuple[Indices, Indices]] = []
    count = 0
    for first, second in candidates:
        ask = wanted(first, second)
        held.append((first[ask], second[ask]))
        count += len(held[-1][0])
        if count >= _BATCH:
            yield from _wanted_still(held, wanted)
            held, count = [], 0
    if count:
        yield from _wanted_still(held, wanted)


def _wanted_still(held: Sequence[tuple[Indices, Indices]], wanted: Wanted) -> Iterator[tuple[Indices, Indices]]:
    """Yield the held pairs in batches, without pairs that are no longer wanted."""
    first, second = (np.concatenate(parts) for parts in zip(*held, strict=True))
    for start in range(0, len(first), _BATCH):
        a, b = first[start : start + _BATCH], second[start : start + _BATCH]
        ask = wanted(a, b)
        yield np.maximum(a, b)[ask], np.minimum(a, b)[ask]


def verified(rows: Any, sizes: Indices, first: Indices, second: Indices, threshold: float) -> Pairs:
    """Return the pairs at or above the threshold, some of which may be repeated."""
    parts = max(1, math.ceil(int(np.sum(sizes[first] + sizes[second])) / _CELLS))
    counts = [
        rows[a].multiply(rows[b]).sum(axis=1)
        for a, b in zip(np.array_split(first, parts), np.array_split(second, parts), strict=True)
    ]
    shared: Indices = np.concatenate(counts).astype(np.int64)
    similarity = shared / (sizes[first] + sizes[second] - shared)
    return Pairs(first, second, similarity).where(similarity >= threshold)


def near(
    rows: Any, sketches: Sketches, threshold: float, some: Indices, others: Indices | None, wanted: Wanted | None = None
) -> Pairs:
    """Return the wanted pairs of some rows with others, or with each other, at or above the threshold."""
    pairs = list(sketches.candidate_pairs(some, others, wanted))
    if not pairs:
        return Pairs.joined([])
    first, second = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return verified(rows, sketches.sizes, first, second, threshold)


def similarities(some: Any, others: Any) -> Any:
    """Return the Jaccard similarities [some, others] of two shingle matrices with the same columns, as csr."""
    shared = coo_array(some.astype(np.int32) @ others.astype(np.int32).T)
    sizes, other_sizes = np.diff(some.indptr), np.diff(others.indptr)
    union = sizes[shared.row] + other_sizes[shared.col] - shared.data
    return csr_array((shared.data / union, (shared.row, shared.col)), shape=shared.shape)


def in_blocks(rows: Any, some: Indices, others: Indices, task: Task) -> Iterator[tuple[Indices, Similarities]]:
    """Yield some rows of a shingle matrix at a time, with their Jaccard similarities to others, [others, some].

    One side is dense: with texts from templates, nearly all pairs share a shingle. Shingles that no row of the block
    has are dropped first. Sums of float32 are exact: no text has 2^24 shingles.
    """
    sizes, compared = np.diff(rows.indptr), rows[others].astype(np.float32)
    step = min(_DENSE_ROWS, max(1, _DENSE_CELLS // max(compared.shape)))
    for start in range(0, len(some), step):
        places = some[start : start + step]
        block = rows[places].astype(np.float32)
        columns = np.unique(block.indices)
        shared = (compared[:, columns] @ block[:, columns].toarray().T).astype(np.float64)
        yield places, shared / (sizes[others, None] + sizes[places] - shared)
        task.advance(len(places))
