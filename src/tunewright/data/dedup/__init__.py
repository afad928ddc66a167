"""Similar examples: duplicates to drop, and clusters to keep in one split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np

from tunewright.core.progress import Reporter
from tunewright.core.spill import TextFile, numbered, repeated
from tunewright.core.workers import THIS_PROCESS, Workers
from tunewright.data.dedup.shingles import Indices, shingle_matrix
from tunewright.data.dedup.similarity import Pairs, link, nearest_kept, similarities
from tunewright.data.examples import Example, normalised
from tunewright.data.versions import DatasetVersion, Member

# The lookbehind keeps the search linear: without it each letter of a long word would start a search to the word's end.
_WORD_AT_END = re.compile(r"(?<!\w)\w+$")

_CLUSTERS, _DUPLICATES = "clustering", "looking for duplicates"


@dataclass(frozen=True)
class Repeat:
    """The kept row that a dropped one repeats, and how similar their inputs are (Jaccard)."""

    of: int
    similarity: float


def comparison_texts(examples: Iterable[Example]) -> Sequence[str]:
    """Return the text to compare for each example: its normalised input without the words common to all inputs.

    Texts are in NFC, casefolded, with white space collapsed. The common words at the beginning and the end, such as an
    instruction in every input, would make all inputs similar.
    """
    return distinctive(e.input_text for e in examples)


def distinctive(texts: Iterable[str]) -> Sequence[str]:
    """Return each text normalised, without the words that all texts begin or end with; see :func:`comparison_texts`.

    They are in a temporary file.
    """
    file = TextFile(map(normalised, texts))
    low, high = min(file, default=""), max(file, default="")
    if low == high:
        return file
    # Cut at a word boundary: a word that is only partly common belongs to the difference.
    head = len(_WORD_AT_END.sub("", _common_head([low, high])))
    tail = len(_WORD_AT_END.sub("", _common_head(text[head:][::-1] for text in file)))
    return TextFile(text[head : len(text) - tail].strip() for text in file) if head or tail else file


def _common_head(texts: Iterable[str]) -> str:
    """Return the longest common beginning."""
    head: str | None = None
    for text in texts:
        if head is None or not text.startswith(head):
            head = text if head is None else commonprefix([text, head])  # noqa: RUF071 by characters, as wanted here
        if not head:
            break
    return head or ""


def find_duplicates(
    examples: Sequence[Example],
    kept: int,
    threshold: float,
    reporter: Reporter,
    workers: Workers = THIS_PROCESS,
) -> dict[int, Repeat]:
    """Return the rows that repeat an earlier row: near-equal input, same output, system turn and functions.

    Rows are compared in order with the rows kept so far, so that a chain of small differences is not
    dropped as a whole. A near-equal input with another output is not a duplicate, since the difference
    may be the task. The rows are in order of preference; the first ``kept`` ones always stay.

    Returns:
        The most similar kept row of each dropped row.
    """
    texts = comparison_texts(examples)
    return _repeats(nearest_kept(texts, _answers(examples), kept, threshold, reporter, _DUPLICATES, workers))


def find_clusters_and_duplicates(
    examples: Sequence[Example], threshold: float, reporter: Reporter, workers: Workers = THIS_PROCESS
) -> tuple[list[str], dict[int, Repeat]]:
    """Return the results of :func:`find_clusters` and :func:`find_duplicates` (``kept=0``) for the same rows.

    Only rows of one cluster are compared for duplicates, since no others are near-equal.
    """
    with reporter.task(_CLUSTERS, len(examples), "examples") as task:
        texts = comparison_texts(examples)
        labels = link(texts, threshold, task, workers)
        names = _names(examples, labels)
        together = np.unique(_answers(examples) * len(examples) + labels, return_inverse=True)[1]
    return names, _repeats(nearest_kept(texts, together, 0, threshold, reporter, _DUPLICATES, workers))


def _answers(examples: Iterable[Example]) -> Indices:
    """Number the rows by the parts that duplicates share besides the input, [rows]."""
    return numbered(map(str, map(_answer, examples)))


def _repeats(pairs: Pairs) -> dict[int, Repeat]:
    return {row: Repeat(of, similarity) for row, of, similarity in zip(*(a.tolist() for a in pairs), strict=True)}


def _answer(example: Example) -> tuple[tuple[str, ...], str]:
    return example.instructions, example.output.strip()


def find_clusters(
    examples: Sequence[Example], threshold: float, reporter: Reporter, workers: Workers = THIS_PROCESS
) -> list[str]:
    """Return the cluster name of each row: rows linked by a chain of near-equal inputs share one.

    A cluster's name is its smallest pair key, so that names do not depend on the order of rows.
    """
    with reporter.task(_CLUSTERS, len(examples), "examples") as task:
        return _names(examples, link(comparison_texts(examples), threshold, task, workers))


def _names(examples: Sequence[Example], labels: Indices) -> list[str]:
    """Return each row's cluster, given the first row that each is linked with, [rows]."""
    names = [example.pair_key for example in examples]
    linked = np.flatnonzero(labels != np.arange(len(labels)))  # linked with an earlier row, whose place is the label
    for row, label in zip(linked.tolist(), labels[linked].tolist(), strict=True):
        names[label] = min(names[label], names[row])
    for row, label in zip(linked.tolist(), labels[linked].tolist(), strict=True):
        names[row] = names[label]
    return names


@dataclass(frozen=True)
class ClusterSpan:
    """A cluster of several rows, with two dissimilar rows that show how far its chains reach."""

    name: str
    rows: int
    ends: tuple[int, int]  # indices of the two rows
    similarity: float  # similarity of the two rows; below the threshold if only a chain links them


def largest_clusters(examples: Sequence[Example], clusters: Sequence[str], count: int) -> list[ClusterSpan]:
    """Return the largest clusters of more than one row, largest first, each with two dissimilar rows.

    The two rows are found in two sweeps, like the ends of a tree's longest path: the row least similar to the first,
    then the row least similar to that one. This is a heuristic; a less similar pair may exist.
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
        families.append(ClusterSpan(name, len(rows), (ends[0], ends[1]), similarity))
    return families


def _least_like(matrix: Any, row: int) -> tuple[int, float]:
    """Return the row of a shingle matrix that is least similar to this one, and the similarity."""
    similarity = similarities(matrix[[row]], matrix).toarray()[0]
    similarity[row] = np.inf
    least = int(np.argmin(similarity))
    return least, float(similarity[least])


def exact_repeats(examples: Sequence[Example], kept: int) -> dict[int, Repeat]:
    """Return the rows with the same prompt, output, system turn and functions as an earlier row.

    Prompts are compared after NFC, case folding and collapsing of white space; outputs without surrounding white space;
    system turns and functions exactly. ``kept`` is the number of first rows that are always kept.
    """
    repeats: dict[int, Repeat] = {}
    for rows in repeated(example.prompt_digest for example in examples):
        first: dict[tuple[tuple[str, ...], str], int] = {}
        for row in rows:
            earlier = first.setdefault(_answer(examples[row]), row)
            if earlier != row and row >= kept:
                repeats[row] = Repeat(earlier, 1.0)
    return dict(sorted(repeats.items()))


def count_near_repeats(members: Iterable[Member], similarity: float, reporter: Reporter) -> int:
    """Count the domain rows that ``data.duplicates: drop`` would leave out."""
    return len(find_duplicates([m.example for m in members if not m.mixed], 0, similarity, reporter))


def cluster_counts(version: DatasetVersion, member: Member) -> tuple[int, int]:
    """Count the rows of the member's cluster, and the rows among them with its output; the member counts in both."""
    cluster = [m for m in version.members if m.cluster == member.cluster]
    output = member.example.output.strip()
    return len(cluster), sum(m.example.output.strip() == output for m in cluster)
