"""The arithmetic of the load benchmarks, against figures computed by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from arrivals import Answer, Bounds, Waits, burst, by_tenant, goodput_fairness, jain, poisson, zipf_shares


def test_zipf_shares_by_hand() -> None:
    assert zipf_shares(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf_shares(4, 0.0) == pytest.approx([0.25] * 4)


def test_arrivals_are_poisson_and_follow_the_shares() -> None:
    shares = zipf_shares(8, 1.0)
    asks = poisson(5.0, 2000.0, shares, seed=1)
    gaps = np.diff([0.0, *(ask.at for ask in asks)])
    assert stats.kstest(gaps, "expon", args=(0, 1 / 5)).pvalue > 0.001
    for sent in (asks, burst(10_000, shares, seed=3)):
        counts = np.bincount([ask.tenant for ask in sent], minlength=8)
        assert stats.chisquare(counts, shares * counts.sum()).pvalue > 0.001


def test_jain_by_hand() -> None:
    assert jain([5.0, 5.0, 5.0]) == jain([0.0, 0.0]) == 1.0
    assert jain([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain([1.0, 2.0, 3.0]) == pytest.approx(36 / 42)


def test_waits_count_from_the_due_time() -> None:
    answer = Answer(0, due=10.0, tokens=(10.5, 10.7, 11.1), end=11.2)
    assert (answer.first, answer.whole) == pytest.approx((0.5, 1.2))
    assert answer.between == pytest.approx([0.2, 0.4])
    assert Answer(0, due=1.0, tokens=(), end=3.0).first == 2.0


def test_waits_count_late_and_missing_answers() -> None:
    answers = [
        Answer(0, 0.0, (0.5, 0.75), 0.75),
        Answer(0, 0.0, (0.6, 0.7), 0.7),  # the first too late
        Answer(1, 0.0, (0.1, 0.6), 0.6),  # the second too late
        Answer(1, 0.0, (0.1, 0.2, 0.7), 0.7),  # in time on average
        Answer(1, 0.0, (), 0.1, status=429),
    ]
    bounds = Bounds(first=0.5, between=0.3)
    waits = {tenant: Waits.of(own, bounds) for tenant, own in by_tenant(answers).items()}
    assert [(one.asked, one.answered, one.good) for one in waits.values()] == [(2, 2, 1), (3, 2, 1)]
    assert waits[0].summary()["first_p50"] == pytest.approx(0.55)
    # 1/2 and 1/3: (5/6)^2 / (2 * (1/4 + 1/9))
    assert goodput_fairness(waits) == pytest.approx((25 / 36) / (2 * 13 / 36))
