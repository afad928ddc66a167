"""Texts as sets of character 4-grams (a sparse matrix in memory, or a file for more texts), and sketches of sets.

4-grams are numbered by array operations, some texts at a time: numbers of characters combine into numbers
of pairs, and these into numbers of 4-grams. Only the numbers of all 4-grams are kept, four bytes each.

A sketch is a few words per set that rule out most pairs within nanoseconds. A bit is the parity of the
members hashed to it, so each member in which two sets differ flips one bit. Two sets that differ in d members
have sketches that differ in at most d bits (Sandes et al. 2020, "Bitmap Filter: Speeding up Exact Set
Similarity Joins with Bitwise Operations"). The filter never loses a near-equal pair, regardless of the hash.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from tunewright.core.io import writing

SHINGLE = 4  # characters: most 4-grams survive a word's inflections and typing errors

_CHARACTERS = 1 << 21  # characters of texts numbered together; bounds the memory, not the result
_LETTERS = 0x110000  # code points of Unicode
_TABLE = 1 << 24  # entries of a table of numbers: 80 MB
_ROWS = 20_000  # rows copied out of a file at once

Numbers = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Wanted = Callable[[Indices, Indices], Mask]
Words = npt.NDArray[np.uint64]

ROUNDING = 1e-6
_BITS = 8  # bits for each member in which two near-equal sets may differ: fewer let too many far pairs through
_MOST_WORDS = 4096
_COLUMNS = 4096
_CELLS = 1 << 17  # pairs compared in one go: the intermediate results stay in the cache
_COUNTERS = 1 << 22  # held while sketches are made: bounds the memory, not the result


def shingles(text: str) -> set[str]:
    """Return the set of a text's character 4-grams; a shorter text is its own only shingle."""
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def shingle_matrix(texts: Sequence[str]) -> Any:
    """Return a 0/1 csr matrix [texts, shingles] whose columns run from the rarest shingle to the most frequent.

    Its entries are bytes: convert the matrix before you multiply it by another.
    """
    numbering = _Numbering(texts)
    parts = list(numbering.sorted_rows(list(numbering.shingles())))
    columns = np.concatenate([columns for columns, _ in parts]) if parts else np.empty(0, dtype=np.int32)
    sizes = np.concatenate([sizes for _, sizes in parts]) if parts else np.empty(0, dtype=np.int64)
    return _matrix(columns, sizes, numbering.count)


class ShingleFile:
    """The rows of :func:`shingle_matrix` in a temporary file; this process holds only their sizes.

    Texts of similar length are read together fastest if they are close to each other.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        numbering = _Numbering(texts)
        self._file = tempfile.TemporaryFile(prefix="tunewright-")  # noqa: SIM115 closed at the end of this context
        sizes: list[Indices] = []
        with writing(Path(tempfile.gettempdir())):
            for numbers in numbering.shingles():
                numbers.tofile(self._file)
            end = 0  # sorted rows are not longer than the numbers that were read for them, which they replace
            for columns, of_rows in numbering.sorted_rows(numbering.read(self._file)):
                self._file.seek(end)
                columns.tofile(self._file)
                end += columns.nbytes
                sizes.append(of_rows)
            self._file.truncate(end)
            self._file.flush()
        self._columns = numbering.count
        self.sizes: Indices = np.concatenate(sizes) if sizes else np.empty(0, dtype=np.int64)
        self._begins = np.concatenate([[0], np.cumsum(self.sizes)])

    def __enter__(self) -> ShingleFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    @property
    def shape(self) -> tuple[int, int]:
        """Number of texts, and of different shingles."""
        return len(self.sizes), self._columns

    def __getitem__(self, places: Indices) -> Any:
        """Return these texts as a matrix, as from :func:`shingle_matrix`."""
        sizes = self.sizes[places]
        columns = np.empty(int(sizes.sum()), dtype=np.int32)
        if not len(columns):
            return _matrix(columns, sizes, self._columns)
        stored: Numbers = np.memmap(self._file, dtype=np.int32, mode="r")
        to = 0
        for at in range(0, len(places), _ROWS):
            some = slice(at, at + _ROWS)
            ends = np.cumsum(sizes[some])
            shift = self._begins[places[some]] - (ends - sizes[some])
            columns[to : to + ends[-1]] = stored[np.arange(ends[-1]) + np.repeat(shift, sizes[some])]
            to += int(ends[-1])
        return _matrix(columns, sizes, self._columns)


class ShingleRows:
    """Some texts of a file, which are read on demand; another process gets them as a matrix."""

    def __init__(self, file: ShingleFile, places: Indices) -> None:
        self._file, self._places = file, places
        self.shape = (len(places), file.shape[1])

    def __getitem__(self, rows: Indices | slice) -> Any:
        """Return some of these texts as a matrix."""
        return self._file[self._places[rows]]

    def __reduce__(self) -> tuple[Any, ...]:
        return copy, (self[:],)


def _matrix(columns: Numbers, sizes: Indices, width: int) -> Any:
    begins = _begins(sizes)
    matrix = csr_array((np.ones(len(columns), dtype=np.int8), columns, begins), shape=(len(sizes), width))
    matrix.has_canonical_format = True
    return matrix


def _begins(sizes: Indices) -> npt.NDArray[Any]:
    """Return the begin of each row in the type of the columns: scipy would widen the columns to a larger type."""
    begins = np.concatenate([[0], np.cumsum(sizes)])
    return begins if begins[-1] >= 1 << 31 else begins.astype(np.int32)


class _Numbering:
    """Numbers of the 4-grams of some texts.

    Each text is followed by zeros, which no character has, so a short text is one shingle of its own.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._lengths = np.fromiter((len(text) for text in texts), dtype=np.int64, count=len(texts))
        self._counts = np.maximum(self._lengths - SHINGLE + 1, 1)
        self._letters = _Values(_LETTERS)
        for some in self._parts():
            self._letters.see(_code_points(texts[some]))
        self._base = self._letters.count + 1
        self._pairs = _Values(self._base**2)
        for some in self._parts():
            self._pairs.see(self._pair_codes(some))
        self._pair_count = self._pairs.count
        self._fours = _Values(self._pair_count**2)
        for some in self._parts():
            self._fours.see(self._four_codes(some))
        self.count = self._fours.count
        self._frequency = np.zeros(self.count, dtype=np.int64)

    def shingles(self) -> Iterator[Numbers]:
        """Yield the number of each 4-gram of some texts at a time, and count them."""
        for some in self._parts():
            numbers = self._fours.numbers(self._four_codes(some))
            self._frequency += np.bincount(numbers, minlength=self.count)
            yield numbers

    def read(self, file: Any) -> Iterator[Numbers]:
        """Yield the numbers that a file holds, as :meth:`shingles` did."""
        end = 0
        for some in self._parts():
            file.seek(end)
            numbers = np.fromfile(file, dtype=np.int32, count=int(self._counts[some].sum()))
            end += numbers.nbytes
            yield numbers

    def sorted_rows(self, parts: Iterable[Numbers]) -> Iterator[tuple[Numbers, Indices]]:
        """Yield the columns of some texts at a time, ascending and each once in a text, and their number by text.

        ``parts`` are all results of :meth:`shingles`: only then are all 4-grams counted.
        """
        rank = np.empty(self.count, dtype=np.int32)
        rank[np.argsort(self._frequency, kind="stable")] = np.arange(self.count, dtype=np.int32)
        for some, numbers in zip(self._parts(), parts, strict=True):
            begins = _begins(self._counts[some])
            ones = np.ones(len(numbers), dtype=np.int8)
            matrix = csr_array((ones, rank[numbers], begins), shape=(len(begins) - 1, self.count))
            matrix.sum_duplicates()  # also sorts each row
            yield matrix.indices.astype(np.int32, copy=False), np.diff(matrix.indptr).astype(np.int64)

    def _parts(self) -> Iterator[slice]:
        """Yield slices of texts that have few enough characters together."""
        ends = np.cumsum(self._lengths + SHINGLE)
        at = 0
        while at < len(ends):
            before = int(ends[at - 1]) if at else 0
            to = max(at + 1, int(np.searchsorted(ends, before + _CHARACTERS, side="right")))
            yield slice(at, to)
            at = to

    def _padded(self, some: slice) -> Numbers:
        """Return the numbers of the texts' characters, each text followed by zeros."""
        lengths = self._lengths[some]
        padded = np.zeros(int(lengths.sum()) + SHINGLE * len(lengths) + 1, dtype=np.int32)
        letters = _code_points(self._texts[some])
        at = np.arange(len(letters)) + np.repeat(np.arange(len(lengths)) * SHINGLE, lengths)
        padded[at] = self._letters.numbers(letters) + 1
        return padded

    def _pair_codes(self, some: slice) -> Indices:
        padded = self._padded(some)
        codes: Indices = padded[:-1].astype(np.int64) * self._base + padded[1:]
        return codes

    def _four_codes(self, some: slice) -> Indices:
        counts = self._counts[some]
        begins = np.cumsum(self._lengths[some] + SHINGLE) - self._lengths[some] - SHINGLE
        twos = self._pairs.numbers(self._pair_codes(some))
        at = np.arange(int(counts.sum())) + np.repeat(
            begins - (np.cumsum(counts) - counts), counts
        )  # even an empty text has one shingle
        # There are fewer than 2^31 pairs, so the products do not overflow.
        codes: Indices = twos[at].astype(np.int64) * self._pair_count + twos[at + 2]
        return codes


def _code_points(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


class _Values:
    """Numbers of the values (below ``top``) seen, from 0 in ascending order: by a small table, else by sorting."""

    def __init__(self, top: int) -> None:
        self._used = np.zeros(top, dtype=bool) if top <= _TABLE else None
        self._values = np.empty(0, dtype=np.int64)
        self._new: list[npt.NDArray[Any]] = []
        self._numbers: Numbers | None = None

    def see(self, values: npt.NDArray[Any]) -> None:
        """Add values."""
        if self._used is not None:
            self._used[values] = True
            return
        self._new.append(np.unique(values))
        if sum(map(len, self._new)) > max(len(self._values), _CHARACTERS):
            self._merge()

    def _merge(self) -> None:
        self._values = np.unique(np.concatenate([self._values, *self._new]))
        self._new.clear()

    @property
    def count(self) -> int:
        """Number of different values seen."""
        if self._used is not None:
            return int(np.count_nonzero(self._used))
        self._merge()
        return len(self._values)

    def numbers(self, values: npt.NDArray[Any]) -> Numbers:
        """Return the number of each value, all of which were seen."""
        if self._used is None:
            found: Numbers = np.searchsorted(self._values, values).astype(np.int32)
            return found
        if self._numbers is None:
            self._numbers = np.cumsum(self._used, dtype=np.int32) - np.int32(1)
        table: Numbers = self._numbers[values]
        return table


class Sketches:
    """Sketches of the rows of a 0/1 csr matrix [sets, members], for a Jaccard similarity at or above the threshold.

    ``typical`` is the set size for which the number of bits is chosen; the filter is weaker for larger sets.
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
    ) -> Iterator[tuple[Indices, Indices]]:
        """Yield the wanted pairs of a row and another set among the columns that may be near-equal.

        Without columns: all pairs of rows, each once.
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
                # Hamming distances [rows, columns] of sketches [words, rows] and [words, columns]
                differing = np.zeros((len(some), end - start), dtype=np.uint8 if len(words) < 4 else np.uint32)
                for mine, theirs in zip(self._words[:, some], words[:, start:end], strict=True):
                    differing += np.bitwise_count(mine[:, None] ^ theirs)
                place, other = np.divmod(np.flatnonzero(differing <= different), end - start)
                other += start
                if columns is None:
                    once = other < place + at
                    place, other = place[once], other[once]
                first, second = some[place], others[other]
                near = first != second if wanted is None else wanted(first, second)
                near[near] = self.likely(first[near], second[near])
                yield first[near], second[near]


def mixed(values: Words) -> Words:
    """Hash integers to 64 bits with the finalizer of SplitMix64 (Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
