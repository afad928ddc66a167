"""Acceptance sampling: how many rows of a version have to be checked before one may say "under 5% wrong, at 95%".

Two plans, both with exact distributions: Wald's sequential test, which stops as soon as it knows, and a fixed-size plan
for those who have to name a number beforehand. Neither knows of disk or terminal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Finding = Literal["right", "wrong", "unsettled"]
Decision = Literal["accepted", "rejected", "go on"]

LIMIT = 0.05
CONFIDENCE = 0.95


class _Plan(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SequentialPlan(_Plan):
    """Wald's sequential probability ratio test (A. Wald 1945, "Sequential Tests of Statistical Hypotheses", sec. 3).

    A version with a share of ``limit`` wrong is accepted with a chance of at most about ``beta``; one with a share of
    ``good`` is rejected with a chance of at most about ``alpha``.
    """

    kind: Literal["sequential"] = "sequential"
    good: Annotated[float, Field(gt=0, lt=1)] = 0.01
    limit: Annotated[float, Field(gt=0, lt=1)] = LIMIT
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 1 - CONFIDENCE
    beta: Annotated[float, Field(gt=0, lt=0.5)] = 1 - CONFIDENCE

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.good >= self.limit:
            raise ValueError("good must be below limit")
        return self

    @property
    def confidence(self) -> float:
        """The chance that a version at the limit is not accepted."""
        return 1 - self.beta

    def decide(self, checked: int, wrong: int, unsettled: int = 0) -> Decision:
        """Return the decision after so many rows; an unsettled one counts against whichever decision is asked for."""
        if self._evidence(checked, wrong + unsettled) <= math.log(self.beta / (1 - self.alpha)):
            return "accepted"
        if self._evidence(checked, wrong) >= math.log((1 - self.beta) / self.alpha):
            return "rejected"
        return "go on"

    def needed(self, checked: int, wrong: int) -> int:
        """Return how many more rows, if all are right, it takes to accept."""
        left = self._evidence(checked, wrong) - math.log(self.beta / (1 - self.alpha))
        return max(0, math.ceil(left / math.log((1 - self.good) / (1 - self.limit))))

    def _evidence(self, checked: int, wrong: int) -> float:
        """Return the log of how much likelier these counts are at the limit than at the good share."""
        right = checked - wrong
        return wrong * math.log(self.limit / self.good) + right * math.log((1 - self.limit) / (1 - self.good))


class FixedPlan(_Plan):
    """Check ``size`` rows, accept with at most ``allowed`` wrong ones: the smallest size that keeps the promise."""

    kind: Literal["fixed"] = "fixed"
    allowed: Annotated[int, Field(ge=0, le=1000)] = 0
    limit: Annotated[float, Field(gt=0, lt=1)] = LIMIT
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = CONFIDENCE

    @property
    def size(self) -> int:
        """How many rows are to be checked."""
        return fixed_size(self.allowed, self.limit, self.confidence)

    def decide(self, checked: int, wrong: int, unsettled: int = 0) -> Decision:
        """Return the decision after so many rows; too many wrong ones end it early."""
        if wrong > self.allowed:
            return "rejected"
        done = checked >= self.size and wrong + unsettled <= self.allowed
        return "accepted" if done else "go on"

    def needed(self, checked: int, wrong: int) -> int:
        """Return how many more rows are to be checked."""
        return max(0, self.size - checked) if wrong <= self.allowed else 0


Plan = Annotated[SequentialPlan | FixedPlan, Field(discriminator="kind")]


def fixed_size(allowed: int, limit: float = LIMIT, confidence: float = CONFIDENCE) -> int:
    """The smallest n for which at most ``allowed`` wrong of n has a chance of 1 - confidence or less at the limit.

    Exact binomial: the least n with P(X <= allowed | n, limit) <= 1 - confidence; at 5% and 95%, for 0 to 5 allowed:
    59, 93, 124, 153, 181, 208.
    """
    from scipy.stats import binom

    low, high = allowed, allowed + 1
    while binom.cdf(allowed, high, limit) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:  # P falls as n grows: too small at low, enough at high
        middle = (low + high) // 2
        low, high = (middle, high) if binom.cdf(allowed, middle, limit) > 1 - confidence else (low, middle)
    return high


def upper_bound(wrong: int, checked: int, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided upper bound of the share wrong (Clopper and Pearson 1934); 1 where nothing has been checked.

    It is that of a sample whose size was fixed beforehand; a sequential plan's promise is its own ``beta``.
    """
    if wrong >= checked:
        return 1.0
    from scipy.stats import beta

    return float(beta.ppf(confidence, wrong + 1, checked - wrong))


@dataclass(frozen=True)
class Outcome:
    """Where a plan stands. ``wrong`` of ``checked`` were wrong; ``unsettled`` of them were skipped or are disputed.

    ``upper`` is the bound of ``upper_bound`` with unsettled rows taken as wrong; ``needed`` says how many more rows it
    takes at the least to accept, if these and the unsettled ones are right; ``whole`` that every row of the version was
    checked, so that nothing is estimated.
    """

    decision: Decision
    checked: int
    wrong: int
    unsettled: int
    upper: float
    needed: int
    whole: bool = False


def judge(plan: SequentialPlan | FixedPlan, findings: Iterable[Finding], rows: int) -> Outcome:
    """Follow a plan through its sample, in the order drawn, up to the first decision.

    Args:
        plan: decides.
        findings: those of the first rows of the sample, up to the first row without any.
        rows: how many rows the version has. When all of them are checked the share wrong is known, and counts itself.
    """
    checked = wrong = unsettled = 0
    decision: Decision = "go on"
    for finding in findings:
        checked += 1
        wrong += finding == "wrong"
        unsettled += finding == "unsettled"
        decision = plan.decide(checked, wrong, unsettled)
        if decision != "go on":
            break
    whole = decision == "go on" and checked == rows > 0
    if whole and (wrong + unsettled) / rows < plan.limit:
        decision = "accepted"
    elif whole and wrong / rows >= plan.limit:
        decision = "rejected"
    needed = min(plan.needed(checked, wrong), rows - checked) if decision == "go on" else 0
    upper = (wrong + unsettled) / rows if whole else upper_bound(wrong + unsettled, checked, plan.confidence)
    return Outcome(decision, checked, wrong, unsettled, upper, needed, whole)


def sample_order(keys: Sequence[str], version: str, draw: int) -> list[str]:
    """All pair keys in the order in which they are to be checked: a simple random sample, however many are taken.

    Decided by the version's digest and the draw's number alone, so nobody can choose it and anybody can check it.
    """
    return sorted(keys, key=lambda key: hashlib.sha256(f"{version}:{draw}:{key}".encode()).digest())
