"""Acceptance sampling: the rows to check before a version can be called "under 5% wrong, at 95% confidence".

There are two plans: Wald's sequential test, which stops as early as possible, and a fixed-size plan with exact
binomial probabilities, for a number that is known beforehand.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Finding = Literal["right", "wrong", "unsettled"]
Decision = Literal["accepted", "rejected", "continue"]

LIMIT = 0.05
CONFIDENCE = 0.95


class _SamplingPlan(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SequentialPlan(_SamplingPlan):
    """Wald's sequential probability ratio test (A. Wald 1945, "Sequential Tests of Statistical Hypotheses", sec. 3).

    A version with a share of ``limit`` wrong is accepted with probability at most about ``beta``; one with a share of
    ``good`` wrong is rejected with probability at most about ``alpha``.
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
        """Probability that a version at the limit is not accepted."""
        return 1 - self.beta

    def decide(self, checked: int, wrong: int, unsettled: int = 0) -> Decision:
        """Return the decision after ``checked`` rows; unsettled rows count against either decision."""
        if self._evidence(checked, wrong + unsettled) <= math.log(self.beta / (1 - self.alpha)):
            return "accepted"
        if self._evidence(checked, wrong) >= math.log((1 - self.beta) / self.alpha):
            return "rejected"
        return "continue"

    def needed(self, checked: int, wrong: int) -> int:
        """Return the number of further rows, if all are right, until acceptance."""
        left = self._evidence(checked, wrong) - math.log(self.beta / (1 - self.alpha))
        return max(0, math.ceil(left / math.log((1 - self.good) / (1 - self.limit))))

    def _evidence(self, checked: int, wrong: int) -> float:
        """Return the log-likelihood ratio of these counts: at ``limit`` against at ``good``."""
        right = checked - wrong
        return wrong * math.log(self.limit / self.good) + right * math.log((1 - self.limit) / (1 - self.good))


class FixedPlan(_SamplingPlan):
    """A plan that checks ``size`` rows and accepts at most ``allowed`` wrong rows, with the smallest valid size."""

    kind: Literal["fixed"] = "fixed"
    allowed: Annotated[int, Field(ge=0, le=1000)] = 0
    limit: Annotated[float, Field(gt=0, lt=1)] = LIMIT
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = CONFIDENCE

    @property
    def size(self) -> int:
        """Number of rows to check."""
        return fixed_size(self.allowed, self.limit, self.confidence)

    def decide(self, checked: int, wrong: int, unsettled: int = 0) -> Decision:
        """Return the decision after ``checked`` rows; too many wrong rows end the test early."""
        if wrong > self.allowed:
            return "rejected"
        done = checked >= self.size and wrong + unsettled <= self.allowed
        return "accepted" if done else "continue"

    def needed(self, checked: int, wrong: int) -> int:
        """Return the number of further rows to check."""
        return max(0, self.size - checked) if wrong <= self.allowed else 0


SamplingPlan = Annotated[SequentialPlan | FixedPlan, Field(discriminator="kind")]


def fixed_size(allowed: int, limit: float = LIMIT, confidence: float = CONFIDENCE) -> int:
    """Return the smallest sample size with at most ``allowed`` wrong rows that proves the limit.

    Exact binomial: the least n with P(X <= allowed | n, limit) <= 1 - confidence. At 5% and 95%, for 0 to 5 allowed,
    n is 59, 93, 124, 153, 181, 208.
    """
    from scipy.stats import binom

    low, high = allowed, allowed + 1
    while binom.cdf(allowed, high, limit) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:  # P falls as n grows: n is too small at low and enough at high
        middle = (low + high) // 2
        low, high = (middle, high) if binom.cdf(allowed, middle, limit) > 1 - confidence else (low, middle)
    return high


def upper_bound(wrong: int, checked: int, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided upper bound of the share wrong (Clopper and Pearson 1934); 1 if nothing was checked.

    It holds for a sample size that was fixed beforehand; a sequential plan's guarantee is its ``beta``.
    """
    if wrong >= checked:
        return 1.0
    from scipy.stats import beta

    return float(beta.ppf(confidence, wrong + 1, checked - wrong))


@dataclass(frozen=True)
class Outcome:
    """State of a plan. Of ``checked`` rows, ``wrong`` are wrong and ``unsettled`` were skipped or are disputed.

    ``upper`` is ``upper_bound`` with unsettled rows counted as wrong. ``needed`` is the minimum number of further rows
    until acceptance. ``whole`` is true if every row of the version was checked, so that nothing is estimated.
    """

    decision: Decision
    checked: int
    wrong: int
    unsettled: int
    upper: float
    needed: int
    whole: bool = False


def judge(plan: SequentialPlan | FixedPlan, findings: Iterable[Finding], rows: int) -> Outcome:
    """Follow a plan through its sample, in draw order, up to the first decision.

    ``findings`` end before the first missing one. Once all ``rows`` of the version are
    checked, the true share decides.
    """
    checked = wrong = unsettled = 0
    decision: Decision = "continue"
    for finding in findings:
        checked += 1
        wrong += finding == "wrong"
        unsettled += finding == "unsettled"
        decision = plan.decide(checked, wrong, unsettled)
        if decision != "continue":
            break
    whole = decision == "continue" and checked == rows > 0
    if whole and (wrong + unsettled) / rows < plan.limit:
        decision = "accepted"
    elif whole and wrong / rows >= plan.limit:
        decision = "rejected"
    needed = min(plan.needed(checked, wrong), rows - checked) if decision == "continue" else 0
    upper = (wrong + unsettled) / rows if whole else upper_bound(wrong + unsettled, checked, plan.confidence)
    return Outcome(decision, checked, wrong, unsettled, upper, needed, whole)


# A page of the studio needs it several times, and 100,000 keys take 0.2 s.
@lru_cache(maxsize=2)
def sample_order(keys: tuple[str, ...], version: str, draw: int) -> tuple[str, ...]:
    """Return all pair keys in checking order: any beginning of it is a simple random sample.

    Only the version's digest and the draw's number decide the order, so that it cannot be chosen and can be verified.
    """
    return tuple(sorted(keys, key=lambda key: hashlib.sha256(f"{version}:{draw}:{key}".encode()).digest()))
