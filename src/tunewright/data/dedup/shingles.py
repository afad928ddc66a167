"""Texts as sets of character 4-grams: a sparse matrix in memory, or a file for more texts than memory holds.

4-grams are numbered by array operations, some texts at a time: numbers of characters make numbers of pairs of them, and
these make numbers of 4-grams. Only the numbers of all 4-grams are kept, four bytes each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from tunewright.core.io import writing
from tunewright.data.dedup.sketches import Indices

SHINGLE = 4  # characters: most 4-grams survive a word's inflections and typing errors

_CHARACTERS = 1 << 21  # of the texts numbered at once; bounds the memory, not the result
_LETTERS = 0x110000  # code points of Unicode
_TABLE = 1 << 24  # entries of a table of numbers: 80 MB
_ROWS = 20_000  # rows copied out of a file at once

Numbers = npt.NDArray[np.int32]


def shingles(text: str) -> set[str]:
    """Return the set of a text's character 4-grams; a shorter text is its own only shingle."""
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def shingle_matrix(texts: Sequence[str]) -> Any:
    """Return a 0/1 csr matrix [texts, shingles] whose columns run from the rarest shingle to the most frequent.

    Its entries are bytes: convert it before you multiply it by another one.
    """
    numbering = _Numbering(texts)
    parts = list(numbering.sorted_rows(list(numbering.shingles())))
    columns = np.concatenate([columns for columns, _ in parts]) if parts else np.empty(0, dtype=np.int32)
    sizes = np.concatenate([sizes for _, sizes in parts]) if parts else np.empty(0, dtype=np.int64)
    return _matrix(columns, sizes, numbering.count)


class ShingleFile:
    """The rows of :func:`shingle_matrix` in a temporary file, of which this process holds the sizes.

    Args:
        texts: the texts. Texts of similar length are read together fastest if they are close to each other.

    Raises:
        UserError: the disk of temporary files is full.

    Attributes:
        sizes: number of shingles of each text.
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
    """Some texts of a file, which are read when they are asked for; another process gets them as a matrix.

    Args:
        file: the file.
        places: the texts.
    """

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
    """Return where each row begins, as scipy wants it: it would widen 32-bit columns to the type of the begins."""
    begins = np.concatenate([[0], np.cumsum(sizes)])
    return begins if begins[-1] >= 1 << 31 else begins.astype(np.int32)


class _Numbering:
    """Numbers of the 4-grams of some texts.

    Each text is followed by zeros, which no character has: so a short text is one shingle that no other equals.

    Attributes:
        count: number of different 4-grams.
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

        Args:
            parts: what :meth:`shingles` has yielded, to its end: then all 4-grams are counted.
        """
        rank = np.empty(self.count, dtype=np.int32)
        rank[np.argsort(self._frequency, kind="stable")] = np.arange(self.count, dtype=np.int32)
        for some, numbers in zip(self._parts(), parts, strict=True):
            begins = _begins(self._counts[some])
            ones = np.ones(len(numbers), dtype=np.int8)
            matrix = csr_array((ones, rank[numbers], begins), shape=(len(begins) - 1, self.count))
            matrix.sum_duplicates()  # sorts each row too
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
        )  # even an empty text has one
        # There are fewer than 2^31 pairs, so the products do not overflow.
        codes: Indices = twos[at].astype(np.int64) * self._pair_count + twos[at + 2]
        return codes


def _code_points(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


class _Values:
    """Numbers of the values seen, from 0 in ascending order: by a table if it is small enough, else by sorting.

    Args:
        top: the values are below it.
    """

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
