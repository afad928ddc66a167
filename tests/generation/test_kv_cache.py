"""Caches with spare columns against transformers' own DynamicCache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from tunewright.generation.kv_cache import SPARE_COLUMNS, merge, new_cache, select

HEADS, SIZE, LAYERS = 2, 4, 3


def _states(rows: int, time: int, seed: int) -> Tensor:
    return torch.randn(rows, HEADS, time, SIZE, generator=torch.Generator().manual_seed(seed))


def _filled(cache: Any, rows: int, times: list[int], seed: int = 0) -> Any:
    """Fill a cache with columns chunk by chunk; the same numbers for the same seed."""
    for piece, time in enumerate(times):
        for layer in range(LAYERS):
            place = 100 * seed + 10 * piece + layer
            cache.update(_states(rows, time, place), _states(rows, time, place + 5), layer)
    return cache


def _contents(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _places(cache: Cache) -> list[int]:
    return [states.untyped_storage().data_ptr() for pair in _contents(cache) for states in pair]


@pytest.mark.parametrize(
    "times", [[1], [5, 1, 1], [1] * (2 * SPARE_COLUMNS + 3), [SPARE_COLUMNS, 1, SPARE_COLUMNS + 1, 1], [3, 200, 1]]
)
def test_new_cache_holds_what_dynamic_cache_holds(times: list[int]) -> None:
    found, expected = _filled(new_cache(), 2, times), _filled(DynamicCache(), 2, times)
    assert found.get_seq_length() == expected.get_seq_length() == sum(times)
    torch.testing.assert_close(_contents(found), _contents(expected), rtol=0, atol=0)


def test_new_cache_is_copied_once_in_as_many_tokens_as_it_has_room_for() -> None:
    cache = _filled(new_cache(), 2, [7])
    places = {tuple(_places(cache))}
    for number in range(1, 3 * SPARE_COLUMNS):
        _filled(cache, 2, [1], seed=number)
        places.add(tuple(_places(cache)))
    assert len(places) == 3


@pytest.mark.parametrize("then", [[], [1, 1]])
def test_select_keeps_rows_and_last_columns_and_can_grow(then: list[int]) -> None:
    cache = _filled(new_cache(), 4, [9, 1])
    before = _contents(cache)
    select(cache, [3, 1], 6)
    for (keys, values), (old_keys, old_values) in zip(_contents(cache), before, strict=True):
        assert torch.equal(keys, old_keys[[3, 1], :, -6:])
        assert torch.equal(values, old_values[[3, 1], :, -6:])
    places = _places(cache)
    _filled(cache, 2, then, seed=1)
    assert cache.get_seq_length() == 6 + len(then)
    assert _places(cache) == places


@pytest.mark.parametrize(("indices", "time"), [([0, 1, 2, 3], 4), ([0, 3, 2], 3), ([2, 0, 1], 1)])
def test_select_stays_in_its_buffers_while_more_than_half_of_them_is_used(indices: list[int], time: int) -> None:
    cache = _filled(new_cache(), 4, [4])
    places = _places(cache)
    expected = [tuple(states[indices, :, 4 - time :].clone() for states in pair) for pair in _contents(cache)]
    select(cache, indices, time)
    torch.testing.assert_close(_contents(cache), expected, rtol=0, atol=0)
    _filled(cache, 3 + (len(indices) == 4), [1] * SPARE_COLUMNS, seed=1)
    assert _places(cache) == places
    assert cache.get_seq_length() == time + SPARE_COLUMNS


def test_select_frees_the_rows_that_left_once_they_are_half_of_the_buffer() -> None:
    cache = _filled(new_cache(), 5, [4])
    places = _places(cache)
    select(cache, [0, 1, 2], 4)
    assert _places(cache) == places
    select(cache, [0, 2], 4)
    assert _places(cache) != places
    layer: Any = cache.layers[0]
    assert layer.keys.untyped_storage().nbytes() == 2 * HEADS * (4 + SPARE_COLUMNS) * SIZE * 4


def test_merge_pads_the_shorter_with_zeros_and_changes_neither() -> None:
    first, second = _filled(new_cache(), 2, [5]), _filled(new_cache(), 3, [2], seed=1)
    before = [states.clone() for cache in (first, second) for pair in _contents(cache) for states in pair]
    merged = merge(first, second)
    for (keys, values), mine, theirs in zip(_contents(merged), _contents(first), _contents(second), strict=True):
        for states, own, other in zip((keys, values), mine, theirs, strict=True):
            assert torch.equal(states[:2], own)
            assert torch.equal(states[2:, :, 3:], other)
            assert (states[2:, :, :3] == 0).all()
    after = [states for cache in (first, second) for pair in _contents(cache) for states in pair]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    _filled(merged, 5, [1], seed=2)
    assert merged.get_seq_length() == 6
