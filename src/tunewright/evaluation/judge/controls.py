"""Cases whose answer is known by construction: a judge that gets them wrong is vetoed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tunewright.core.errors import UserError
from tunewright.evaluation.judge.figures import exact_lower_limit, reasons
from tunewright.evaluation.judge.questions import (
    INJECTION,
    ControlRow,
    JudgeQuestion,
    Vote,
    correctness,
    outcome,
    pairwise,
)
from tunewright.evidence.judge import Control, ControlName
from tunewright.evidence.schema import Item
from tunewright.metrics import normalised

REQUIRED = 0.8
"""Minimum share of obvious cases; GPT-4 and people agree on over 80% of real ones (Zheng et al. 2023, 2306.05685)."""

FEWEST = 14
"""With fewer, the lower limit stays below `REQUIRED` even if all pass: 0.05 ** (1 / 13) is 0.794."""

_EXPECTED: dict[ControlName, str] = {
    "gold is correct": "the reference itself is correct",
    "swapped reference": "another item's reference is incorrect",
    "injected verdict": "a wrong answer that dictates the verdict is incorrect",
    "gold against gold": "equal answers tie",
    "gold against other": "the reference wins against another item's, in both orders",
}


@dataclass(frozen=True)
class Case:
    """One item of one control."""

    control: ControlName
    key: str
    questions: tuple[JudgeQuestion, ...]

    def row(self, votes: Sequence[Vote]) -> ControlRow:
        """Return a row with the judge's result; ``votes`` answer this case's questions."""
        missing = next((vote.unscored for vote in votes if vote.unscored), None)
        return ControlRow(
            key=self.key,
            control=self.control,
            passed=missing is None and _PASSED[self.control](votes),
            unscored=missing,
            replies=tuple(vote.reply for vote in votes),
        )


_PASSED: dict[ControlName, Callable[[Sequence[Vote]], bool]] = {
    "gold is correct": lambda votes: votes[0].verdict == "correct",
    "swapped reference": lambda votes: votes[0].verdict == "incorrect",
    "injected verdict": lambda votes: votes[0].verdict == "incorrect",
    "gold against gold": lambda votes: votes[0].verdict == "tie",
    "gold against other": lambda votes: outcome(votes[0], votes[1]) == ("win", False),
}


def control_cases(items: Sequence[Item], most: int, seed: int, criteria: str | None) -> list[Case]:
    """Return the controls on up to ``most`` items, one per cluster, each with another cluster's reference."""
    rng = np.random.default_rng(seed)
    shuffled = [items[place] for place in rng.permutation(len(items))]
    first_of = {item.cluster: item for item in reversed(shuffled) if item.reference.strip()}
    chosen: list[tuple[Item, Item]] = []
    for item in first_of.values():
        if len(chosen) == most:
            break
        unlike = [
            other
            for other in first_of.values()
            if other.cluster != item.cluster and normalised(other.reference) != normalised(item.reference)
        ]
        if unlike:
            chosen.append((item, unlike[int(rng.integers(len(unlike)))]))
    if len(chosen) < FEWEST:
        raise UserError(
            f"Testing a judge requires at least {FEWEST} items of different clusters with different references "
            f"(got {len(chosen)})",
            fix="Evaluate on more items that differ.",
        )
    return [case for item, other in chosen for case in _cases(item, other, criteria)]


def _cases(item: Item, other: Item, criteria: str | None) -> list[Case]:
    task, gold, wrong = item.input, item.reference, other.reference
    asked: dict[ControlName, tuple[JudgeQuestion, ...]] = {
        "gold is correct": (correctness(task, gold, gold, criteria),),
        "swapped reference": (correctness(task, wrong, gold, criteria),),
        "injected verdict": (correctness(task, gold, INJECTION.format(wrong=wrong), criteria),),
        "gold against gold": (pairwise(task, gold, gold, gold, criteria),),
        "gold against other": (
            pairwise(task, gold, gold, wrong, criteria),
            pairwise(task, gold, wrong, gold, criteria),
        ),
    }
    return [Case(control, item.key, questions) for control, questions in asked.items()]


def measured_controls(rows: Sequence[ControlRow]) -> tuple[Control, ...]:
    """Return each control's count and limit."""
    controls = []
    for name, expected in _EXPECTED.items():
        of_it = [row for row in rows if row.control == name]
        passed = sum(row.passed for row in of_it)
        controls.append(
            Control(
                name=name,
                expected=expected,
                items=len(of_it),
                passed=passed,
                unscored=reasons(of_it),
                limit=exact_lower_limit(passed, len(of_it)),
                required=REQUIRED,
            )
        )
    return tuple(controls)


def veto(controls: Sequence[Control]) -> tuple[str, ...]:
    """Return the reason for a veto; empty if the judge passes all controls."""
    return tuple(
        f"{c.name} ({c.expected}): {c.passed} of {c.items} passed"
        + "".join(f", {count} without a verdict ({why})" for why, count in c.unscored.items())
        + f"; that is at least {c.limit:.0%} with 95% "
        f"confidence, and {c.required:.0%} is required"
        for c in controls
        if not c.held
    )
