"""Examples too alike to be independent: which to drop as duplicates, and which to keep on one side of the split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunewright.core.progress import Reporter
from tunewright.data.dedup.similarity import link, nearest_kept, shingle_matrix, similarities
from tunewright.data.examples import Example, normalised


@dataclass(frozen=True)
class Repeat:
    """The kept row that a dropped one repeats, and how similar their inputs are (Jaccard)."""

    of: int
    similarity: float


def comparison_texts(examples: Sequence[Example]) -> list[str]:
    """What is compared of each example: its input, normalised, without the words that all inputs begin or end with.

    Normalised is NFC, casefolded, white space collapsed. An instruction written into every input says nothing about
    which inputs are alike; left in, it would make all of them alike.
    """
    return distinctive([e.input_text for e in examples])


def distinctive(texts: Sequence[str]) -> list[str]:
    """Each text, normalised, without the words that all of them begin or end with; see :func:`comparison_texts`."""
    texts = [normalised(text) for text in texts]
    different = set(texts)
    if len(different) < 2:
        return texts
    # Cut at the edge of a word: half a word belongs to what differs.
    head = len(re.sub(r"\w+$", "", _common_head(different)))
    backwards = [text[head:][::-1] for text in different]
    tail = len(re.sub(r"\w+$", "", _common_head(backwards)))
    return [text[head : len(text) - tail].strip() for text in texts]


def _common_head(texts: Collection[str]) -> str:
    """Return the longest beginning that all texts share: that of the first and the last in sorted order."""
    low, high = min(texts), max(texts)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:same]


def find_duplicates(examples: Sequence[Example], kept: int, threshold: float, reporter: Reporter) -> dict[int, Repeat]:
    """Rows that repeat an earlier one: near-equal input, the same output and the same system turn.

    Rows are taken in their order and compared with those kept so far, so that a chain of small differences is not
    eaten up from end to end. Near-equal input with another output is no duplicate: that difference may be the task.

    Args:
        examples: all rows, the most deserving first.
        kept: the first ``kept`` rows stay, whatever they resemble.
        threshold: Jaccard similarity of the inputs' character 4-grams, in (0, 1].

    Returns:
        For each dropped row its most similar kept row.
    """
    numbers: dict[tuple[tuple[str, ...], str], int] = {}
    answers = np.array([numbers.setdefault(_answer(e), len(numbers)) for e in examples], dtype=np.int64)
    texts = comparison_texts(examples)
    pairs = nearest_kept(texts, answers, kept, threshold, reporter, "looking for duplicates")
    return {
        row: Repeat(of, similarity)
        for row, of, similarity in zip(
            pairs.first.tolist(), pairs.second.tolist(), pairs.similarity.tolist(), strict=True
        )
    }


def _answer(example: Example) -> tuple[tuple[str, ...], str]:
    """Return what has to be equal in duplicates besides the input: "yes" to another instruction is another answer."""
    return tuple(m.content for m in example.prompt if m.role == "system"), example.output.strip()


def find_clusters(examples: Sequence[Example], threshold: float, reporter: Reporter) -> list[str]:
    """For each row the name of its cluster: rows linked by any chain of near-equal inputs share one.

    A cluster's name is the smallest pair key in it, so names depend on the set of rows and not on their order.

    Args:
        examples: all rows, each pair key once.
        threshold: Jaccard similarity of the inputs' character 4-grams, in (0, 1].
    """
    names: dict[int, str] = {}
    labels = link(comparison_texts(examples), threshold, reporter, "clustering").tolist()
    for label, example in zip(labels, examples, strict=True):
        names[label] = min(names.get(label, example.pair_key), example.pair_key)
    return [names[label] for label in labels]


@dataclass(frozen=True)
class Family:
    """A cluster of several rows, and two of them that have little in common: how far its chains reach.

    Attributes:
        name: the cluster's name.
        rows: how many it has.
        ends: numbers of two rows far apart.
        similarity: Jaccard similarity of the two; below the threshold only where a chain links them.
    """

    name: str
    rows: int
    ends: tuple[int, int]
    similarity: float


def largest_clusters(examples: Sequence[Example], clusters: Sequence[str], count: int) -> list[Family]:
    """Return the largest clusters of more than one row, the largest first, each with two of its least similar rows.

    The two are found in two sweeps, as the ends of a tree's longest path are: the row least like the first, then the
    row least like that one. There may be two that are still less alike.

    Args:
        examples: all rows.
        clusters: each row's cluster, as from ``find_clusters`` or joined further.
        count: how many at most.
    """
    sizes = Counter(clusters)
    names = [name for name in sorted(sizes, key=lambda n: (-sizes[n], n))[:count] if sizes[name] > 1]
    texts = comparison_texts(examples) if names else []
    families = []
    for name in names:
        rows = [row for row, cluster in enumerate(clusters) if cluster == name]
        matrix = shingle_matrix([texts[row] for row in rows])
        one, _ = _least_like(matrix, 0)
        other, similarity = _least_like(matrix, one)
        ends = sorted((rows[one], rows[other]))
        families.append(Family(name, len(rows), (ends[0], ends[1]), similarity))
    return families


def _least_like(matrix: Any, row: int) -> tuple[int, float]:
    """Return the other row of a shingle matrix that is least similar to this one, and how similar it is."""
    similarity = similarities(matrix[[row]], matrix).toarray()[0]
    similarity[row] = np.inf
    least = int(np.argmin(similarity))
    return least, float(similarity[least])
