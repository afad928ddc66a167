"""Candidate pairs of near-equal texts: exact, and never much slower than comparing the sketches of all pairs.

Texts of similar size are joined together. If there are few texts, all pairs are compared, by their
sketches (``shingles``). Of many texts, only texts that share a signature are compared, with the
cheaper of two kinds of signatures:

- Two sets that overlap enough share one of their rarest members, so a text's rarest 4-grams are its signatures (prefix
  filtering: Chaudhuri et al. 2006, "A Primitive Operator for Similarity Joins in Data Cleaning"; fewer of them for the
  smaller text of a pair: Xiao et al. 2008, "Efficient Similarity Joins for Near Duplicate Detection"). In texts from a
  template these are the names and numbers that were put in.
- In ordinary text, rare 4-grams come from one rare word, and thousands of texts contain it. So the 4-grams are dealt at
  random into parts, and what a text has in one part is a signature drawn from all over the text. Two
  sets that differ in at most d members are equal in all but d parts (PartEnum: Arasu et al. 2006,
  "Efficient Exact Set-Similarity Joins"), and again the d + 1 rarest of these signatures are enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tunewright.core.progress import Task
from tunewright.data.dedup.shingles import ROUNDING, Indices, Mask, Sketches, Words, mixed

_FEW = 4_000  # maximum number of texts compared all with all, since signing would take longer
_EQUAL_PARTS = 6  # minimum number of parts that near-equal texts share: more are more selective, and slower
_SPREAD = 1.1  # ratio of sizes handled together: a wider spread gives weaker signatures
_CELLS = 1_000_000  # pairs held at once; bounds the memory, not the result
_SIGNED = 10_000  # texts signed at once; bounds the memory, not the result
_MANY = 1 << 14  # pairs of a signature above which their sketches are compared in a block
_DEAR = 20  # cost of a pair looked up, in pairs compared in a block
_GAIN = 2  # minimum factor of work that signatures must save over comparing all pairs

_TEXT = np.uint64((1 << 30) - 1)
"""The bits of a number that stands for a signature and a text."""

Pairs = tuple[Indices, Indices]


class _Lists(NamedTuple):
    """Texts by signature: the texts with signature i are ``texts[begins[i]:begins[i + 1]]``."""

    texts: Indices
    begins: Indices

    @property
    def sizes(self) -> Indices:
        """Number of texts by signature."""
        return np.diff(self.begins)

    def where(self, mask: Mask) -> _Lists:
        """Return the signatures for which the mask is true."""
        sizes = self.sizes
        return _Lists(self.texts[np.repeat(mask, sizes)], np.concatenate([[0], np.cumsum(sizes[mask])]))

    def of(self, number: int) -> Indices:
        """Return the texts with a signature."""
        return self.texts[self.begins[number] : self.begins[number + 1]]


@dataclass(frozen=True)
class _Signed:
    """Texts by signature: the larger ones look for a pair, and the smaller ones are found."""

    larger: _Lists
    smaller: _Lists

    @property
    def pairs(self) -> Indices:
        """The number of pairs by signature."""
        return self.larger.sizes * self.smaller.sizes

    def work(self) -> int:
        """Return the cost of comparing all pairs, in pairs compared in a block."""
        return int(np.sum(np.where(self.pairs >= _MANY, self.pairs + _MANY, _DEAR * self.pairs)))

    def where(self, mask: Mask) -> _Signed:
        """Return the signatures for which the mask is true."""
        return _Signed(self.larger.where(mask), self.smaller.where(mask))

    def apart(self, labels: Indices) -> _Signed:
        """Return the signatures of texts that do not all have one label."""
        if not len(self.larger.sizes):
            return self
        lows = [np.minimum.reduceat(labels[side.texts], side.begins[:-1]) for side in self._sides]
        highs = [np.maximum.reduceat(labels[side.texts], side.begins[:-1]) for side in self._sides]
        return self.where(np.minimum(*lows) < np.maximum(*highs))

    @property
    def _sides(self) -> tuple[_Lists, _Lists]:
        return self.larger, self.smaller


def _entries(signatures: npt.NDArray[Any], texts: npt.NDArray[Any], larger: Mask, smaller: Mask) -> Words:
    """Return texts with their signatures as one number each: these numbers sort like the signatures.

    Signatures are below 2^32, texts below 2^30; ``larger`` and ``smaller`` say which side of a pair the text may be.
    """
    low = (texts.astype(np.uint64) << np.uint64(2)) | (larger.astype(np.uint64) << np.uint64(1))
    entries: Words = (signatures.astype(np.uint64) << np.uint64(32)) | low | smaller.astype(np.uint64)
    return entries


def _by_signature(entries: Words) -> _Signed:
    """Group entries by signature, in place; signatures of a single text are left out."""
    entries.sort()
    low, signatures = entries.astype("<u8", copy=False).view("<u4").reshape(-1, 2).T
    begins = np.concatenate([np.arange(min(len(entries), 1)), np.flatnonzero(signatures[1:] != signatures[:-1]) + 1])
    sizes = np.diff(begins, append=len(entries))
    sides = [(low & np.uint32(flag)) != 0 for flag in (2, 1)]
    larger, smaller = (np.add.reduceat(side, begins, dtype=np.int64) if len(begins) else sizes for side in sides)
    met = (sizes > 1) & (larger > 0) & (smaller > 0)
    asked = np.repeat(met, sizes)
    return _Signed(
        *(
            _Lists((low[asked & side] >> np.uint32(2)).astype(np.int32), np.concatenate([[0], np.cumsum(counts[met])]))
            for side, counts in zip(sides, (larger, smaller), strict=True)
        )
    )


class SizeClass:
    """Texts of similar size, to be joined: each near-equal pair is found in the class of its larger text.

    Args:
        rows: 0/1 csr matrix [texts, shingles], whose columns run from the rarest shingle to the most frequent, sorted;
            or an object that returns some of its rows.
        low, high: fewest and most shingles of the larger text of a pair.
        part: number of the part, if several workers look: each pair is found in the part of its
            larger text, or, for texts of equal size, in the part of either.
    """

    def __init__(
        self, rows: Any, sizes: Indices, threshold: float, low: int, high: int, part: int = 0, parts: int = 1
    ) -> None:
        self._texts = members_of(sizes, threshold, low, high)
        self._sizes, self._threshold, self._low = sizes[self._texts], threshold, low
        self._large: Mask = (self._sizes >= low) & (np.arange(len(self._texts)) % parts == part)
        self._rows = rows if len(self._texts) == len(sizes) else rows[self._texts]
        self._different = math.floor((1 - threshold) / (1 + threshold) * 2 * high + ROUNDING)
        self._sketches = Sketches(self._rows, self._sizes, threshold, high)
        self._by_signature = self._signed() if len(self._texts) > _FEW else None

    def in_line(self) -> Iterator[Pairs]:
        """Yield candidate pairs of neighbours, which link most of a cluster without all its pairs."""
        lists = [_Lists(np.arange(len(self._texts)), np.array([0]))]
        if (signed := self._by_signature) is not None:
            lists += [signed.larger, signed.smaller]
        for places, begins in lists:
            later = np.ones(len(places), dtype=bool)
            later[begins[begins < len(places)]] = False
            at = np.flatnonzero(later)
            for some in np.array_split(at, max(1, math.ceil(len(at) / _CELLS))):
                first, second = self._likely(places[some], places[some - 1], None)
                yield self._texts[first], self._texts[second]

    def candidates(self, labels: Indices | None, task: Task) -> Iterator[Pairs]:
        """Yield pairs of text indices that may be near-equal: all near-equal ones, some repeatedly.

        Pairs with equal labels, which may change between the pairs, may be left out.
        """
        for first, second in self._meetings(labels):
            yield self._texts[first], self._texts[second]
        task.advance(int(np.count_nonzero(self._large)))

    def _meetings(self, labels: Indices | None) -> Iterator[Pairs]:
        """Yield the pairs of ``candidates`` as positions in the class."""
        signed, larger = self._by_signature, np.flatnonzero(self._large)
        if signed is not None and labels is not None:
            signed = signed.apart(labels[self._texts])
        if signed is None or _GAIN * signed.work() > len(self._texts) * len(larger):
            yield from self._compare(larger, None, labels)
            yield from self._compare(larger, np.flatnonzero(~self._large), labels)
            return
        many = signed.pairs >= _MANY
        yield from self._looked_up(signed.where(~many), labels)
        for number in np.flatnonzero(many).tolist():
            yield from self._compare(signed.larger.of(number), signed.smaller.of(number), labels)

    def _compare(self, rows: Indices, columns: Indices | None, labels: Indices | None) -> Iterator[Pairs]:
        def wanted(first: Indices, second: Indices) -> Mask:
            assert labels is not None
            mask: Mask = labels[self._texts[first]] != labels[self._texts[second]]
            return mask

        return self._sketches.candidate_pairs(rows, columns, None if labels is None else wanted)

    def _looked_up(self, signed: _Signed, labels: Indices | None) -> Iterator[Pairs]:
        """Yield the likely pairs of texts that share a signature."""
        looking = signed.larger.sizes
        number = np.repeat(np.arange(len(looking)), looking)
        found = signed.smaller.sizes[number]
        pairs = np.concatenate([[0], np.cumsum(found)])
        at = 0
        while at < len(number):
            to = max(at + 1, int(np.searchsorted(pairs, pairs[at] + _CELLS, side="right")) - 1)
            entries = np.repeat(np.arange(at, to), found[at:to])
            others = np.arange(pairs[at], pairs[to]) - pairs[entries] + signed.smaller.begins[number[entries]]
            yield self._likely(signed.larger.texts[entries], signed.smaller.texts[others], labels)
            at = to

    def _likely(self, first: Indices, second: Indices, labels: Indices | None) -> Pairs:
        """Return the pairs that may be near-equal and have different labels, each once."""
        first, second = first.astype(np.int64), second.astype(np.int64)  # their products below are large
        ask = (self._large[first] | self._large[second]) & (first != second)
        if labels is not None:
            ask &= labels[self._texts[first]] != labels[self._texts[second]]
        first, second = first[ask], second[ask]
        ask = self._sketches.likely(first, second)
        keys = np.unique(np.maximum(first, second)[ask] * len(self._texts) + np.minimum(first, second)[ask])
        return keys // len(self._texts), keys % len(self._texts)

    def _signed(self) -> _Signed:
        """Return the texts by the cheaper kind of signatures."""
        rare = self._by_rare_shingles()
        if rare.work() <= _DEAR * len(self._texts):
            return rare
        parts = self._by_parts()
        return min(rare, parts, key=_Signed.work)

    def _by_rare_shingles(self) -> _Signed:
        """Index texts by their rarest shingles, as many as guarantee a common one in near-equal texts.

        If a text of n shingles shares at least o with another, one of its n - o + 1 rarest is
        shared. It shares at least threshold * n with a near-equal smaller text, and more with texts
        of at least the class's lowest size.
        """
        sizes, share = self._sizes, self._threshold / (1 + self._threshold)
        looking = np.where(self._large, sizes - np.ceil(self._threshold * sizes - ROUNDING) + 1, 0)
        found = sizes - np.ceil(share * (sizes + np.maximum(sizes, self._low)) - ROUNDING) + 1
        count = np.minimum(np.maximum(looking, found), sizes).astype(np.int64)
        entries = np.empty(int(count.sum()), dtype=np.uint64)
        end = 0
        for at in range(0, len(sizes), _SIGNED):
            rows, some = self._rows[at : at + _SIGNED], count[at : at + _SIGNED]
            texts = np.repeat(np.arange(len(some)), some)
            place = np.arange(len(texts)) - np.repeat(np.cumsum(some) - some, some)
            signatures = rows.indices[place + rows.indptr[texts]]
            texts += at
            begin, end = end, end + len(texts)
            entries[begin:end] = _entries(signatures, texts, place < looking[texts], place < found[texts])
        return _by_signature(entries)

    def _by_parts(self) -> _Signed:
        """Index texts by the rarest of their part signatures.

        Texts that differ in at most ``_different`` shingles are equal in ``_EQUAL_PARTS`` parts.
        """
        parts, count = self._different + _EQUAL_PARTS, len(self._texts)
        codes = mixed(np.arange(self._rows.shape[1], dtype=np.uint64))
        part = (mixed(codes) % np.uint64(parts)).astype(np.int64)
        # A sum of random codes stands for the set. Sums that are equal by chance only add candidates.
        signatures = [np.empty(count, dtype=np.uint64) for _ in range(parts)]
        for at in range(0, count, _SIGNED):
            rows = self._rows[at : at + _SIGNED]
            cells = np.repeat(np.arange(rows.shape[0]) * parts, np.diff(rows.indptr)) + part[rows.indices]
            sums = np.zeros((rows.shape[0], parts), dtype=np.uint64)
            np.add.at(sums.reshape(-1), cells, codes[rows.indices])
            for each, some in zip(signatures, sums.T, strict=True):
                each[at : at + _SIGNED] = some
        ranks = _ranks(signatures)
        ranks.partition(self._different, axis=1)
        ranks = ranks[:, : self._different + 1]
        shared = ranks > 0
        texts = np.nonzero(shared)[0]
        return _by_signature(_entries(ranks[shared], texts, self._large[texts], np.ones(len(texts), dtype=bool)))


def _ranks(signatures: list[Words]) -> npt.NDArray[np.uint32]:
    """Return the places [texts, parts] of signatures of several texts, from 1, rarest first; 0 for others.

    The signatures of all texts, by part, are taken out of the list, since they are large. Their
    highest bits are compared, which only adds candidates.
    """
    ranks = np.zeros((len(signatures[0]), len(signatures)), dtype=np.uint32)
    counts, begin = [np.zeros(1, dtype=np.int64)], 1
    for part in reversed(range(len(signatures))):
        values = signatures.pop() & ~_TEXT
        values |= np.arange(len(values), dtype=np.uint64)
        values.sort()
        equal = np.diff(values | _TEXT) == 0
        shared, first = np.zeros((2, len(values)), dtype=bool)
        shared[1:] = equal
        first[:-1] = equal & ~shared[:-1]
        shared[:-1] |= equal
        numbers = np.cumsum(first[shared]) - 1
        ranks[(values[shared] & _TEXT).astype(np.int64), part] = numbers + begin
        counts.append(np.bincount(numbers))
        begin += len(counts[-1])
    rank = np.empty(begin, dtype=np.uint32)
    rank[np.argsort(np.concatenate(counts), kind="stable")] = np.arange(begin, dtype=np.uint32)
    for part in range(ranks.shape[1]):
        ranks[:, part] = rank[ranks[:, part]]
    return ranks


def members_of(sizes: Indices, threshold: float, low: int, high: int) -> Indices:
    """Return the indices of a class's texts, given all sizes: its own sizes, and smaller ones near enough to match."""
    return np.flatnonzero((sizes >= threshold * low - ROUNDING) & (sizes <= high)).astype(np.int64)


def size_ranges(sizes: Indices) -> Iterator[tuple[int, int]]:
    """Yield the fewest and most shingles of the larger texts of each class, from small to large."""
    low, top = int(sizes.min(initial=1)), int(sizes.max(initial=0))
    while low <= top:
        high = max(low, math.floor(low * _SPREAD))
        if np.any((sizes >= low) & (sizes <= high)):
            yield low, high
        low = high + 1
