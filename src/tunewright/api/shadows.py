"""Comparison of the answers of shadow candidates with those that were returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunewright.serving.tenants.usage import ShadowLine


@dataclass(frozen=True)
class ShadowCount:
    """The number of requests that were copied to one candidate, by what it answered."""

    candidate: str
    asked: int
    same: int
    other: int

    @property
    def unanswered(self) -> int:
        """Requests without its answer."""
        return self.asked - self.same - self.other


def shadow_counts(lines: Sequence[ShadowLine]) -> list[ShadowCount]:
    """Return the counts of each candidate, in the order of their first requests."""
    by_candidate: dict[str, list[ShadowLine]] = {}
    for line in lines:
        by_candidate.setdefault(line.candidate, []).append(line)
    found = []
    for candidate, asked in by_candidate.items():
        same = sum(line.shadow_answer is not None and line.shadow_answer == line.answer for line in asked)
        found.append(ShadowCount(candidate, len(asked), same, len(differing_lines(asked))))
    return found


def differing_lines(lines: Sequence[ShadowLine]) -> list[ShadowLine]:
    """Return the requests that the candidate answered otherwise."""
    return [line for line in lines if line.shadow_answer not in (None, line.answer)]
