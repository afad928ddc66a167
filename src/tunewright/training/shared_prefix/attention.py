"""Attention by a packed row's layout, as an attention implementation of transformers.

A model whose ``config._attn_implementation`` is NAME attends as usual (SDPA) where its forward gets no ``layout``, and
by the layout where it gets one. The model's own code, LoRA, 4-bit weights, checkpointing of activations and DDP are
not touched.

Shapes: H query heads, K key/value heads, T tokens, R rows of a block, S its longest suffix, P keys, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunewright.training.shared_prefix.layout import Block, Layout, Piece

NAME = "tunewright_shared_prefix"

SHORT = 128
"""Suffixes up to this many tokens are attended to by plain matrix products on the CPU in bfloat16: the fused kernel
is slower there (benchmarks/attention_speed.py). The bound keeps the memory of the scores in proportion to the keys."""


def register() -> None:
    """Make NAME known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row, or of a padded batch where there is no layout.

    Args:
        module: the model's attention layer.
        query: [1, H, T, D].
        key, value: [1, K, T, D].
        attention_mask: of a padded batch; a packed row needs none.
        layout: of a packed row.
        scaling: what scores are multiplied by.
        sliding_window: how many tokens each one sees, itself included; None: all before it.
        kwargs: what else transformers passes to SDPA.

    Returns:
        The attended values [1, T, H, D], and no weights.
    """
    if layout is None:
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
        return attended
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _ragged(query, key, value, layout, scaling, sliding_window), None
    return _by_blocks(query, key, value, layout, scaling, sliding_window), None


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None) -> Tensor:
    """Attention prefix by prefix and block by block: [1, T, H, D]."""
    parts = layout.parts
    lengths = [part.tokens for part in parts]
    # One split, whose gradient is one concatenation; that of each slice would be as large as the packed row.
    queries, keys, values = (packed.split(lengths, dim=2) for packed in (query, key, value))
    outputs: list[Tensor] = []
    prefix = slice(0, 0)
    for place, part in enumerate(parts):
        if isinstance(part, Piece):
            prefix = slice(place, place + 1)
            outputs.append(_within(queries[place], keys[place], values[place], 0, scaling, window)[0])
        else:
            own = queries[place], keys[place], values[place]
            # Of a group that shares nothing, both are empty.
            before = (keys[prefix], values[prefix]) if part.prefix.length else ((), ())
            outputs.append(_suffixes(part, *own, *before, scaling, window))
    return torch.cat(outputs)[None]


def _suffixes(
    block: Block,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys_before: Sequence[Tensor],
    values_before: Sequence[Tensor],
    scaling: float,
    window: int | None,
) -> Tensor:
    """The suffixes of one block, each attending to the prefix and to itself: [tokens, H, D].

    Args:
        block: which suffixes.
        query: [1, H, tokens, D].
        key, value: [1, K, tokens, D].
        keys_before, values_before: those of the prefix [1, K, prefix, D], if there is one.
    """
    rows = len(block.suffixes)

    def suffixes(own: Tensor) -> Tensor:
        """[1, heads, tokens, D] to [R, heads, S, D]."""
        padded = own[0]
        if block.pick is not None and block.valid is not None:
            padded = _Pad.apply(padded, block.pick, block.valid)
        return padded.view(len(padded), rows, block.longest, -1).transpose(0, 1)

    def seen(own: Tensor, before: Sequence[Tensor]) -> Tensor:
        """[1, heads, tokens, D] to [R, heads, P, D]."""
        return torch.cat([*(prefix.expand(rows, -1, -1, -1) for prefix in before), suffixes(own)], dim=2)

    attended = _within(
        suffixes(query), seen(key, keys_before), seen(value, values_before), block.prefix.length, scaling, window
    )
    flat = attended.flatten(0, 1)
    return flat if block.valid is None else flat.index_select(0, block.valid)


class _Pad(torch.autograd.Function):
    """A block's tokens [heads, tokens, D] as rows of one length [heads, R * S, D], by the block's ``pick``.

    Padding repeats a token, and sends no gradient back to it: it is seen by padding alone, which nothing is read from.
    So the gradient is a choice, where index_select would add up.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, pick: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(valid)
        return own.index_select(1, pick)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (valid,) = ctx.saved_tensors
        return grad.index_select(1, valid), None, None


def _within(query: Tensor, key: Tensor, value: Tensor, before: int, scaling: float, window: int | None) -> Tensor:
    """Causal attention of queries [R, H, S, D] to the P = before + S keys that end with theirs: [R, S, H, D].

    Padding stands at the ends of rows, after every query that counts, so causality masks it.
    """
    rows, heads, queries, size = query.shape
    shared = heads // key.shape[1]
    mask = _mask(queries, before, window, str(query.device))
    if query.dtype == torch.bfloat16 and not query.is_cuda and queries <= SHORT:
        bias = _bias(queries, before, window, shared)
        q = query.reshape(-1, shared * queries, size)
        k, v = key.reshape(len(q), -1, size), value.reshape(len(q), -1, size)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scaling)
        out = torch.bmm(scores.softmax(-1), v).view(rows, heads, queries, size)
    else:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=shared > 1)
    return out.transpose(1, 2)


@lru_cache(maxsize=256)
def _mask(queries: int, before: int, window: int | None, device: str) -> Tensor:
    """Which of the keys each query sees: bool [S, P]."""
    place = torch.arange(before, before + queries, device=device)[:, None]
    key = torch.arange(before + queries, device=device)
    seen = key <= place
    return seen if window is None else seen & (key > place - window)


@lru_cache(maxsize=256)
def _bias(queries: int, before: int, window: int | None, shared: int) -> Tensor:
    """The same as what is added to scores, for the query heads that share a key head one below the other."""
    mask = _mask(queries, before, window, "cpu")
    return torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, float("-inf")).repeat(shared, 1)


def _ragged(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None) -> Tensor:
    """FlashAttention over ragged sequences, one kernel for all groups: [1, T, H, D].

    Keys and values are gathered for each row, prefix and suffix.
    """
    from torch.nn.attention.varlen import varlen_attn

    sequences = layout.sequences
    places = sequences.key_places.to(query.device)
    ends_q, ends_k = (
        torch.tensor([0, *lengths], device=query.device).cumsum(0, dtype=torch.int32)
        for lengths in (sequences.queries, sequences.keys)
    )
    attended = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).index_select(0, places),
        value[0].transpose(0, 1).index_select(0, places),
        ends_q,
        ends_k,
        max(sequences.queries),
        max(sequences.keys),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended[None]
