"""Key/value caches of a ragged batch: rows padded on the left, chosen, joined, or begun from one shared prefix.

Keys and values are [rows, heads, time, head size].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache


def select(cache: DynamicCache, indices: list[int], time: int) -> None:
    """Keep these rows and the last ``time`` columns."""
    layers: list[Any] = cache.layers
    for layer in layers:
        chosen = torch.tensor(indices, device=layer.keys.device)
        layer.keys = layer.keys[..., -time:, :].index_select(0, chosen)
        layer.values = layer.values[..., -time:, :].index_select(0, chosen)


def merge(first: DynamicCache, second: DynamicCache) -> DynamicCache:
    """Both caches' rows, the shorter padded on the left."""
    time = max(first.get_seq_length(), second.get_seq_length())

    def both(pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([pad(states, (0, 0, time - states.shape[-2], 0)) for states in pair])

    merged = DynamicCache()
    pairs: list[tuple[Any, Any]] = list(zip(first.layers, second.layers, strict=True))
    for index, (mine, theirs) in enumerate(pairs):
        merged.update(both((mine.keys, theirs.keys)), both((mine.values, theirs.values)), index)
    return merged


def begun(prefix: DynamicCache, shifts: Sequence[int]) -> DynamicCache:
    """A cache of ``len(shifts)`` rows that all begin with one prefix, row i moved ``shifts[i]`` columns to the right.

    What a row's shift pushes past the last column is left out, and its first columns are padding::

        prefix  a b c d        shifts 0, 1      a b c d
                                                . a b c

    Args:
        prefix: of one row.
        shifts: columns of padding before each row, from 0 up to any number.

    Returns:
        As many columns as the prefix has, copied: the rows grow apart from here on.
    """
    rows = DynamicCache()
    layers: list[Any] = prefix.layers
    for index, layer in enumerate(layers):
        columns = torch.arange(layer.keys.shape[-2], device=layer.keys.device)
        moved = (columns - torch.tensor(shifts, device=columns.device)[:, None]).clamp(min=0)  # [rows, time]
        # [heads, rows, time, size]: one index for all heads; padding repeats the first column, which nothing sees.
        keys, values = (states[0][:, moved].transpose(0, 1) for states in (layer.keys, layer.values))
        rows.update(keys, values, index)
    return rows
