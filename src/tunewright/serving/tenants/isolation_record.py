"""The record of an isolation test, as it is stored with a release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

IsolationVerdict = Literal["isolated", "not isolated", "can't tell"]


@dataclass(frozen=True)
class IsolationCheck:
    """One check of the test: one pattern of requests."""

    name: str
    asked: int
    wrong: int
    """The number of answers from a wrong model."""
    worst: float
    """The largest shortfall, in nats."""


@dataclass(frozen=True)
class IsolationTest:
    """A run of the test, and its result."""

    verdict: IsolationVerdict
    subject: str
    """The SHA-256 of everything the result depends on; an equal subject need not be tested again."""
    engine: str
    device: str
    """The GPU's name, or the kind of processor."""
    base: str
    """The base's digest."""
    adapters: tuple[str, ...]
    """The digests of all adapters that were loaded together."""
    versions: dict[str, str]
    """Versions of packages; those of the engine's environment as ``vllm:torch``."""
    tolerance: float
    """The most nats by which a correct token may be less likely than the reference's choice."""
    checks: tuple[IsolationCheck, ...]
    alike: tuple[tuple[str, str], ...]
    """Pairs of models, by name, that no prompt distinguishes."""
    reasons: tuple[str, ...]
    """The reasons why the result is "not isolated" or "can't tell"."""
    tested: str
    """The time of the end, as ISO 8601 in UTC."""
    seconds: float

    @property
    def summary(self) -> str:
        """The result in a few words."""
        return f"{self.verdict} on {self.engine}"

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> IsolationTest:
        """Return the test that the state has stored as JSON."""
        lists = {
            "adapters": tuple(stored["adapters"]),
            "checks": tuple(IsolationCheck(**check) for check in stored["checks"]),
            "alike": tuple((one, other) for one, other in stored["alike"]),
            "reasons": tuple(stored["reasons"]),
        }
        return cls(**{**stored, **lists})
