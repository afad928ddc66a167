"""Attention with soft-capped scores (Gemma 2) and sinks (gpt-oss), which SDPA does not compute.

Shapes: R rows, H query heads, K key/value heads, S queries, P keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attend_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention with all scores in memory: [R, H, S, D].

    ``query`` is [R, H, S, D], ``key`` and ``value`` are [R, K, P, D]. The ``mask`` is broadcast to [R, H, S, P]: True
    where a key is seen, or numbers to add (None: each query sees the keys up to its own, aligned at the ends). A sink
    [H] is the score of one more key, whose value is zero.
    """
    rows, heads, queries, size = query.shape
    kept, keys = key.shape[1:3]
    grouped = query.reshape(rows, kept, -1, size)  # [R, K, H/K * S, D]: keys are not repeated
    scores = (grouped @ key.transpose(2, 3) * scaling).view(rows, heads, queries, keys).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # Padding sees no key: its weights are equal, not NaN.
    scores = scores.clamp(min=torch.finfo(torch.float32).min)
    if sinks is not None:
        column = sinks.float().view(1, heads, 1, 1).expand(rows, -1, queries, -1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., :keys].to(value.dtype)
    return (weights.reshape(rows, kept, -1, keys) @ value).view(rows, heads, queries, size)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as an attention implementation of transformers: by SDPA, unless scores have a cap or sinks."""
    if softcap is None and s_aux is None:
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return attended
    out = attend_scores(query, key, value, attention_mask, scaling, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None
