"""The order of training rows, and what sharing prompts is said to save in it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.training.order import DEEP, LikeLengths, deep_families
from tunewright.training.sharing import measure_sharing


def _rows(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    luck = random.Random(seed)
    return [[1, 2, *(luck.randrange(3, 99) for _ in range(luck.randrange(1, longest)))] for _ in range(count)]


@given(st.integers(1, 200), st.integers(1, 17), st.integers(0, 5), st.integers(0, 3))
def test_each_epoch_has_every_row_once(count: int, batch_size: int, seed: int, epoch: int) -> None:
    order = LikeLengths(_rows(count), batch_size, seed)
    order.set_epoch(epoch)
    assert sorted(order) == list(range(count))


def test_seed_and_epoch_alone_decide_the_order() -> None:
    rows = _rows(100)
    first, again, other = LikeLengths(rows, 8, 1), LikeLengths(rows, 8, 1), LikeLengths(rows, 8, 2)
    random.seed(7)
    epochs = []
    for epoch in range(3):
        for each in (first, again, other):
            each.set_epoch(epoch)
        assert list(first) == list(again)
        assert list(first) != list(other)
        epochs.append(list(first))
    assert epochs[0] != epochs[1] != epochs[2]
    again.set_epoch(1)
    assert list(again) == epochs[1]


def test_a_batch_s_rows_are_of_like_length_and_batches_come_in_no_order_of_length() -> None:
    rows = _rows(640)
    order = list(LikeLengths(rows, 16, 0))
    batches = [[len(rows[row]) for row in order[start : start + 16]] for start in range(0, 640, 16)]
    spread = [max(lengths) - min(lengths) for lengths in batches]
    assert sum(spread) / len(spread) < 10  # of lengths from 3 to 61
    longest = [max(lengths) for lengths in batches]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_rows_of_one_document_come_to_a_batch_a_few_at_a_time() -> None:
    luck = random.Random(0)
    rows = []
    for _ in range(20):
        document = [luck.randrange(3, 99) for _ in range(DEEP + 10)]
        rows += [[1, 2, *document, *(luck.randrange(3, 99) for _ in range(6))] for _ in range(8)]
    luck.shuffle(rows)
    families = deep_families(rows)
    assert sorted(map(len, families)) == [8] * 20
    of = {row: number for number, family in enumerate(families) for row in family}
    order = list(LikeLengths(rows, 16, 0))
    batches = [[of[row] for row in order[start : start + 16]] for start in range(0, 160, 16)]
    for batch in batches:
        assert 1 < len(set(batch)) <= 4  # four rows of a document at a time; two such fours may meet


def test_a_shared_instruction_makes_no_family() -> None:
    rows = [[*range(200), 300 + place] for place in range(9)]
    assert all(len(family) == 1 for family in deep_families(rows))


@pytest.mark.parametrize(
    ("change", "share", "reason"),
    [
        ({}, True, "2.7 times fewer tokens"),
        ({"setting": "off"}, False, "2.7 times fewer tokens"),
        ({"dropout": 0.1}, False, "dropout"),
        ({"dropout": 0.1, "setting": "on"}, True, "2.7 times fewer tokens"),
        ({"rows": [[place, *range(30)] for place in range(64)]}, False, "next to none"),
        ({"rows": [[place, *range(30)] for place in range(64)], "setting": "on"}, True, "1.0 times fewer tokens"),
    ],
)
def test_prompts_are_shared_where_that_saves_tokens_and_what_is_decided_is_said(
    change: dict[str, Any], share: bool, reason: str
) -> None:
    rows = [[*range(200), *range(300 + place, 400 + place)] for place in range(64)]
    settings = {"rows": rows, "setting": "auto", "dropout": 0.0, "micro_batch": 16, "batch_size": 32, "seed": 0}
    decided = measure_sharing(**{**settings, **change})
    assert decided.share is share
    assert reason in decided.reason
    # 300 tokens a row, of which 200 once for each 16.
    if "rows" not in change:
        assert decided.ratio == pytest.approx(300 / (100 + 200 / 16))
