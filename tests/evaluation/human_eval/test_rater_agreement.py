"""Cohen's kappa against scikit-learn, and its interval against resampling the plain way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from tunewright.evaluation.human_eval.results import agreement

SAID = st.sampled_from((-1, 0, 1))


@given(st.lists(st.tuples(SAID, SAID), min_size=2, max_size=60))
def test_kappa_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = agreement(("a", "b"), first, second, [str(i) for i in range(len(pairs))], 0, resamples=50)
    assert found.agreed == sum(a == b for a, b in pairs)
    if len({*first, *second}) == 1:
        assert found.kappa is None
    else:
        assert found.kappa == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_agreement_interval_resamples_clusters() -> None:
    rng = np.random.default_rng(4)
    first = rng.integers(-1, 2, 60)
    second = np.where(rng.random(60) < 0.7, first, rng.integers(-1, 2, 60))
    clusters = np.arange(60) // 3
    found = agreement(("a", "b"), first.tolist(), second.tolist(), [f"c{c:02}" for c in clusters], 0)
    drawn = []
    for _ in range(1200):
        rows = np.concatenate([np.flatnonzero(clusters == c) for c in rng.integers(20, size=20)])
        drawn.append(cohen_kappa_score(first[rows], second[rows]))
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx(
        tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02
    )


def test_agreement_has_no_interval_when_raters_always_agree() -> None:
    found = agreement(("a", "b"), [1, 0, -1], [1, 0, -1], ["x", "y", "z"], 0)
    assert (found.kappa, found.interval) == (1, None)
