"""Attention over a packed row's layout, as an attention implementation of transformers.

A model whose ``config._attn_implementation`` is NAME uses SDPA if its forward gets no ``layout``, and the layout if it
gets one. Soft-capped scores and sinks are computed by `tunewright.generation.attention`. The model's own code, LoRA,
4-bit weights, activation checkpointing and DDP need no change.

Shapes: H query heads, K key/value heads, T tokens, R rows of a block, S its longest suffix, P keys, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tunewright.generation.attention import attend_scores, attention_forward
from tunewright.training.packing.layout import Block, Layout, Piece, Sequences

NAME = "tunewright_shared_prefix"

SHORT = 128
"""Longest suffix for which attention is plain matrix products on the CPU in bfloat16: the fused kernel is slower
there. The bound keeps the memory of the scores in proportion to the keys.
"""


def register() -> None:
    """Register NAME with transformers."""
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
    """Compute attention of a packed row, or of a padded batch if there is no layout.

    ``query`` is [1, H, T, D], ``key`` and ``value`` are [1, K, T, D], the result is [1, T, H, D]. A
    padded batch has an ``attention_mask``, a packed row needs none. A ``sliding_window`` counts the
    token itself (None: all before it).
    """
    if layout is None:
        return attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    scores = Scores(scaling, sliding_window, kwargs.get("softcap"), kwargs.get("s_aux"))
    if _takes_flash(query) and scores.plain:
        return varlen_attention(query, key, value, layout.sequences, scaling, sliding_window)[None], None
    return _by_blocks(query, key, value, layout, scores), None


@dataclass(frozen=True)
class Scores:
    """The rule by which a layer's queries weigh their keys."""

    scaling: float
    window: int | None
    """Keys that a query sees, its own included; None: all before it."""
    softcap: float | None
    """The bound of the scores (Gemma 2)."""
    sinks: Tensor | None
    """The score of one more key without a value, for each head [H] (gpt-oss)."""

    @property
    def plain(self) -> bool:
        """True if fused kernels compute it."""
        return self.softcap is None and self.sinks is None


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores) -> Tensor:
    """Compute attention prefix by prefix and block by block: [1, T, H, D]."""
    parts = layout.parts
    lengths = [part.tokens for part in parts]
    # The gradient of one split is one concatenation. The gradient of each slice would be as large as the packed row.
    queries, keys, values = (packed.split(lengths, dim=2) for packed in (query, key, value))
    outputs: list[Tensor] = []
    # A prefix comes right before its blocks, so the last prefix seen is the one that a block attends to.
    prefix = slice(0, 0)
    for place, part in enumerate(parts):
        if isinstance(part, Piece):
            prefix = slice(place, place + 1)
            outputs.append(_within(queries[place], keys[place], values[place], 0, scores)[0])
        else:
            own = queries[place], keys[place], values[place]
            # A group that shares nothing has an empty prefix: no keys before the block's own.
            seen = prefix if part.prefix.length else slice(0, 0)
            outputs.append(_suffixes(part, *own, keys[seen], values[seen], scores))
    return torch.cat(outputs)[None]  # [1, T, H, D]


def _suffixes(
    block: Block,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys_before: Sequence[Tensor],
    values_before: Sequence[Tensor],
    scores: Scores,
) -> Tensor:
    """Return the attended suffixes of one block [tokens, H, D]; each attends to the prefix and to itself.

    ``query`` is [1, H, tokens, D], ``key`` and ``value`` are [1, K, tokens, D], the prefix's, if
    there is one, are [1, K, prefix, D].
    """
    rows = len(block.suffixes)

    def suffixes(own: Tensor) -> Tensor:
        """Reshape [1, heads, tokens, D] to [R, heads, S, D]."""
        padded = own[0]
        if block.pad_index is not None and block.valid_index is not None:
            padded = _Pad.apply(padded, block.pad_index, block.valid_index)
        return padded.view(len(padded), rows, block.longest, -1).transpose(0, 1)

    def seen(own: Tensor, before: Sequence[Tensor]) -> Tensor:
        """Prepend the prefix to each suffix: [1, heads, tokens, D] to [R, heads, P, D]."""
        # expand() makes a view; its gradient is the sum over the rows that share the prefix.
        return torch.cat([*(prefix.expand(rows, -1, -1, -1) for prefix in before), suffixes(own)], dim=2)

    attended = _within(suffixes(query), seen(key, keys_before), seen(value, values_before), block.prefix.length, scores)
    flat = attended.flatten(0, 1)  # [R * S, H, D]
    return flat if block.valid_index is None else flat.index_select(0, block.valid_index)


class _Pad(torch.autograd.Function):
    """A block's tokens [heads, tokens, D] as rows of equal length [heads, R * S, D], by the block's ``pad_index``.

    Padding repeats a token and sends no gradient back to it: only padding attends to padding, and its
    output is dropped. So the gradient is a selection, where index_select's gradient would be a sum.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, pad_index: Tensor, valid_index: Tensor) -> Tensor:
        ctx.save_for_backward(valid_index)
        return own.index_select(1, pad_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (valid_index,) = ctx.saved_tensors
        return grad.index_select(1, valid_index), None, None


def _within(query: Tensor, key: Tensor, value: Tensor, before: int, rule: Scores) -> Tensor:
    """Compute causal attention of queries [R, H, S, D] to the P = before + S keys that end with theirs: [R, S, H, D].

    Padding is at the end of rows, after every real query, so causality masks it.
    """
    rows, heads, queries, size = query.shape
    shared, scaling, window = heads // key.shape[1], rule.scaling, rule.window
    if not rule.plain:
        seen = _seen(queries, before, window, query.device)
        return attend_scores(query, key, value, seen, scaling, rule.softcap, rule.sinks).transpose(1, 2)
    if query.is_cuda:
        return _within_on_card(query, key, value, before, scaling, window).transpose(1, 2)
    mask = _mask(queries, before, window)
    if query.dtype == torch.bfloat16 and queries <= SHORT:
        # Query heads that share a key head (GQA) are stacked along S, so that keys are not repeated.
        bias = _bias(queries, before, window, shared)  # [H/K * S, P]
        q = query.reshape(-1, shared * queries, size)  # [R * K, H/K * S, D]
        k, v = key.reshape(len(q), -1, size), value.reshape(len(q), -1, size)  # [R * K, P, D]
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scaling)  # [R * K, H/K * S, P]
        out = torch.bmm(scores.softmax(-1), v).view(rows, heads, queries, size)
    else:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=shared > 1)
    return out.transpose(1, 2)


def _within_on_card(
    query: Tensor, key: Tensor, value: Tensor, before: int, scaling: float, window: int | None
) -> Tensor:
    """Compute `_within` with SDPA's memory-efficient kernel, where FlashAttention does not apply: [R, H, S, D].

    That kernel takes float32 and GPUs before Ampere, but no grouped heads
    (check_batch_size_and_num_heads_dense in PyTorch's sdp_utils_cpp.h). So keys and values are
    repeated for each query head; otherwise SDPA would hold all scores.
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    causal = not before and window is None
    # Not cached: every batch has masks of different sizes.
    mask = None if causal else _seen(query.shape[2], before, window, query.device)
    attended: Tensor = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling)
    return attended


def _seen(queries: int, before: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Return the keys that each query sees, bool [S, P]."""
    position = torch.arange(before, before + queries, device=device)[:, None]  # [S, 1]
    key = torch.arange(before + queries, device=device)  # [P]
    seen = key <= position  # causal
    return seen if window is None else seen & (key > position - window)


# On the CPU: layers and batches ask for the same masks again.
_mask = lru_cache(maxsize=256)(_seen)


@lru_cache(maxsize=256)
def _bias(queries: int, before: int, window: int | None, shared: int) -> Tensor:
    """Return the mask as an additive bias, repeated for the query heads that share a key head: [H/K * S, P]."""
    mask = _mask(queries, before, window)
    return torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, float("-inf")).repeat(shared, 1)


def _takes_flash(query: Tensor) -> bool:
    """Return whether FlashAttention 2 applies: 16 bits, on a GPU of compute capability 8.0 (Ampere) or later."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float, window: int | None
) -> Tensor:
    """Compute attention over sequences of different lengths with FlashAttention, all groups at once: [T, H, D].

    ``query`` is [1, H, T, D]; ``key`` and ``value`` [1, K, T, D] are gathered for each sequence. A
    ``window`` counts the token itself (None: all before it).
    """
    from torch.nn.attention.varlen import varlen_attn

    keys, values = (gather(each[0].transpose(0, 1), sequences.key_indices) for each in (key, value))
    attended = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        sequences.cu_seqlens_q,
        sequences.cu_seqlens_k,
        sequences.max_seqlen_q,
        sequences.max_seqlen_k,
        **varlen_options(scaling, window, grouped=query.shape[1] != key.shape[1]),
    )
    assert isinstance(attended, Tensor)
    return attended


def varlen_options(scaling: float, window: int | None, *, grouped: bool) -> dict[str, Any]:
    """Return the keyword arguments of ``varlen_attn`` for the installed torch.

    torch 2.11 passes keys with fewer heads to the kernel, which accepts them; from 2.12 on it
    requires ``enable_gqa``. In both versions a window does not count the token itself.
    """
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    return {**options, "enable_gqa": True} if grouped and _asks_for_gqa() else options


@lru_cache(maxsize=1)
def _asks_for_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


def gather(packed: Tensor, places: Tensor | None) -> Tensor:
    """Return ``packed[indices]`` ([T, ...] to [P, ...]), whose gradient is summed in float32 and rounded once.

    index_select sums gradients in their own precision. For a prefix that 256 rows share, bfloat16
    would round 256 times, an error of 1.6%; rounding once leaves 0.2%.
    """
    if places is None:
        return packed
    gathered: Tensor = _Gather.apply(packed, places)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.tokens = len(packed)
        return packed.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        # A shared prefix gets one gradient per row: summed in float32, rounded once.
        total = torch.zeros(ctx.tokens, *grad.shape[1:], dtype=torch.float32, device=grad.device)
        return total.index_add_(0, places, grad.float()).to(grad.dtype), None
