"""All pairs of texts whose character 4-grams overlap enough, found exactly.

The search is a set-similarity join: two sets that overlap enough must already share some of their rarest members
(prefix filtering: Chaudhuri et al. 2006, "A Primitive Operator for Similarity Joins in Data Cleaning"; longer prefixes
that must share several: Wang et al. 2012, "Can We Beat the Prefix Filtering?"), here as products of sparse matrices.
It misses no pair at any threshold, which MinHash cannot promise, and one missed pair is one leak into the test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array

from tunewright.progress import Reporter

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

SHINGLE = 4  # characters: of a word's inflections and typing errors, most 4-grams survive
_BLOCK = 256  # texts compared at once with all others
_CELLS = 4_000_000  # shingles held at once while pairs are verified: bounds the memory, not the result
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Pairs:
    """Pairs of text numbers at or above the threshold: ``first`` > ``second``, in ascending order of both."""

    first: Indices
    second: Indices
    similarity: npt.NDArray[np.float64]


def shingles(text: str) -> set[str]:
    """The set of a text's character 4-grams; a shorter text is its own only shingle."""
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def near_pairs(
    texts: Sequence[str],
    threshold: float,
    wanted: Callable[[Indices, Indices], Mask],
    reporter: Reporter,
    title: str,
) -> Iterator[Pairs]:
    """All pairs with a Jaccard similarity of their shingles at or above the threshold, block after block.

    Args:
        texts: the texts; a pair arrives with the block that its later text belongs to.
        threshold: in (0, 1].
        wanted: which of a block's candidate pairs matter; it is asked when the block's turn comes, so that it can
            depend on the pairs of earlier blocks.
        reporter: shows the progress.
        title: what the progress is called.
    """
    rows = _shingle_matrix(texts)
    sizes = np.diff(rows.indptr).astype(np.int64)
    overlaps = np.ceil(threshold * sizes - _ROUNDING).astype(np.int64)
    needed = np.clip(1 + sizes // 16, 1, np.maximum(overlaps, 1))
    prefixes = _cut(rows, sizes, sizes - overlaps + needed)
    postings = csr_array(prefixes.T)
    with reporter.task(title, len(texts), "examples") as task:
        for start in range(0, len(texts), _BLOCK):
            met = coo_array(prefixes[start : start + _BLOCK] @ postings)
            first, second = met.row.astype(np.int64) + start, met.col.astype(np.int64)
            ask = (second < first) & (met.data >= np.minimum(needed[first], needed[second]))
            first, second = first[ask], second[ask]
            ask = wanted(first, second)
            first, second = first[ask], second[ask]
            shared = _shared(rows, sizes, first, second)
            similarity = shared / (sizes[first] + sizes[second] - shared)
            near = similarity >= threshold
            first, second, similarity = first[near], second[near], similarity[near]
            order = np.lexsort((second, first))
            yield Pairs(first[order], second[order], similarity[order])
            task.advance(min(_BLOCK, len(texts) - start))


def _shingle_matrix(texts: Sequence[str]) -> Any:
    """A 0/1 csr matrix [texts, shingles] whose columns run from the rarest shingle to the most frequent."""
    vocabulary: dict[str, int] = {}
    numbers = [
        np.array([vocabulary.setdefault(s, len(vocabulary)) for s in shingles(text)], dtype=np.int64) for text in texts
    ]
    flat = np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int64)
    rank = np.empty(len(vocabulary), dtype=np.int64)
    rank[np.argsort(np.bincount(flat, minlength=len(vocabulary)), kind="stable")] = np.arange(len(vocabulary))
    ends = np.concatenate([[0], np.cumsum([len(n) for n in numbers])]).astype(np.int64)
    matrix = csr_array((np.ones(len(flat), dtype=np.int32), rank[flat], ends), shape=(len(texts), len(vocabulary)))
    matrix.sort_indices()
    return matrix


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
