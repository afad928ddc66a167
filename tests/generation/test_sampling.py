"""Batched sampling against scipy's chi-squared, transformers' own top-p, and a full sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import TopPLogitsWarper

from making.property_examples import examples
from tunewright.generation import sampling
from tunewright.generation.requests import Request, Row
from tunewright.generation.sampling import draw, next_tokens, nucleus


def _row(seed: int, **how: Any) -> Row:
    return Row(Request((1,), None, 100, seed=seed, **{"temperature": 1.0, **how}))


def _logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.75), (1.6, 0.9)])
def test_next_tokens_follow_the_model_s_distribution(temperature: float, top_p: float) -> None:
    logits = _logits(1, 40, spread=1.5)
    rows = [_row(seed, temperature=temperature, top_p=top_p) for seed in range(200)]
    draws = torch.tensor([next_tokens(logits.expand(200, -1), rows) for _ in range(50)]).flatten()
    expected = TopPLogitsWarper(top_p)(None, logits.double() / temperature).softmax(-1)[0]
    counts = draws.bincount(minlength=40)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    # Fixed seeds: the same number each time. A tenth of a percent would be a reason to look closer.
    assert chisquare(counts[kept], expected[kept] * len(draws)).pvalue > 0.001


@examples(60)
@given(
    seed=st.integers(0, 2**31), top_p=st.floats(0.01, 0.999), spread=st.sampled_from([0.1, 1.0, 5.0]),
    prefilter=st.integers(1, 300),
)  # fmt: skip
def test_nucleus_equals_that_of_transformers_with_any_sufficient_prefilter(
    seed: int, top_p: float, spread: float, prefilter: int
) -> None:
    logits = _logits(3, 200, seed, spread).double()
    top_ps = torch.full((3, 1), top_p, dtype=torch.float64)
    expected = TopPLogitsWarper(top_p)(None, logits) > -torch.inf
    kept, whole = nucleus(logits.softmax(-1), top_ps, prefilter)
    assert torch.equal(kept[whole], expected[whole])
    # It knows when it has not looked far enough.
    assert torch.equal(whole, (expected.sum(-1) <= prefilter) | (prefilter >= 200))


def test_nucleus_keeps_the_lowest_ids_of_a_tie() -> None:
    probabilities = torch.tensor([[0.1, 0.2, 0.1, 0.3, 0.1, 0.1, 0.1]], dtype=torch.float64)
    for prefilter in (5, 7):
        kept, whole = nucleus(probabilities, torch.tensor([[0.65]]).double(), prefilter)
        assert kept.tolist() == [[True, True, True, True, False, False, False]]
        assert whole.tolist() == [True]


@pytest.mark.parametrize("prefilter", [1, 4, 64])
def test_next_tokens_do_not_depend_on_the_prefilter(prefilter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows find their nucleus in it, others do not and are sorted whole."""
    logits = torch.cat([_logits(6, 500, spread=0.2), _logits(6, 500, spread=8.0)])
    settings_of = [{"top_p": p} for p in (0.3, 0.9, 0.99, 1.0, 0.5, 0.95)] * 2

    def answers() -> list[list[int]]:
        rows = [_row(seed, **how) for seed, how in enumerate(settings_of)]
        return [next_tokens(logits, rows) for _ in range(5)]

    monkeypatch.setattr(sampling, "PREFILTER", 500)
    expected = answers()
    monkeypatch.setattr(sampling, "PREFILTER", prefilter)
    assert answers() == expected


@given(order=st.permutations(range(9)), alone=st.integers(0, 8))
@examples(30)
def test_next_tokens_of_a_row_do_not_depend_on_other_rows(order: list[int], alone: int) -> None:
    logits = _logits(9, 3000)
    hows: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_p": 0.9}, {"temperature": 0.5}] * 3

    def drawn(places: list[int]) -> dict[int, list[int]]:
        rows = [_row(place, **hows[place]) for place in places]
        steps = [next_tokens(logits[places], rows) for _ in range(4)]
        return {place: [step[at] for step in steps] for at, place in enumerate(places)}

    together = drawn(order)
    assert together[alone] == drawn([alone])[alone]
    assert together == drawn(list(range(9)))


def test_next_tokens_of_greedy_rows_are_the_likeliest_and_draw_nothing() -> None:
    logits = _logits(4, 100)
    rows = [_row(place, temperature=0.0) for place in range(4)]
    assert next_tokens(logits, rows) == logits.argmax(-1).tolist()
    mixed = [_row(0, temperature=0.0), _row(1), _row(2, temperature=0.0), _row(3)]
    tokens = next_tokens(logits, mixed)
    assert [tokens[0], tokens[2]] == logits.argmax(-1)[[0, 2]].tolist()


def test_draw_never_takes_a_token_of_probability_0() -> None:
    logits = torch.full((2, 8), -torch.inf)
    logits[:, 3] = 0.0
    logits[1, 5] = 1.0
    one = torch.ones(2, 1, dtype=torch.float64)
    for uniform, expected in ((0.0, [3, 3]), (1 - 2**-53, [3, 5])):
        for top_ps in (None, one):
            tokens, _ = draw(logits, one, top_ps, uniform * one, 4)
            assert tokens.tolist() == expected


@pytest.mark.parametrize("settings", [{"top_p": 1.0}, {"top_p": 0.9}, {"temperature": 0.0}])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_next_tokens_are_beyond_the_vocabulary_only_for_a_row_without_finite_logits(
    settings: dict[str, Any], value: float
) -> None:
    logits = _logits(3, 50)
    expected = next_tokens(logits, [_row(place, **settings) for place in range(3)])
    logits[1, 7] = value
    tokens = next_tokens(logits, [_row(place, **settings) for place in range(3)])
    assert [tokens[0], tokens[2]] == [expected[0], expected[2]]
    assert tokens[1] >= 50
