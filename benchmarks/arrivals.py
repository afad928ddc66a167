"""Arrival times, waits and fairness: the arithmetic of the load benchmarks, which never reads a clock itself.

Arrivals do not wait for answers (an open loop). A client that waits sends less to a slow server, so the slowest answers
are missing among the waits (Tene's "coordinated omission"). A wait therefore counts from the time a request was due.
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
    """The outcome of one request; all times in seconds from the beginning."""

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
    """Longest acceptable waits of an answer, in seconds."""

    first: float
    between: float

    def met(self, answer: Answer) -> bool:
        """True if the first token and the average wait between the others are within the bounds."""
        gaps = answer.between
        return (
            answer.status == 200 and answer.first <= self.first and (not gaps or float(np.mean(gaps)) <= self.between)
        )


@dataclass(frozen=True)
class Waits:
    """The waits of one tenant, or of all."""

    asked: int
    answered: int
    good: int
    first: list[float] = field(repr=False)
    between: list[float] = field(repr=False)
    whole: list[float] = field(repr=False)

    @classmethod
    def of(cls, answers: Iterable[Answer], bounds: Bounds | None = None) -> Waits:
        """Return the waits of completed answers; failed requests count as asked only."""
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

    def summary(self) -> dict[str, float | None]:
        """Return medians and 99th percentiles in seconds; None without values."""
        lists = {"first": self.first, "between": self.between, "whole": self.whole}
        return {f"{name}_p{p}": percentile(values, p) for name, values in lists.items() for p in (50, 99)}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return numpy's percentile, to a tenth of a millisecond; None without values."""
    return round(float(np.percentile(values, percent)), 4) if values else None


def zipf_shares(tenants: int, exponent: float) -> np.ndarray:
    """Return each tenant's share of the requests [tenants]: proportional to 1 / k ** exponent for the k-th."""
    weights = 1.0 / np.arange(1, tenants + 1) ** exponent
    shares: np.ndarray = weights / weights.sum()
    return shares


def poisson(rate: float, seconds: float, shares: Sequence[float] | np.ndarray, seed: int) -> list[Ask]:
    """Return Poisson arrivals at ``rate`` per second, each of a tenant drawn by its share."""
    draw = np.random.default_rng(seed)
    asks, at = [], float(draw.exponential(1 / rate))
    while at < seconds:
        asks.append(Ask(at, int(draw.choice(len(shares), p=shares))))
        at += float(draw.exponential(1 / rate))
    return asks


def burst(count: int, shares: Sequence[float] | np.ndarray, seed: int, rate: float | None = None) -> list[Ask]:
    """Return ``count`` requests of tenants drawn by their shares: at once, or Poisson arrivals at ``rate``."""
    draw = np.random.default_rng(seed)
    tenants = draw.choice(len(shares), size=count, p=shares)
    times = np.zeros(count) if rate is None else np.cumsum(draw.exponential(1 / rate, size=count))
    return [Ask(float(at), int(tenant)) for at, tenant in zip(times, tenants, strict=True)]


def jain(served: Iterable[float]) -> float:
    """Return Jain's index of fairness (Jain, Chiu & Hawe 1984): 1 if all are equal, 1/n if one of n gets all."""
    values = np.asarray(list(served), dtype=float)
    assert len(values)
    total = values.sum()
    return float(total**2 / (len(values) * (values**2).sum())) if total else 1.0


def by_tenant(answers: Iterable[Answer]) -> dict[int, list[Answer]]:
    """Group the answers by tenant."""
    found: dict[int, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.tenant, []).append(answer)
    return dict(sorted(found.items()))


def goodput_fairness(waits: Mapping[int, Waits]) -> float:
    """Return Jain's index over each tenant's share of requests answered in time."""
    return jain(one.good / one.asked for one in waits.values())
