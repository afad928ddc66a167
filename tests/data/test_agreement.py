"""Cohen's kappa against scikit-learn's, its interval against the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from tunewright.data.review.report import agreement

PAIR = ("ada", "ben")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_kappa_matches_scikit_learn(verdicts: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in verdicts], [b for _, b in verdicts]
    found = agreement(PAIR, first, second)
    assert (found.rows, found.agreed) == (len(verdicts), sum(a == b for a, b in verdicts))
    if found.kappa is None:
        assert len({*first, *second}) == 1
    else:
        assert found.kappa == pytest.approx(cohen_kappa_score(first, second))
    if found.low is not None and found.high is not None and found.kappa is not None:
        assert -1 <= found.low <= found.kappa <= found.high <= 1


def test_kappa_interval_is_close_to_the_bootstrap() -> None:
    draw = np.random.default_rng(0)
    first = draw.random(400) < 0.8
    second = np.where(draw.random(400) < 0.9, first, ~first)
    found = agreement(PAIR, first.tolist(), second.tolist())
    picks = draw.integers(0, 400, size=(2000, 400))
    low, high = np.quantile([cohen_kappa_score(first[p], second[p]) for p in picks], [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_kappa_interval_is_undefined_when_reviewers_agree_on_everything() -> None:
    all_same = agreement(PAIR, [True, False, True], [True, False, True])
    assert all_same.kappa == pytest.approx(1)
    assert all_same.low is None
    assert "interval" not in str(all_same)
    one_kind = agreement(PAIR, [True] * 5, [True] * 5)
    assert one_kind.kappa is None
    assert "ada and ben agree on 5 of 5 rows; kappa is undefined" in str(one_kind)
