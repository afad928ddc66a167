"""Attention by a packed row's layout, as an attention implementation of transformers.

A model whose ``config._attn_implementation`` is NAME attends as usual (SDPA) where its forward gets no ``layout``, and
by the layout where it gets one. The model's own code, LoRA, 4-bit weights, checkpointing of activations and DDP are
not touched.

Shapes: H query heads, K key/value heads, T tokens, R rows of a block, S its longest suffix, P keys, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunewright.training.packing.layout import Block, Layout, Piece, Sequences

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
    if _takes_flash(query):
        return ragged(query, key, value, layout.sequences, scaling, sliding_window)[None], None
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
            seen = prefix if part.prefix.length else slice(0, 0)
            outputs.append(_suffixes(part, *own, keys[seen], values[seen], scaling, window))
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
    """Return the suffixes of one block, each attending to the prefix and to itself: [tokens, H, D].

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
    if query.is_cuda:
        return _within_on_card(query, key, value, before, scaling, window).transpose(1, 2)
    mask = _mask(queries, before, window)
    if query.dtype == torch.bfloat16 and queries <= SHORT:
        bias = _bias(queries, before, window, shared)
        q = query.reshape(-1, shared * queries, size)
        k, v = key.reshape(len(q), -1, size), value.reshape(len(q), -1, size)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scaling)
        out = torch.bmm(scores.softmax(-1), v).view(rows, heads, queries, size)
    else:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=shared > 1)
    return out.transpose(1, 2)


def _within_on_card(
    query: Tensor, key: Tensor, value: Tensor, before: int, scaling: float, window: int | None
) -> Tensor:
    """As `_within`, by SDPA's memory-efficient kernel, for what FlashAttention does not take: [R, H, S, D].

    That kernel takes float32 and cards before Ampere, but no grouped heads (check_batch_size_and_num_heads_dense in
    PyTorch's sdp_utils_cpp.h), so that each query head gets keys and values of its own: without that SDPA would hold
    all scores.
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    causal = not before and window is None
    # Not kept: every batch has masks of other sizes.
    mask = None if causal else _seen(query.shape[2], before, window, query.device)
    attended: Tensor = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling)
    return attended


def _seen(queries: int, before: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Return which of the keys each query sees: bool [S, P]."""
    place = torch.arange(before, before + queries, device=device)[:, None]
    key = torch.arange(before + queries, device=device)
    seen = key <= place
    return seen if window is None else seen & (key > place - window)


@lru_cache(maxsize=256)
def _mask(queries: int, before: int, window: int | None) -> Tensor:
    """As `_seen`, on the CPU, where layers and batches ask for the same ones again."""
    return _seen(queries, before, window)


@lru_cache(maxsize=256)
def _bias(queries: int, before: int, window: int | None, shared: int) -> Tensor:
    """Return the same as what is added to scores, for the query heads that share a key head one below the other."""
    mask = _mask(queries, before, window)
    return torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, float("-inf")).repeat(shared, 1)


def _takes_flash(query: Tensor) -> bool:
    """Whether FlashAttention 2 takes these queries: 16 bits, on a card of compute capability 8.0 (Ampere) or later."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


Kernel = Callable[[Tensor, Tensor, Tensor, Sequences, float, "int | None"], Tensor]


def ragged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scaling: float,
    window: int | None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Attention over ragged sequences, all groups at once: [T, H, D].

    Args:
        query: [1, H, T, D].
        key, value: [1, K, T, D]; gathered for each sequence, prefix and suffix.
        sequences: of the packed row.
        scaling: what scores are multiplied by.
        window: how many tokens each one sees, itself included; None: all before it.
        kernel: attends queries [T, H, D] to keys and values [sum of keys, K, D] (None: FlashAttention).
    """
    keys, values = (gather(each[0].transpose(0, 1), sequences.key_places) for each in (key, value))
    return (kernel or _flash)(query[0].transpose(0, 1), keys, values, sequences, scaling, window)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query.contiguous(),
        key,
        value,
        sequences.ends_q,
        sequences.ends_k,
        sequences.longest_q,
        sequences.longest_k,
        **flash_options(scaling, window, grouped=query.shape[1] != key.shape[1]),
    )
    assert isinstance(attended, Tensor)
    return attended


def flash_options(scaling: float, window: int | None, *, grouped: bool) -> dict[str, Any]:
    """Return the keyword arguments of ``varlen_attn`` in the torch that is installed.

    torch 2.11 hands keys with fewer heads on to the kernel, which takes them; from 2.12 on it wants ``enable_gqa`` for
    that. In both a window is counted without the token itself.
    """
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    return {**options, "enable_gqa": True} if grouped and _asks_for_gqa() else options


@lru_cache(maxsize=1)
def _asks_for_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


def gather(packed: Tensor, places: Tensor | None) -> Tensor:
    """Return ``packed[places]`` ([T, ...] to [P, ...]), whose gradient is summed in float32 and rounded once.

    index_select adds gradients up in their own precision: of a prefix that 256 rows share, bfloat16 would round 256
    times, an error of 1.6% where rounding once leaves 0.2%.
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
        total = torch.zeros(ctx.tokens, *grad.shape[1:], dtype=torch.float32, device=grad.device)
        return total.index_add_(0, places, grad.float()).to(grad.dtype), None
