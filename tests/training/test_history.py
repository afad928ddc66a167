"""Choice of the kept adapter, early stopping and overfitting warnings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.training.history import (
    Evaluation,
    best_evaluation,
    evaluations,
    evaluations_to_keep,
    overfitting,
    patience_exceeded,
)


def _evaluation(step: int, dev_loss: float, metric: float | None = None, train_loss: float = 1.0) -> Evaluation:
    return Evaluation(step, step / 10, dev_loss, metric, train_loss)


def _steps(*dev: tuple[float, float | None]) -> list[Evaluation]:
    return [_evaluation(10 * (n + 1), loss, metric) for n, (loss, metric) in enumerate(dev)]


@pytest.mark.parametrize(
    ("dev", "best"),
    [
        ([(0.5, 0.6), (0.9, 0.8), (0.7, 0.7)], 20),  # the metric, whatever the loss says
        ([(0.5, 0.8), (0.4, 0.8), (0.6, 0.8)], 20),  # the loss breaks a tie
        ([(0.4, 0.8), (0.4, 0.8)], 10),  # then the earlier
        ([(0.5, None), (0.3, None), (0.4, None)], 20),  # no answers: the loss alone
    ],
)
def test_best_evaluation_is_by_metric_then_loss_then_earliest(dev: list[tuple[float, float | None]], best: int) -> None:
    assert best_evaluation(_steps(*dev)).step == best


scores = st.tuples(st.sampled_from([0.1, 0.2, 0.3]), st.sampled_from([0.0, 0.5, 1.0]))


@given(st.lists(scores, min_size=1, max_size=8), st.integers(1, 4))
def test_patience_counts_evaluations_since_the_best_so_far(dev: list[tuple[float, float]], patience: int) -> None:
    """Against a loop that keeps count as the evaluations come in."""
    best, waited = (-1.0, 0.0), 0
    for loss, metric in dev:
        better = (metric, -loss) > best
        best, waited = ((metric, -loss), 0) if better else (best, waited + 1)
    assert patience_exceeded(_steps(*dev), patience) == (waited >= patience)
    assert not patience_exceeded(_steps(*dev), None)


@given(st.lists(scores, min_size=1, max_size=30))
def test_selection_keeps_at_most_nine_adapters(
    dev: list[tuple[float, float]],
) -> None:
    evaluated = _steps(*dev)
    there: set[int] = set()
    for count in range(1, len(evaluated) + 1):
        there.add(evaluated[count - 1].step)
        kept = {e.step for e in evaluations_to_keep(evaluated[:count])}
        assert kept <= there
        there = kept
        assert len(kept) <= 9
    ranked = sorted(evaluated, key=lambda e: (-e.rank[0], -e.rank[1], e.step))
    assert there == {e.step for e in ranked[:8]} | {evaluated[-1].step}


def _curves(dev: list[float], train: list[float]) -> list[Evaluation]:
    pairs = enumerate(zip(dev, train, strict=True))
    return [_evaluation(10 * (n + 1), d, None, t) for n, (d, t) in pairs]


def test_overfitting_warns_after_two_dev_rises_while_training_falls() -> None:
    message = overfitting(_curves([0.9, 0.6, 0.7, 0.8], [1.0, 0.5, 0.3, 0.1]))
    assert message is not None
    assert "the dev loss has risen for 2 evaluations (0.600 → 0.700 → 0.800)" in message
    assert "training loss kept falling (0.500 → 0.300 → 0.100)" in message
    assert "epoch 2 (step 20)" in message


@pytest.mark.parametrize(
    ("dev", "train"),
    [
        ([0.6, 0.7], [0.5, 0.3]),  # one rise may be noise
        ([0.6, 0.7, 0.65], [0.5, 0.3, 0.2]),  # it fell again
        ([0.6, 0.7, 0.8], [0.5, 0.6, 0.7]),  # both rise: that is no overfitting but a run going wrong
        ([0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6]),
    ],
)
def test_overfitting_warns_of_nothing_else(dev: list[float], train: list[float]) -> None:
    assert overfitting(_curves(dev, train)) is None


def test_evaluation_has_the_mean_training_loss_since_the_previous_one() -> None:
    history: list[dict[str, Any]] = [
        {"step": 1, "epoch": 0.5, "loss": 4.0},
        {"step": 2, "epoch": 1.0, "loss": 2.0},
        {"step": 2, "epoch": 1.0, "eval_loss": 2.5, "eval_metric": 0.25},
        {"step": 3, "epoch": 1.5, "loss": 1.0},
        {"step": 3, "epoch": 1.5, "eval_loss": 2.0},
    ]
    assert evaluations(history) == [Evaluation(2, 1.0, 2.5, 0.25, 3.0), Evaluation(3, 1.5, 2.0, None, 1.0)]


def test_training_loss_is_that_of_the_pairs_with_replay() -> None:
    history: list[dict[str, Any]] = [
        {"step": 1, "epoch": 0.2, "loss": 2.0, "pair_loss": 4.0, "replay_kl": 0.0},
        {"step": 2, "epoch": 0.4, "loss": 0.5, "replay_kl": 0.5},  # of replayed rows alone
        {"step": 3, "epoch": 0.6, "loss": 3.0, "pair_loss": 3.0},  # of pairs alone
        {"step": 3, "epoch": 0.6, "eval_loss": 2.5},
        {"step": 4, "epoch": 0.8, "loss": 0.5, "replay_loss": 0.5},
        {"step": 4, "epoch": 0.8, "eval_loss": 2.0},
    ]
    assert [e.train_loss for e in evaluations(history)] == [3.5, None]
