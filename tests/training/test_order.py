"""The order of training rows, and the reported saving of shared prompts in it."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from tunewright.training.packing.order import StepBatches, longest_batch, resolve_sharing


def _rows(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    luck = random.Random(seed)
    return [[1, 2, *(luck.randrange(3, 99) for _ in range(luck.randrange(1, longest)))] for _ in range(count)]


def _steps(rows: list[list[int]], seed: int, epoch: int = 0, step_rows: int = 16) -> list[set[int]]:
    batches = StepBatches(rows, seed, step_rows=step_rows, micro_batch=step_rows)
    batches.set_epoch(epoch)
    return [set(batch) for batch in batches]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    rows = _rows(100)
    before = torch.get_rng_state()
    epochs = [_steps(rows, 1, epoch, 8) for epoch in range(3)]
    assert torch.equal(torch.get_rng_state(), before)
    random.seed(7)
    torch.manual_seed(7)
    assert [_steps(rows, 1, epoch, 8) for epoch in range(3)] == epochs
    assert _steps(rows, 2, 0, 8) != epochs[0]
    assert epochs[0] != epochs[1] != epochs[2]


def test_step_is_a_random_sample_independent_of_lengths_and_prefixes() -> None:
    """Two rows share a step with a probability independent of their lengths and of a shared document."""
    document = [5] * 90
    rows = [
        *([1] * 3 for _ in range(16)),
        *([1, *document, n] for n in range(100, 116)),
        *([1] * 40 for _ in range(16)),
    ]
    kinds = [0] * 16 + [1] * 16 + [2] * 16
    same = drawn = 0
    for seed in range(400):
        for step in _steps(rows, seed, step_rows=4):
            members = [kinds[row] for row in step]
            pairs = list(combinations(members, 2))
            same += sum(a == b for a, b in pairs)
            drawn += len(pairs)
    # Of the 47 other rows, 15 are of the same kind.
    expected = drawn * 15 / 47
    assert chisquare([same, drawn - same], [expected, drawn - expected]).pvalue > 0.01


def test_micro_batches_of_a_step_keep_shared_prefixes_together() -> None:
    luck = random.Random(0)
    documents = [[luck.randrange(3, 99) for _ in range(70)] for _ in range(4)]
    rows = [[1, 2, *documents[n % 4], luck.randrange(3, 99)] for n in range(64)]
    together = 0
    for batch in StepBatches(rows, 0, step_rows=32, micro_batch=4):
        together += len({tuple(rows[row][:72]) for row in batch}) == 1
    assert together >= 8  # of 16; of batches of four random rows one in 64 would be of one document


def test_processes_get_similar_numbers_of_tokens() -> None:
    rows = _rows(256, longest=400)
    shares = [StepBatches(rows, 0, step_rows=64, micro_batch=16, process=rank, processes=4) for rank in range(4)]
    tokens = [sum(len(rows[row]) for batch in share for row in batch) for share in shares]
    assert max(tokens) < 1.1 * min(tokens)


def test_longest_batch_is_the_one_with_most_tokens() -> None:
    rows = [[0] * length for length in (1, 2, 3, 4)]
    assert longest_batch(rows, [[0, 1], [2, 3], [1, 2]]) == [2, 3]


@pytest.mark.parametrize(
    ("change", "share", "reason"),
    [
        ({}, True, "2.7 times fewer tokens"),
        ({"setting": "off"}, False, "2.7 times fewer tokens"),
        ({"dropout": 0.1}, False, "dropout"),
        ({"dropout": 0.1, "setting": "on"}, True, "2.7 times fewer tokens"),
        ({"rows": [[place, *range(30)] for place in range(64)]}, False, "too little in common"),
        ({"rows": [[place, *range(30)] for place in range(64)], "setting": "on"}, True, "1.0 times fewer tokens"),
    ],
)
def test_measure_sharing_shares_when_it_saves_tokens_and_reports_the_reason(
    change: dict[str, Any], share: bool, reason: str
) -> None:
    rows = [[*range(200), *range(300 + place, 400 + place)] for place in range(64)]
    settings = {"rows": rows, "setting": "auto", "dropout": 0.0, "micro_batch": 16, "batch_size": 32, "seed": 0}
    decided = resolve_sharing(**{**settings, **change})
    assert decided.share is share
    assert reason in decided.reason
    # 300 tokens a row, of which 200 once for each 16.
    if "rows" not in change:
        assert decided.ratio == pytest.approx(300 / (100 + 200 / 16))
