"""The result of the isolation test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_MAX_REASONS = 8


@dataclass(frozen=True)
class Failure:
    """A wrong answer."""

    asked: str
    """The model that should have answered."""
    shortfall: float
    """In nats."""
    like: str | None
    """The model that could have given this answer, if there is one."""


@dataclass(frozen=True)
class Check:
    """One pattern of requests, and its result."""

    name: str
    asked: int
    """The number of requests."""
    worst: float
    """The largest shortfall, in nats."""
    failures: tuple[Failure, ...]

    @property
    def wrong(self) -> int:
        """The number of wrong answers."""
        return len(self.failures)


@dataclass(frozen=True)
class IsolationResult:
    """The result of the test."""

    engine: str
    tolerance: float
    models: tuple[str, ...]
    checks: tuple[Check, ...]
    alike: tuple[tuple[str, str], ...]
    """Pairs that no probe distinguishes: if one answered for the other, the test would not detect it."""

    @property
    def verdict(self) -> Literal["isolated", "not isolated", "can't tell"]:
        """The verdict: any wrong answer decides it; without one, the probes must distinguish every pair of models."""
        if any(check.failures for check in self.checks):
            return "not isolated"
        return "can't tell" if self.alike else "isolated"

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons for a verdict other than "isolated", one per line, shortened to the first few and a count."""
        lines = [
            f"{check.name}: a request for {failure.asked} got "
            + (
                f"the answer of {failure.like}"
                if failure.like
                else f"an answer that falls short by {failure.shortfall:.1f} nats"
            )
            for check in self.checks
            for failure in check.failures
        ]
        if len(lines) > _MAX_REASONS:
            lines[_MAX_REASONS:] = [f"and {len(lines) - _MAX_REASONS} more"]
        return (
            *lines,
            *(f"{one} and {other} give the same answers to all prompts" for one, other in self.alike),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
        checks = [
            {
                "name": check.name,
                "asked": check.asked,
                "worst_shortfall": round(check.worst, 4),
                "failures": [
                    {"asked": f.asked, "shortfall": round(f.shortfall, 4), "like": f.like} for f in check.failures
                ],
            }
            for check in self.checks
        ]
        return {
            "verdict": self.verdict,
            "engine": self.engine,
            "tolerance_nats": self.tolerance,
            "models": list(self.models),
            "checks": checks,
            "alike": [list(pair) for pair in self.alike],
        }
