"""What the isolation test found before a release went live, as it is kept with the release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

IsolationVerdict = Literal["isolated", "not isolated", "can't tell"]


@dataclass(frozen=True)
class IsolationCheck:
    """One of the ways in which the engine was asked."""

    name: str
    asked: int
    wrong: int
    """Answers that were not those of the model that was asked."""
    worst: float
    """The largest shortfall, in nats."""


@dataclass(frozen=True)
class IsolationTest:
    """A run of the test: on what, by what, when, and what it found."""

    verdict: IsolationVerdict
    subject: str
    """SHA-256 of all that the result depends on: whoever has the same need not be tested again."""
    engine: str
    device: str
    """What computed: a GPU's name, or the processor's kind."""
    base: str
    """The base's digest."""
    adapters: tuple[str, ...]
    """Digests of all that were in the engine together."""
    versions: dict[str, str]
    """Of packages, the engine's own as ``vllm:torch``."""
    tolerance: float
    """Nats that a right answer's token may fall short of the oracle's likeliest one."""
    checks: tuple[IsolationCheck, ...]
    alike: tuple[tuple[str, str], ...]
    """Pairs of models, by what people call them, that no prompt told apart."""
    reasons: tuple[str, ...]
    """Why it is not isolated, or cannot be told, in words."""
    tested: str
    """When it ended; UTC, ISO 8601."""
    seconds: float

    @property
    def told(self) -> str:
        """The result in a few words."""
        return f"{self.verdict} on {self.engine}"

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> IsolationTest:
        """Return what the state keeps of one."""
        lists = {
            "adapters": tuple(kept["adapters"]),
            "checks": tuple(IsolationCheck(**check) for check in kept["checks"]),
            "alike": tuple((one, other) for one, other in kept["alike"]),
            "reasons": tuple(kept["reasons"]),
        }
        return cls(**{**kept, **lists})
