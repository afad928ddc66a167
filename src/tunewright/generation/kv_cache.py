"""Key/value caches of a ragged batch: rows padded on the left, selected, merged, or started from a shared prefix.

Keys and values are [rows, heads, time, head size]. They are views of larger buffers, so a new token
is written in place; transformers' ``DynamicLayer`` copies the whole cache for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

PASS_TOKENS = 64
"""Cost of one more pass over the weights, in tokens of a pass that is made anyway."""

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class SharedPrefix:
    """Prompts with a common prefix."""

    indices: tuple[int, ...]
    """Into all prompts."""
    length: int
    """Tokens of the prefix; each prompt is longer."""


@dataclass
class _Node:
    """A prefix of ``depth`` tokens that the sorted prompts ``first`` to ``last`` share."""

    depth: int
    first: int
    last: int
    saved: int = 0
    """Tokens that the choices below save."""
    chosen: list[tuple[int, int, int]] = field(default_factory=list)
    """First, last and depth of each prefix that was chosen below."""

    def take(self, child: _Node) -> None:
        self.last = child.last
        self.saved += child.saved
        self.chosen += child.chosen

    def decided(self, pass_tokens: int) -> _Node:
        own = self.depth * (self.last - self.first) - pass_tokens
        if own > self.saved:
            self.saved, self.chosen = own, [(self.first, self.last, self.depth)]
        return self


def shared_prefixes(prompts: Sequence[Prompt], pass_tokens: int = PASS_TOKENS) -> list[SharedPrefix]:
    """Return the prefixes that save the most tokens when each is computed once for all prompts that continue it.

    A prefix of n tokens saves n for every prompt but one, and costs a pass. Prompts in no group
    are computed whole. Equal prompts share all but their last token.
    """
    order = sorted(range(len(prompts)), key=lambda place: prompts[place])
    if not order:
        return []
    open_nodes: list[_Node] = []
    node = _Node(0, 0, 0)  # only the first prompt
    for place in range(1, len(order)):
        depth = _common(prompts[order[place - 1]], prompts[order[place]])
        while open_nodes and open_nodes[-1].depth > depth:
            open_nodes[-1].take(node)
            node = open_nodes.pop().decided(pass_tokens)
        if not open_nodes or open_nodes[-1].depth < depth:
            open_nodes.append(_Node(depth, node.first, node.last))
        open_nodes[-1].take(node)
        node = _Node(0, place, place)
    while open_nodes:
        open_nodes[-1].take(node)
        node = open_nodes.pop().decided(pass_tokens)
    return [SharedPrefix(tuple(order[first : last + 1]), depth) for first, last, depth in node.chosen]


def _common(one: Prompt, other: Prompt) -> int:
    """Return the length of the common prefix, less the last token of either: every row computes at least one token."""
    longest = min(len(one), len(other)) - 1
    return next((place for place in range(longest) if one[place] != other[place]), longest)


SPARE_COLUMNS = 64
"""Spare columns of a new buffer, so that it is copied only once in as many tokens. For Llama 3.1 8B in bfloat16 they
take 8 MB a row.
"""


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values, with spare columns for the next tokens.

    Every layer keeps the whole past, and only the attention mask applies a sliding window. A cache
    that dropped columns outside the window would count padding as text.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.buffers: tuple[Tensor, Tensor] | None = None
        """Keys and values with their spare columns."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start without tokens; ``DynamicLayer`` creates its empty tensors on the host and copies them to the GPU."""
        self.device = key_states.device
        self.keys, self.values = key_states.new_empty(0), value_states.new_empty(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append columns of tokens, and return all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        time = before + key_states.shape[-2]
        if self.buffers is None or time > self.buffers[0].shape[-2]:
            larger = _allocate(key_states, len(key_states), time), _allocate(value_states, len(value_states), time)
            if before:
                old: Any = (self.keys, self.values)
                for buffer, states in zip(larger, old, strict=True):
                    buffer[:, :, :before] = states
            self.buffers = larger
        keys, values = self.buffers
        keys[:, :, before:time] = key_states
        values[:, :, before:time] = value_states
        self.keys, self.values = keys[:, :, :time], values[:, :, :time]
        return self.keys, self.values

    def set_buffers(self, keys: Tensor, values: Tensor, time: int) -> None:
        """Use these buffers, of which the first ``time`` columns are filled."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.buffers = keys, values
        self.keys, self.values = keys[:, :, :time], values[:, :, :time]


def new_cache() -> Cache:
    """Return an empty cache whose layers are created on first use."""
    return Cache(layer_class_to_replicate=PreallocatedLayer)


def select(cache: Cache, indices: list[int], time: int) -> None:
    """Keep these rows and the last ``time`` columns, in the buffers that they are in.

    Only rows that change their place are copied, unless at most half of a buffer stays in use.
    Nothing is sent to the device if the whole cache is kept.
    """
    layers: list[Any] = cache.layers
    columns = layers[0].keys.shape[2]
    if (indices, time) == (list(range(len(layers[0].keys))), columns):
        return
    chosen = torch.tensor(indices, device=layers[0].keys.device)
    places = torch.tensor([place for place, index in enumerate(indices) if place != index], device=chosen.device)

    def kept(buffer: Tensor, states: Tensor) -> Tensor:
        rows = len(indices)
        if 2 * rows * buffer[0].nbytes <= buffer.untyped_storage().nbytes():
            smaller = _allocate(states, rows, time)
            smaller[:, :, :time] = states[:, :, columns - time :].index_select(0, chosen)
            return smaller
        if len(places):
            states.index_copy_(0, places, states.index_select(0, chosen[places]))
        return buffer[:rows, :, columns - time :]

    for layer in layers:
        keys, values = layer.buffers
        layer.set_buffers(kept(keys, layer.keys), kept(values, layer.values), time)


def copy_rows(cache: Cache, indices: Sequence[int]) -> Cache:
    """Return a cache of these rows; the first one is not changed."""
    copied = new_cache()
    layers: list[Any] = cache.layers
    chosen = torch.tensor(indices, device=layers[0].keys.device)
    for index, layer in enumerate(layers):
        copied.update(layer.keys.index_select(0, chosen), layer.values.index_select(0, chosen), index)
    return copied


def truncate(cache: Cache, time: int) -> None:
    """Keep the first ``time`` columns, even after a pass that failed in one of the layers."""
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys[:, :, :time], layer.values[:, :, :time]


def merge(first: Cache, second: Cache) -> Cache:
    """Return the rows of both caches, the shorter padded on the left.

    Neither cache is changed, so nothing is lost if memory runs out.
    """
    time = max(first.get_seq_length(), second.get_seq_length())

    def both(parts: tuple[Tensor, Tensor]) -> Tensor:
        buffer = _allocate(parts[0], sum(map(len, parts)), time)
        for own, part in zip(buffer.split([len(part) for part in parts]), parts, strict=True):
            padding = time - part.shape[-2]
            # Attention multiplies padding by 0, and 0 * NaN is NaN: clear it.
            own[:, :, :padding] = 0
            own[:, :, padding:time] = part
        return buffer

    merged = new_cache()
    pairs: list[tuple[Any, Any]] = list(zip(first.layers, second.layers, strict=True))
    for mine, theirs in pairs:
        layer = PreallocatedLayer()
        layer.set_buffers(both((mine.keys, theirs.keys)), both((mine.values, theirs.values)), time)
        merged.layers.append(layer)
    return merged


def _allocate(like: Tensor, rows: int, time: int) -> Tensor:
    """Return an uninitialized buffer [rows, heads, time + SPARE_COLUMNS, head size]."""
    _, heads, _, size = like.shape
    return like.new_empty(rows, heads, time + SPARE_COLUMNS, size)


def from_prefix(prefix: Cache, shifts: Sequence[int]) -> Cache:
    """Return a cache of ``len(shifts)`` rows that start with one prefix, row i shifted right by ``shifts[i]`` columns.

    Columns shifted past the last one are dropped, and the first columns become padding::

        prefix  a b c d        shifts 0, 1      a b c d
                                                . a b c

    The copy has as many columns as the prefix: the rows grow apart from here on.
    """
    rows = new_cache()
    layers: list[Any] = prefix.layers
    device = layers[0].keys.device
    columns = torch.arange(prefix.get_seq_length(), device=device)
    moved = (columns - torch.tensor(shifts, device=device)[:, None]).clamp(min=0)  # [rows, time]
    for index, layer in enumerate(layers):
        # Indexing gives [heads, rows, time, size]: one index for all heads. Padding repeats column
        # 0; no row attends to it.
        keys, values = (states[0][:, moved].transpose(0, 1) for states in (layer.keys, layer.values))
        rows.update(keys, values, index)
    return rows
