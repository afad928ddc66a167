"""Bit sketches of sets: a few words per set that rule out most pairs within nanoseconds.

A bit is the parity of the members hashed to it, so each member in which two sets differ flips one bit. Two sets that
differ in d members have sketches that differ in at most d bits (Sandes et al. 2020, "Bitmap Filter: Speeding up Exact
Set Similarity Joins with Bitwise Operations"). The filter never loses a near-equal pair, whatever the hash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Wanted = Callable[[Indices, Indices], Mask]
Words = npt.NDArray[np.uint64]

ROUNDING = 1e-6
_BITS = 8  # for each member in which two near-equal sets may differ: fewer let too many far pairs through
_MOST_WORDS = 4096
_COLUMNS = 4096
_CELLS = 1 << 17  # pairs compared in one go: the intermediate results stay in the cache
_COUNTERS = 1 << 22  # held while sketches are made: bounds the memory, not the result


class Sketches:
    """Sketches of the rows of a 0/1 matrix.

    Args:
        rows: 0/1 csr matrix [sets, members].
        sizes: how many members each set has.
        threshold: Jaccard similarity, in (0, 1].
        typical: the set size for which the number of bits is chosen; the filter is weaker for larger sets.
    """

    def __init__(self, rows: Any, sizes: Indices, threshold: float, typical: int) -> None:
        self.sizes, self._threshold = sizes, threshold
        self._share = (1 - threshold) / (1 + threshold)  # |A Δ B| / (|A| + |B|) at the threshold
        count = min(max(math.ceil(self._share * 2 * typical * _BITS / 64), 1), _MOST_WORDS)
        self._words: Words = np.empty((count, len(sizes)), dtype=np.uint64)
        bit = (mixed(np.arange(rows.shape[1], dtype=np.uint64)) % np.uint64(64 * count)).astype(np.int64)
        step = max(_COUNTERS // (64 * count), 1)
        for start in range(0, len(sizes), step):
            some = rows[start : start + step]
            cells = np.repeat(np.arange(some.shape[0]) * 64 * count, np.diff(some.indptr)) + bit[some.indices]
            odd = (np.bincount(cells, minlength=some.shape[0] * 64 * count) & 1).astype(np.uint8)
            packed = np.packbits(odd).view(np.uint64).reshape(-1, count)
            self._words[:, start : start + step] = packed.T

    def likely(self, first: Indices, second: Indices) -> Mask:
        """Return a mask of the pairs that may be near-equal."""
        sizes, others = self.sizes[first], self.sizes[second]
        mask: Mask = np.minimum(sizes, others) >= self._threshold * np.maximum(sizes, others) - ROUNDING
        left = np.flatnonzero(mask)
        a, b = first[left], second[left]
        bits = np.zeros(len(left), dtype=np.int64)
        for words in self._words:
            bits += np.bitwise_count(words[a] ^ words[b])
        mask[left] = bits <= self._share * (sizes[left] + others[left]) + ROUNDING
        return mask

    def candidate_pairs(
        self, rows: Indices, columns: Indices | None = None, wanted: Wanted | None = None
    ) -> Iterator[tuple[Indices, Indices, int]]:
        """Yield all pairs of a row and another set among the columns that may be near-equal.

        Without columns: all pairs of rows, each once.

        Args:
            rows: numbers of sets.
            columns: numbers of others.
            wanted: which of the pairs of alike sketches matter.

        Yields:
            The rows and columns of some pairs, and how many pairs were compared for that.
        """
        if not len(rows):
            return
        rows = rows[np.argsort(self.sizes[rows], kind="stable")]
        others = rows if columns is None else columns[np.argsort(self.sizes[columns], kind="stable")]
        sizes, words = self.sizes[others], self._words[:, others]
        step = max(_CELLS // _COLUMNS, _CELLS // max(len(others), 1))
        for at in range(0, len(rows), step):
            some = rows[at : at + step]
            least, most = int(self.sizes[some[0]]), int(self.sizes[some[-1]])
            low, high = np.searchsorted(sizes, [self._threshold * least - ROUNDING, most / self._threshold + ROUNDING])
            if columns is None:
                high = min(high, at + len(some))
            for start in range(low, high, _COLUMNS):
                end = min(start + _COLUMNS, high)
                different = math.floor(self._share * (most + int(sizes[end - 1])) + ROUNDING)
                differing = _differing(self._words[:, some], words[:, start:end])
                place, other = np.divmod(np.flatnonzero(differing <= different), end - start)
                other += start
                if columns is None:
                    once = other < place + at
                    place, other = place[once], other[once]
                first, second = some[place], others[other]
                near = first != second if wanted is None else wanted(first, second)
                near[near] = self.likely(first[near], second[near])
                yield first[near], second[near], len(some) * (end - start)


def _differing(words: Words, others: Words) -> npt.NDArray[Any]:
    """Return the Hamming distances [rows, columns] of sketches [words, rows] and [words, columns]."""
    count = np.zeros((words.shape[1], others.shape[1]), dtype=np.uint8 if len(words) < 4 else np.uint32)
    for mine, theirs in zip(words, others, strict=True):
        count += np.bitwise_count(mine[:, None] ^ theirs)
    return count


def mixed(values: Words) -> Words:
    """Hash integers to 64 bits with the finalizer of SplitMix64 (Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
