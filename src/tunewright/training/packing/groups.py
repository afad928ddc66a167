"""Grouping of a batch's rows by shared prefixes, with the fewest tokens to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

GROUP_COST = 8
"""Fixed cost of one more group, in tokens: its attention is a separate computation."""


@dataclass(frozen=True)
class Group:
    """Rows that start with the same ``prefix`` tokens; rows that share nothing form a group with a prefix of 0."""

    prefix: int
    rows: tuple[int, ...]
    """Indices in the batch."""


def plan_groups(rows: Sequence[Sequence[int]]) -> list[Group]:
    """Group rows by shared prefixes, so that prefixes and suffixes together have the fewest tokens.

    In lexicographic order rows with a common prefix are neighbours, so groups are runs of that order. Dynamic
    programming over the runs' ends finds the best ones. At least one token of each row stays in its suffix.

    Args:
        rows: token ids, each non-empty.
    """
    order = sorted(range(len(rows)), key=lambda place: list(rows[place]))
    common = [common_prefix(rows[a], rows[b]) for a, b in pairwise(order)]
    # best[end] = (cost, start, prefix): the lowest cost of the first `end` rows in order, and their last group.
    # cost(start, end) = best[start] + tokens of the rows - (rows - 1) * prefix + GROUP_COST.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(order) + 1):
        alone = len(rows[order[end - 1]])
        choice = (best[end - 1][0] + alone, end - 1, 0)
        prefix, total = alone - 1, alone
        for start in range(end - 2, -1, -1):
            length = len(rows[order[start]])
            prefix = min(prefix, common[start], length - 1)
            if prefix <= 0:
                break
            total += length
            cost = best[start][0] + total - (end - start - 1) * prefix + GROUP_COST
            choice = min(choice, (cost, start, prefix))
        best.append(choice)
    groups: list[Group] = []
    alone_rows: list[int] = []
    end = len(order)
    while end:
        _, start, prefix = best[end]
        members = order[start:end]
        if prefix:
            groups.append(Group(prefix, tuple(members)))
        else:
            alone_rows += members
        end = start
    groups.reverse()
    return groups + [Group(0, tuple(sorted(alone_rows)))] * bool(alone_rows)


def computed_tokens(rows: Sequence[Sequence[int]], groups: Sequence[Group]) -> int:
    """Return the tokens that go through the model: each group's prefix once, and all suffixes."""
    return sum(map(len, rows)) - sum((len(group.rows) - 1) * group.prefix for group in groups)


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the length of the common prefix of two rows, in tokens or characters."""
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))
