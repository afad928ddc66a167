"""Distances of artifacts from the trained model, against numpy and scipy; and their limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy

from tunewright.gate.answers import TopTokens, distance
from tunewright.gate.prompts import places
from tunewright.gate.results import LIMITS, Figures, shortcomings


def _distributions(seed: int, spread: float = 2.0) -> Any:
    return log_softmax(np.random.default_rng(seed).normal(scale=spread, size=(5, 300)), axis=1)


def test_distance_equals_that_of_scipy() -> None:
    ours, theirs = _distributions(0), _distributions(1)
    found = distance(torch.tensor(ours), torch.tensor(theirs))
    np.testing.assert_allclose(found.kl.numpy(), entropy(np.exp(ours), np.exp(theirs), axis=1), rtol=1e-9)
    top = np.argsort(-ours, axis=1)[:, :100]
    moved = np.abs(np.take_along_axis(ours, top, 1) - np.take_along_axis(theirs, top, 1)).max(axis=1)
    np.testing.assert_allclose(found.max_logit.numpy(), moved)
    assert found.same_top.tolist() == (ours.argmax(1) == theirs.argmax(1)).tolist()


@pytest.mark.parametrize("listed", [150, 300])
def test_distance_counts_only_the_sum_of_unlisted_tokens(listed: int) -> None:
    ours, theirs = _distributions(0), _distributions(0) + 0.3 * _distributions(2, 0.2)
    theirs = log_softmax(theirs, axis=1)
    seen, wanted = [], []
    for p, q in zip(np.exp(ours), np.exp(theirs), strict=True):
        top = np.argsort(-q)[:listed]
        seen.append(TopTokens(torch.tensor(top.copy()), torch.tensor(np.log(q[top]))))
        grouped = [np.append(d[top], max(1 - d[top].sum(), 0)) for d in (p, q)]
        wanted.append(entropy(*grouped) if listed < 300 else entropy(p, q))
    found = distance(torch.tensor(ours), seen)
    np.testing.assert_allclose(found.kl.numpy(), wanted, rtol=1e-6)
    whole = distance(torch.tensor(ours), torch.tensor(theirs))
    assert (found.kl <= whole.kl + 1e-12).all()
    torch.testing.assert_close(found.max_logit, whole.max_logit)


def test_distance_bounds_an_unlisted_likely_token() -> None:
    ours = torch.tensor(_distributions(0)[:1])
    order = ours[0].argsort(descending=True)
    seen = TopTokens(order[1:200], ours[0][order[1:200]])
    found = distance(ours, [seen])
    assert float(found.max_logit) == pytest.approx(float(ours[0][order[0]] - ours[0][order[199]]))
    assert not found.same_top.item()


def test_places_spread_from_the_first_token_to_the_end() -> None:
    assert places(3, ended=True) == [0, 1, 2, 3]
    assert places(3, ended=False) == [0, 1, 2]
    assert places(0, ended=True) == [0]
    many = places(100, ended=True)
    assert len(many) == 8
    assert (many[0], many[-1]) == (0, 100)


GOOD: dict[str, Any] = {
    "prompts": 32,
    "places": 256,
    "arithmetic": "float32",
    "max_logit": 0.1,
    "kl": 1e-4,
    "effect": 0.5,
    "lost": 2e-4,
    "from_base": 0.5,
    "top1": 1.0,
    "greedy": 1.0,
    "metric": "exact_match",
    "score": 0.8,
    "trained_score": 0.8,
    "rendered": 32,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"kl": 0.5, "lost": 1.0, "from_base": 0.0}, "it is the base"),
        ({"kl": 0.05, "lost": 0.2}, "lost 20.0% of the adapter's effect"),
        ({"effect": 1e-5, "lost": 0.0}, "the adapter has no effect"),
        ({"kl": 0.2, "lost": 0.01, "effect": 20.0}, "mean KL 0.2 nats"),
        ({"max_logit": 9.0}, "a log-probability moved by 9.00"),
        ({"top1": 0.5}, "the likeliest token is the same at 50.0%"),
        ({"greedy": 0.5}, "50.0% of the greedy answers"),
        ({"score": 0.5}, "it scores 50.0% where the trained model scores 80.0%"),
        ({"rendered": 31}, "renders 1 of 32 prompts to other tokens"),
    ],
)
def test_shortcomings_reports_each_figure_alone(changes: dict[str, Any], message: str | None) -> None:
    for limits in LIMITS.values():
        found = shortcomings(Figures(**(GOOD | changes)), limits)
        if message is None:
            assert found == []
        else:
            assert any(message in fault for fault in found), found
            assert len(found) == (2 if changes.get("kl", 0) > limits.kl and changes.get("lost", 0) > limits.lost else 1)


def test_shortcomings_tolerates_two_differences() -> None:
    few = GOOD | {"prompts": 5, "rendered": 5, "places": 20}
    for same in ({"top1": 0.9}, {"greedy": 0.6}):
        assert shortcomings(Figures(**(few | same)), LIMITS["16-bit"]) == []
    for same in ({"top1": 0.85}, {"greedy": 0.4}):
        assert len(shortcomings(Figures(**(few | same)), LIMITS["16-bit"])) == 1
