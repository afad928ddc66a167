"""The arithmetic of the load benchmarks, against figures computed by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from arrivals import Answer, Bounds, Waits, burst, by_tenant, goodput_fairness, jain, poisson, zipf_shares


def test_zipf_shares_by_hand() -> None:
    assert zipf_shares(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf_shares(4, 0.0) == pytest.approx([0.25] * 4)
    assert zipf_shares(2, 2.0) == pytest.approx([0.8, 0.2])


def test_arrivals_are_poisson() -> None:
    asks = poisson(5.0, 2000.0, [1.0], seed=1)
    assert len(asks) == pytest.approx(10_000, abs=4 * 100)  # four standard deviations
    gaps = np.diff([0.0, *(ask.at for ask in asks)])
    assert stats.kstest(gaps, "expon", args=(0, 1 / 5)).pvalue > 0.001
    assert asks == poisson(5.0, 2000.0, [1.0], seed=1)
    assert asks != poisson(5.0, 2000.0, [1.0], seed=2)


@pytest.mark.parametrize("how", ["poisson", "burst"])
def test_tenants_send_requests_by_their_shares(how: str) -> None:
    shares = zipf_shares(8, 1.0)
    asks = poisson(5.0, 2000.0, shares, 3) if how == "poisson" else burst(10_000, shares, 3)
    counts = np.bincount([ask.tenant for ask in asks], minlength=8)
    assert stats.chisquare(counts, shares * counts.sum()).pvalue > 0.001


def test_jain_by_hand() -> None:
    assert jain([5.0, 5.0, 5.0]) == 1.0
    assert jain([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain([1.0, 2.0, 3.0]) == pytest.approx(36 / 42)
    assert jain([0.0, 0.0]) == 1.0


@given(st.lists(st.floats(0.01, 1000.0), min_size=1, max_size=30), st.floats(0.1, 10.0))
def test_jain_is_between_one_nth_and_one_in_any_unit(values: list[float], unit: float) -> None:
    assert 1 / len(values) - 1e-9 <= jain(values) <= 1 + 1e-9
    assert jain(value * unit for value in values) == pytest.approx(jain(values))


def test_waits_count_from_the_due_time() -> None:
    answer = Answer(0, due=10.0, tokens=(10.5, 10.7, 11.1), end=11.2)
    assert answer.first == pytest.approx(0.5)
    assert answer.between == pytest.approx([0.2, 0.4])
    assert answer.whole == pytest.approx(1.2)
    assert Answer(0, due=1.0, tokens=(), end=3.0).first == 2.0


def test_waits_count_late_and_missing_answers() -> None:
    bounds = Bounds(first=0.5, between=0.3)
    answers = [
        Answer(0, 0.0, (0.5, 0.75), 0.75),
        Answer(0, 0.0, (0.6, 0.7), 0.7),  # the first too late
        Answer(1, 0.0, (0.1, 0.6), 0.6),  # the second too late
        Answer(1, 0.0, (0.1, 0.2, 0.7), 0.7),  # in time on average
        Answer(1, 0.0, (), 0.1, status=429),
    ]
    waits = {tenant: Waits.of(own, bounds) for tenant, own in by_tenant(answers).items()}
    assert [(one.asked, one.answered, one.good) for one in waits.values()] == [(2, 2, 1), (3, 2, 1)]
    assert waits[0].summary()["first_p50"] == pytest.approx(0.55)
    assert waits[1].summary()["between_p99"] == pytest.approx(np.percentile([0.5, 0.1, 0.5], 99), abs=1e-3)
    # 1/2 and 1/3: (5/6)^2 / (2 * (1/4 + 1/9))
    assert goodput_fairness(waits) == pytest.approx((25 / 36) / (2 * 13 / 36))
    assert Waits.of([]).summary()["whole_p99"] is None
