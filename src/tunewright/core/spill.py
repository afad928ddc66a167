"""Byte strings and texts in temporary files, for amounts that memory should not hold.

A file is deleted when nothing refers to it. Reading one back takes about a microsecond: recent ones
are in the page cache, which the operating system shrinks when programs need memory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from tunewright.core.io import writing

_BLOCK = 1 << 20  # bytes written or read at once

Indices = npt.NDArray[np.int64]


class RecordFile:
    """Byte strings in a temporary file, by number from 0."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="tunewright-")  # noqa: SIM115 closed by __del__
        self._ends = array("q", [0])
        self._unwritten = bytearray()
        self._written = 0

    def __del__(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, record: bytes) -> int:
        """Add a byte string, and return its number."""
        self._unwritten += record
        self._ends.append(self._ends[-1] + len(record))
        if len(self._unwritten) >= _BLOCK:
            with writing(Path(tempfile.gettempdir())):
                self._file.write(self._unwritten)
                self._file.flush()
            self._written += len(self._unwritten)
            self._unwritten.clear()
        return len(self) - 1

    def __getitem__(self, number: int) -> bytes:
        return self._bytes(self._ends[number], self._ends[number + 1])

    def between(self, first: int, last: int) -> list[bytes]:
        """Return the byte strings from a number up to another one, which is not included."""
        ends = self._ends[first : last + 1]
        data = self._bytes(ends[0], ends[-1])
        return [data[a - ends[0] : b - ends[0]] for a, b in pairwise(ends)]

    def __iter__(self) -> Iterator[bytes]:
        first = 0
        while first < len(self):
            last = max(first + 1, bisect_right(self._ends, self._ends[first] + _BLOCK) - 1)
            yield from self.between(first, last)
            first = last

    def _bytes(self, begin: int, end: int) -> bytes:
        data = b""
        if begin < self._written:
            data = os.pread(self._file.fileno(), min(end, self._written) - begin, begin)
        if end > self._written:
            data += self._unwritten[max(begin - self._written, 0) : end - self._written]
        return data


class TextFile(Sequence[str]):
    """Texts in a temporary file, in their order."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._records = RecordFile()
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add a text."""
        self._records.append(text.encode("utf-8", "surrogatepass"))

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            first, last, step = place.indices(len(self))
            assert step == 1, "texts are read in their order"
            return [
                record.decode("utf-8", "surrogatepass") for record in self._records.between(first, max(first, last))
            ]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._records[place].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (record.decode("utf-8", "surrogatepass") for record in self._records)


def numbered(values: Iterable[str | bytes]) -> Indices:
    """Number different values from 0 in the order of their first places, [values]; 16 bytes of each are held."""
    digests = bytearray()
    for value in values:
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        digests += hashlib.blake2b(data, digest_size=16).digest()
    words = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: a value's first place stays first
    new = np.ones(len(order), dtype=bool)
    new[1:] = np.diff(words[order], axis=0).any(axis=1)
    firsts = order[new]
    rank = np.empty(len(firsts), dtype=np.int64)
    rank[np.argsort(firsts)] = np.arange(len(firsts))
    numbers: Indices = np.empty(len(order), dtype=np.int64)
    numbers[order] = rank[np.cumsum(new) - 1]
    return numbers


def repeated(values: Iterable[str | bytes]) -> list[list[int]]:
    """Return the places of each value that occurs several times, ordered by the first."""
    numbers = numbered(values)
    places = np.flatnonzero(np.bincount(numbers)[numbers] > 1) if len(numbers) else numbers
    by_number: dict[int, list[int]] = {}
    for place, number in zip(places.tolist(), numbers[places].tolist(), strict=True):
        by_number.setdefault(number, []).append(place)
    return list(by_number.values())
