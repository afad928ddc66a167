"""Key/value caches of a ragged batch: rows padded on the left, chosen, joined, or begun from one shared prefix.

Keys and values are [rows, heads, time, head size]. They are views of larger tensors, so that a new token is written
next to the ones before it: transformers' ``DynamicLayer`` copies the whole cache for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Columns that a cache has to spare once it is copied: then it is copied once in as many tokens. For Llama 3.1 8B in
bfloat16 they take 8 MB a row."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, with room for the next tokens.

    Every layer keeps the whole past. A sliding window is then applied by the attention mask alone; a cache that dropped
    what has left the window would count padding as text.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin without tokens; ``DynamicLayer`` makes its empty tensors on the host and copies them to a card."""
        self.device = key_states.device
        self.keys, self.values = key_states.new_empty(0), value_states.new_empty(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append columns of tokens; all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        time = before + key_states.shape[-2]
        if self._buffers is None or time > self._buffers[0].shape[-2]:
            roomy = _roomy(key_states, len(key_states), time), _roomy(value_states, len(value_states), time)
            if before:
                held: Any = (self.keys, self.values)
                for buffer, states in zip(roomy, held, strict=True):
                    buffer[:, :, :before] = states
            self._buffers = roomy
        keys, values = self._buffers
        keys[:, :, before:time] = key_states
        values[:, :, before:time] = value_states
        self.keys, self.values = keys[:, :, :time], values[:, :, :time]
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor, time: int) -> None:
        """Have the first ``time`` columns of these from now on; the others are room."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._buffers = keys, values
        self.keys, self.values = keys[:, :, :time], values[:, :, :time]


def new_cache() -> Cache:
    """Return an empty cache whose layers are made as they are needed."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def select(cache: Cache, indices: list[int], time: int) -> None:
    """Keep these rows and the last ``time`` columns; nothing is copied where that is all there is."""
    layers: list[Any] = cache.layers
    rows, _, columns, _ = layers[0].keys.shape
    if (indices, time) == (list(range(rows)), columns):
        return
    chosen = torch.tensor(indices, device=layers[0].keys.device)

    def kept(held: Tensor) -> Tensor:
        buffer = _roomy(held, len(indices), time)
        buffer[:, :, :time] = held[:, :, columns - time :].index_select(0, chosen)
        return buffer

    for layer in layers:
        layer.hold(kept(layer.keys), kept(layer.values), time)


def merge(first: Cache, second: Cache) -> Cache:
    """Both caches' rows, the shorter padded on the left.

    Neither cache is changed, so that nothing is lost if memory runs out.
    """
    time = max(first.get_seq_length(), second.get_seq_length())

    def both(parts: tuple[Tensor, Tensor]) -> Tensor:
        buffer = _roomy(parts[0], sum(map(len, parts)), time)
        for own, part in zip(buffer.split([len(part) for part in parts]), parts, strict=True):
            padding = time - part.shape[-2]
            # What padding holds is multiplied by 0, so it has to be a number.
            own[:, :, :padding] = 0
            own[:, :, padding:time] = part
        return buffer

    merged = new_cache()
    pairs: list[tuple[Any, Any]] = list(zip(first.layers, second.layers, strict=True))
    for mine, theirs in pairs:
        layer = GrowingLayer()
        layer.hold(both((mine.keys, theirs.keys)), both((mine.values, theirs.values)), time)
        merged.layers.append(layer)
    return merged


def _roomy(like: Tensor, rows: int, time: int) -> Tensor:
    """Of so many rows and columns, and room; nothing is written yet."""
    _, heads, _, size = like.shape
    return like.new_empty(rows, heads, time + ROOM, size)


def begun(prefix: Cache, shifts: Sequence[int]) -> Cache:
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
    rows = new_cache()
    layers: list[Any] = prefix.layers
    device = layers[0].keys.device
    columns = torch.arange(prefix.get_seq_length(), device=device)
    moved = (columns - torch.tensor(shifts, device=device)[:, None]).clamp(min=0)  # [rows, time]
    for index, layer in enumerate(layers):
        # [heads, rows, time, size]: one index for all heads; padding repeats the first column, which nothing sees.
        keys, values = (states[0][:, moved].transpose(0, 1) for states in (layer.keys, layer.values))
        rows.update(keys, values, index)
    return rows
