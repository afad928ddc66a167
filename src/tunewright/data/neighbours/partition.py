"""The join for many texts at a high threshold: as exact as the prefix filter, with candidates that are far fewer.

Rare 4-grams come from one rare word, and thousands of texts hold it. So the 4-grams are dealt at random into parts, and
what a text has in one part is a signature drawn from all over the text. Two sets that differ in at most d members are
equal in all but d parts (PartEnum: Arasu et al. 2006, "Efficient Exact Set-Similarity Joins"), and of signatures too
it is enough to look at the d + 1 rarest (prefix filtering: Chaudhuri et al. 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Wanted = Callable[[Indices, Indices], Mask]
Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64] | npt.NDArray[np.int32]

_EQUAL_PARTS = 6  # parts that near-equal texts share at least: more tell candidates apart better, and cost more time
_SPREAD = 1.1  # sizes handled together: d is that of the largest, so a wider spread makes weaker signatures
_CELLS = 16_000_000  # signatures of candidates held at once: bounds the memory, not the result
_MANY_PEERS = 8  # texts of one signature that need not be linked beforehand
_ROUNDING = 1e-6


@dataclass(frozen=True)
class _Class:
    """Texts of like size, signed. An entry is one of a text's rarest signatures that another text has too."""

    low: int  # fewest shingles of the larger text of a pair
    texts: Indices  # [texts] their numbers, ascending
    signatures: Words  # [texts, parts]
    entries: Indices  # [texts + 1] where each text's entries begin
    peers: npt.NDArray[np.int32]  # [entries] places of texts, by signature, then ascending
    begins: npt.NDArray[np.int32]  # [entries] where in ``peers`` the signature's texts begin
    places: npt.NDArray[np.int32]  # [entries] where in ``peers`` the entry itself is


class PartitionJoin:
    """Candidates for near-equal texts.

    Args:
        rows: 0/1 csr matrix [texts, shingles].
        sizes: each text's number of shingles.
        threshold: Jaccard similarity, in (0, 1].
    """

    def __init__(self, rows: Any, sizes: Indices, threshold: float) -> None:
        self._sizes, self._threshold = sizes, threshold
        self._classes: list[_Class] = []
        codes = _mixed(np.arange(rows.shape[1], dtype=np.uint64))
        low, top = 1, int(sizes.max(initial=0))
        while low <= top:
            # Each pair is found in the class of its larger text.
            high = max(low, math.floor(low * _SPREAD))
            texts = np.flatnonzero((sizes >= math.ceil(threshold * low - _ROUNDING)) & (sizes <= high))
            if len(texts) > 1 and int(sizes[texts].max()) >= low:
                different = math.floor((1 - threshold) / (1 + threshold) * 2 * high + _ROUNDING)
                self._classes.append(_sign(rows, low, texts.astype(np.int64), codes, different))
            low = high + 1

    def candidates(self, start: int, end: int, wanted: Wanted) -> Iterator[tuple[Indices, Indices]]:
        """Pairs (first > second) that may be near-equal, with first in [start, end).

        Of those that are and are wanted none gets lost; some come again.
        """
        for group in self._classes:
            for a, b in _meetings(group, start, end):
                yield self._likely(group, a, b, wanted)

    def in_line(self, wanted: Wanted) -> Iterator[tuple[Indices, Indices]]:
        """Candidates of each text and the one before it only: they link most of a family without all its pairs."""
        for group in self._classes:
            many = group.places[group.places - group.begins >= _MANY_PEERS]
            yield self._likely(group, group.peers[many], group.peers[many - 1], wanted)

    def _likely(self, group: _Class, a: Places, b: Places, wanted: Wanted) -> tuple[Indices, Indices]:
        """Those pairs of places that may be near-equal and are wanted, as text numbers."""
        first, second = group.texts[a], group.texts[b]
        sizes, others = self._sizes[first], self._sizes[second]
        small, large = np.minimum(sizes, others), np.maximum(sizes, others)
        ask = (large >= group.low) & (small >= self._threshold * large - _ROUNDING)
        ask[ask] = wanted(first[ask], second[ask])
        # Pairs that share more signatures have come more often.
        pairs = np.unique(a[ask].astype(np.int64) * len(group.texts) + b[ask])
        a, b = pairs // len(group.texts), pairs % len(group.texts)
        parts = max(1, math.ceil(a.size * group.signatures.shape[1] / _CELLS))
        agree = [
            np.count_nonzero(group.signatures[some] == group.signatures[others], axis=1) >= _EQUAL_PARTS
            for some, others in zip(np.array_split(a, parts), np.array_split(b, parts), strict=True)
        ]
        keep = np.concatenate(agree)
        return group.texts[a[keep]], group.texts[b[keep]]


def _sign(rows: Any, low: int, texts: Indices, codes: Words, different: int) -> _Class:
    """Sign texts so that those which differ in at most ``different`` shingles are equal in ``_EQUAL_PARTS`` parts."""
    parts = different + _EQUAL_PARTS
    mine = rows[texts]
    part = (_mixed(codes) % np.uint64(parts)).astype(np.int64)
    cells = np.repeat(np.arange(len(texts)) * parts, np.diff(mine.indptr)) + part[mine.indices]
    # A sum of random codes stands for the set. Sums that are equal by chance only make candidates more.
    signatures = np.tile(_mixed(np.arange(1 << 40, (1 << 40) + parts, dtype=np.uint64)), len(texts))
    np.add.at(signatures, cells, codes[mine.indices])
    del cells, mine
    _, numbers, counts = np.unique(signatures, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    ranks = np.partition(rank[numbers].reshape(len(texts), parts), different, axis=1)[:, : different + 1]
    shared = ranks >= np.count_nonzero(counts == 1)
    rarest = ranks[shared]
    order = np.argsort(rarest, kind="stable")  # stable, so that the texts of one signature stay in ascending order
    places = np.empty(len(order), dtype=np.int32)
    places[order] = np.arange(len(order), dtype=np.int32)
    ordered = rarest[order]
    return _Class(
        low=low,
        texts=texts,
        signatures=signatures.reshape(len(texts), parts),
        entries=np.concatenate([[0], np.cumsum(np.count_nonzero(shared, axis=1))]),
        peers=np.nonzero(shared)[0][order].astype(np.int32),
        begins=np.searchsorted(ordered, ordered)[places].astype(np.int32),
        places=places,
    )


def _meetings(group: _Class, start: int, end: int) -> Iterator[tuple[Places, Places]]:
    """Pairs of places in the class that share one of their rarest signatures, the later text in [start, end)."""
    first, last = np.searchsorted(group.texts, [start, end])
    entry, stop = int(group.entries[first]), int(group.entries[last])
    begins, places = (array[entry:stop].astype(np.int64) for array in (group.begins, group.places))
    owners = np.repeat(np.arange(first, last), np.diff(group.entries[first : last + 1]))
    pairs = np.concatenate([[0], np.cumsum(places - begins)])  # each entry with the texts in front of it
    most = _CELLS // group.signatures.shape[1]
    at = 0
    while at < len(owners):
        to = max(at + 1, int(np.searchsorted(pairs, pairs[at] + most, side="right")) - 1)
        entries = np.repeat(np.arange(at, to), np.diff(pairs[at : to + 1]))
        yield owners[entries], group.peers[np.arange(pairs[at], pairs[to]) - pairs[entries] + begins[entries]]
        at = to


def _mixed(values: Words) -> Words:
    """Integers scattered over 64 bits: the finalizer of SplitMix64 (Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
