"""All pairs of texts whose character 4-grams overlap enough, found exactly.

The search is a set-similarity join: two sets that overlap enough must already share some of their rarest members
(prefix filtering: Chaudhuri et al. 2006, "A Primitive Operator for Similarity Joins in Data Cleaning"; longer prefixes
that must share several: Wang et al. 2012, "Can We Beat the Prefix Filtering?"), here as products of sparse matrices.
Many texts at a high threshold are joined by ``partition`` instead. Both miss no pair, which MinHash cannot promise, and
one missed pair is one leak into the test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array

from tunewright.data.neighbours.partition import Indices, PartitionJoin, Wanted
from tunewright.progress import Reporter, Task

Similarities = npt.NDArray[np.float64]

SHINGLE = 4  # characters: of a word's inflections and typing errors, most 4-grams survive
_BLOCK = 256  # texts compared at once with all others
_MOST_BLOCKS = 128  # in the partition join, where each block costs some time of its own
_CELLS = 4_000_000  # shingles held at once while pairs are verified: bounds the memory, not the result
_TABLE = 1 << 24  # entries: some 130 MB
_ROUNDING = 1e-6
_MANY = 10_000  # texts from which on the partition join is the faster one ...
_HIGH = 0.75  # ... at thresholds from here on: below, its signatures tell little apart


@dataclass(frozen=True)
class Pairs:
    """Pairs of text numbers at or above the threshold: ``first`` > ``second``, in ascending order of both."""

    first: Indices
    second: Indices
    similarity: Similarities


def shingles(text: str) -> set[str]:
    """The set of a text's character 4-grams; a shorter text is its own only shingle."""
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def near_pairs(
    texts: Sequence[str],
    threshold: float,
    wanted: Wanted,
    reporter: Reporter,
    title: str,
    *,
    links_first: bool = False,
) -> Iterator[Pairs]:
    """All pairs with a Jaccard similarity of their shingles at or above the threshold, block after block.

    Args:
        texts: the texts; a pair arrives with the block that its later text belongs to.
        threshold: in (0, 1].
        wanted: which of a block's candidate pairs matter; it is asked when the block's turn comes, so that it can
            depend on the pairs of earlier blocks.
        reporter: shows the progress.
        title: what the progress is called.
        links_first: for callers who only ask what is linked to what: pairs that link most of each large family may
            come before the blocks, and again in them if they are still wanted then.
    """
    rows = shingle_matrix(texts)
    sizes = np.diff(rows.indptr).astype(np.int64)
    with reporter.task(title, len(texts), "examples") as task:
        if len(texts) >= _MANY and threshold >= _HIGH:
            yield from _partition_join(rows, sizes, threshold, wanted, task, links_first=links_first)
        else:
            yield from _prefix_join(rows, sizes, threshold, wanted, task)


def _prefix_join(rows: Any, sizes: Indices, threshold: float, wanted: Wanted, task: Task) -> Iterator[Pairs]:
    overlaps = np.ceil(threshold * sizes - _ROUNDING).astype(np.int64)
    needed = np.clip(1 + sizes // 16, 1, np.maximum(overlaps, 1))
    prefixes = _cut(rows, sizes, sizes - overlaps + needed)
    postings = csr_array(prefixes.T)
    for start in range(0, len(sizes), _BLOCK):
        met = coo_array(prefixes[start : start + _BLOCK] @ postings)
        first, second = met.row.astype(np.int64) + start, met.col.astype(np.int64)
        ask = (second < first) & (met.data >= np.minimum(needed[first], needed[second]))
        first, second = first[ask], second[ask]
        ask = wanted(first, second)
        yield _sorted(*_near(rows, sizes, first[ask], second[ask], threshold))
        task.advance(min(_BLOCK, len(sizes) - start))


def _partition_join(
    rows: Any, sizes: Indices, threshold: float, wanted: Wanted, task: Task, *, links_first: bool
) -> Iterator[Pairs]:
    join = PartitionJoin(rows, sizes, threshold)
    if links_first:
        for pairs in join.in_line(wanted):
            yield _sorted(*_near(rows, sizes, *pairs, threshold))
    block = max(_BLOCK, math.ceil(len(sizes) / _MOST_BLOCKS))
    for start in range(0, len(sizes), block):
        end = min(start + block, len(sizes))
        found = [_near(rows, sizes, *pairs, threshold) for pairs in join.candidates(start, end, wanted)]
        if found:
            first, second, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
            _, once = np.unique(first * len(sizes) + second, return_index=True)
            yield _sorted(first[once], second[once], similarity[once])
        task.advance(end - start)


def _near(
    rows: Any, sizes: Indices, first: Indices, second: Indices, threshold: float
) -> tuple[Indices, Indices, Similarities]:
    """Those of the pairs that are at or above the threshold."""
    shared = _shared(rows, sizes, first, second)
    similarity = shared / (sizes[first] + sizes[second] - shared)
    near = similarity >= threshold
    return first[near], second[near], similarity[near]


def _sorted(first: Indices, second: Indices, similarity: Similarities) -> Pairs:
    order = np.lexsort((second, first))
    return Pairs(first[order], second[order], similarity[order])


def shingle_matrix(texts: Sequence[str]) -> Any:
    """A 0/1 csr matrix [texts, shingles] whose columns run from the rarest shingle to the most frequent."""
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    counts = np.maximum(lengths - SHINGLE + 1, 1)
    ends = np.concatenate([[0], np.cumsum(counts)])
    columns = _shingle_numbers(texts, lengths, counts, ends)
    frequency = np.bincount(columns)
    rank = np.empty(len(frequency), dtype=np.int32)
    rank[np.argsort(frequency, kind="stable")] = np.arange(len(frequency), dtype=np.int32)
    matrix = csr_array((np.ones(len(columns), dtype=np.int32), rank[columns], ends), shape=(len(texts), len(frequency)))
    del columns
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def similarities(some: Any, others: Any) -> Any:
    """Jaccard similarities [some, others] of the rows of two shingle matrices with the same columns; csr, no zeros."""
    shared = coo_array(some @ others.T)
    sizes, other_sizes = np.diff(some.indptr), np.diff(others.indptr)
    union = sizes[shared.row] + other_sizes[shared.col] - shared.data
    return csr_array((shared.data / union, (shared.row, shared.col)), shape=shared.shape)


def _shingle_numbers(texts: Sequence[str], lengths: Indices, counts: Indices, ends: Indices) -> Indices:
    """A number for each shingle of each text, one after the other: arithmetic on arrays, not a million dicts.

    Numbers of characters make numbers of pairs of them, and these make numbers of 4-grams. Each text is followed by
    zeros, which no character has: so a short text is one shingle that no other equals.
    """
    letters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    padding = SHINGLE  # even an empty text has one shingle
    begins = np.concatenate([[0], np.cumsum(lengths + padding)])
    padded = np.zeros(begins[-1] + 1, dtype=np.int64)
    padded[np.arange(len(letters)) + np.repeat(np.arange(len(texts)) * padding, lengths)] = 1 + _numbered(letters)
    twos = _paired(padded[:-1], padded[1:])
    at = np.arange(ends[-1]) + np.repeat(begins[:-1] - ends[:-1], counts)
    return _paired(twos[at], twos[at + 2])


def _paired(first: Indices, second: Indices) -> Indices:
    """Numbers for pairs of numbers, from 0 without gaps. There are less than 2^31 different ones, so none overflows."""
    return _numbered(first * (int(second.max(initial=0)) + 1) + second)


def _numbered(values: npt.NDArray[Any]) -> Indices:
    """Equal numbers for equal values, from 0 without gaps; by a table where one is small enough, else by sorting."""
    top = int(values.max(initial=0)) + 1
    if top > _TABLE:
        return np.unique(values, return_inverse=True)[1].astype(np.int64)
    used = np.zeros(top, dtype=bool)
    used[values] = True
    numbers: Indices = (np.cumsum(used, dtype=np.int64) - 1)[values]
    return numbers


def _cut(rows: Any, sizes: Indices, lengths: Indices) -> Any:
    """Each row's rarest shingles, so many (``lengths``) that similar rows share enough of them.

    A row of n shingles has at least o = ceil(threshold * n) of them in common with every row that is similar to it.
    In front of the k-th rarest common one there are at most n - o that are not common, so the first n - o + k hold k
    common ones; where two rows ask for a different k, both prefixes hold at least the smaller.
    """
    place = np.arange(rows.nnz) - np.repeat(rows.indptr[:-1], sizes)
    keep = place < np.repeat(lengths, sizes)
    ends = np.concatenate([[0], np.cumsum(np.minimum(lengths, sizes))]).astype(np.int64)
    return csr_array((rows.data[keep], rows.indices[keep], ends), shape=rows.shape)


def _shared(rows: Any, sizes: Indices, first: Indices, second: Indices) -> Indices:
    """How many shingles the two rows of each pair have in common."""
    parts = max(1, math.ceil(int(np.sum(sizes[first] + sizes[second])) / _CELLS))
    counts = [
        rows[a].multiply(rows[b]).sum(axis=1)
        for a, b in zip(np.array_split(first, parts), np.array_split(second, parts), strict=True)
    ]
    shared: Indices = np.concatenate(counts).astype(np.int64)
    return shared
