"""Rows that repeat another: exact duplicates, which are left out, and near-duplicates, which are kept and counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tunewright.core.progress import Reporter
from tunewright.data.dedup import Repeat, find_duplicates
from tunewright.data.examples import Example
from tunewright.data.versions import DatasetVersion, Member


def exact_repeats(examples: Sequence[Example], kept: int) -> dict[int, Repeat]:
    """Return the rows that ask the same as an earlier one and have its output and system turn.

    Asking the same means equal prompts after NFC, case folding and collapsing of white space; the output is compared
    without the white space around it, the system turn as it is.

    Args:
        examples: all rows, the most deserving first.
        kept: the first ``kept`` rows stay, whatever they repeat.
    """
    first: dict[tuple[str, tuple[str, ...], str], int] = {}
    repeats: dict[int, Repeat] = {}
    for row, example in enumerate(examples):
        system = tuple(m.content for m in example.prompt if m.role == "system")
        earlier = first.setdefault((example.asked, system, example.output.strip()), row)
        if earlier != row and row >= kept:
            repeats[row] = Repeat(earlier, 1.0)
    return repeats


def near_repeats(examples: Sequence[Example], similarity: float, reporter: Reporter) -> dict[int, Repeat]:
    """Return the rows that ``data.duplicates: drop`` would leave out of these rows, each with the one it repeats."""
    return find_duplicates(examples, 0, similarity, reporter)


def count_near_repeats(members: Iterable[Member], similarity: float, reporter: Reporter) -> int:
    """Return how many rows of the domain nearly repeat another one of it."""
    return len(near_repeats([m.example for m in members if not m.mixed], similarity, reporter))


def cluster_counts(version: DatasetVersion, member: Member) -> tuple[int, int]:
    """Return how many rows share the member's cluster, and how many of those its output; itself included."""
    cluster = [m for m in version.members if m.cluster == member.cluster]
    output = member.example.output.strip()
    return len(cluster), sum(m.example.output.strip() == output for m in cluster)
