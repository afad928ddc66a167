"""Who asks when, and what came of it: the arithmetic of the load benchmarks, which never looks at a clock itself.

Arrivals do not wait for answers (an open loop): a client that waits asks less of a server that is slow, and its slowest
answers are then missing among the waits (Tene's "coordinated omission"). So a wait counts from when a request was due.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Ask:
    """A request that is due."""

    at: float
    """Seconds from the beginning."""
    tenant: int


@dataclass(frozen=True)
class Answer:
    """What one request came to; all times in seconds from the beginning."""

    tenant: int
    due: float
    tokens: tuple[float, ...]
    """When each piece of the answer came."""
    end: float
    text: str = ""
    digest: str = ""
    """Of the adapter that is said to have answered."""
    status: int = 200
    counted: int = 0
    """The answer's tokens, as the server counts them."""

    @property
    def first(self) -> float:
        """The wait for the first token."""
        return (self.tokens[0] if self.tokens else self.end) - self.due

    @property
    def whole(self) -> float:
        """The wait for the whole answer."""
        return self.end - self.due

    @property
    def between(self) -> list[float]:
        """The waits between tokens."""
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass(frozen=True)
class Bounds:
    """How long the waits of a good answer may be, in seconds."""

    first: float
    between: float

    def met(self, answer: Answer) -> bool:
        """Whether the answer came in time: its first token, and the others on average."""
        gaps = answer.between
        return (
            answer.status == 200 and answer.first <= self.first and (not gaps or float(np.mean(gaps)) <= self.between)
        )


@dataclass(frozen=True)
class Waits:
    """One tenant's, or everybody's."""

    asked: int
    answered: int
    good: int
    first: list[float] = field(repr=False)
    between: list[float] = field(repr=False)
    whole: list[float] = field(repr=False)

    @classmethod
    def of(cls, answers: Iterable[Answer], bounds: Bounds | None = None) -> Waits:
        """Of the answers that came; those that did not count as asked."""
        every = list(answers)
        came = [answer for answer in every if answer.status == 200]
        return cls(
            len(every),
            len(came),
            sum(bounds.met(answer) for answer in came) if bounds else len(came),
            [answer.first for answer in came],
            [gap for answer in came for gap in answer.between],
            [answer.whole for answer in came],
        )

    def told(self) -> dict[str, float | None]:
        """Medians and 99th percentiles, in seconds; None where there is nothing."""
        lists = {"first": self.first, "between": self.between, "whole": self.whole}
        return {f"{name}_p{p}": percentile(values, p) for name, values in lists.items() for p in (50, 99)}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """numpy's, to the millisecond's tenth; None of nothing."""
    return round(float(np.percentile(values, percent)), 4) if values else None


def zipf_shares(tenants: int, exponent: float) -> np.ndarray:
    """The share of the requests that each tenant makes [tenants]: the k-th's is as 1 / k ** exponent."""
    weights = 1.0 / np.arange(1, tenants + 1) ** exponent
    shares: np.ndarray = weights / weights.sum()
    return shares


def poisson(rate: float, seconds: float, shares: Sequence[float] | np.ndarray, seed: int) -> list[Ask]:
    """Requests at random moments, ``rate`` a second on average, each of a tenant drawn by its share."""
    draw = np.random.default_rng(seed)
    asks, at = [], float(draw.exponential(1 / rate))
    while at < seconds:
        asks.append(Ask(at, int(draw.choice(len(shares), p=shares))))
        at += float(draw.exponential(1 / rate))
    return asks


def burst(count: int, shares: Sequence[float] | np.ndarray, seed: int, rate: float | None = None) -> list[Ask]:
    """So many requests, of tenants drawn by their shares: all at once, or at random moments, ``rate`` a second."""
    draw = np.random.default_rng(seed)
    tenants = draw.choice(len(shares), size=count, p=shares)
    times = np.zeros(count) if rate is None else np.cumsum(draw.exponential(1 / rate, size=count))
    return [Ask(float(at), int(tenant)) for at, tenant in zip(times, tenants, strict=True)]


def jain(served: Iterable[float]) -> float:
    """Jain's index of fairness (Jain, Chiu & Hawe 1984): 1 if all are served alike, 1/n if one of n has all."""
    values = np.asarray(list(served), dtype=float)
    assert len(values)
    total = values.sum()
    return float(total**2 / (len(values) * (values**2).sum())) if total else 1.0


def by_tenant(answers: Iterable[Answer]) -> dict[int, list[Answer]]:
    """Each tenant's answers."""
    found: dict[int, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.tenant, []).append(answer)
    return dict(sorted(found.items()))


def goodput_fairness(waits: Mapping[int, Waits]) -> float:
    """Jain's index over the share of its requests that each tenant got answered in time."""
    return jain(one.good / one.asked for one in waits.values())
