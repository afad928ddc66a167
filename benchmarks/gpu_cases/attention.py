"""The attention kernel over packed rows against float64: outputs and gradients.

The reference attends row by row with explicit scores in float64. SDPA in bfloat16, also row by row, shows how much of
the error is the precision's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu_cases.reporting import Report, relative_error
from tunewright.models.loading import device
from tunewright.training.packing import pack
from tunewright.training.packing.attention import attend
from tunewright.training.packing.layout import Layout

BAR = 2.0
"""Ours may be this many times as far from float64 as bfloat16 SDPA is, row by row."""


@dataclass(frozen=True)
class Kind:
    """One attention problem: rows that share a prefix."""

    name: str
    heads: int
    kv_heads: int
    shared: int
    own: tuple[int, ...]
    """Tokens of each row after the prefix."""
    window: int | None = None


def kinds(toy: bool) -> list[Kind]:
    """Return the problems, at the sizes of 7B and 8B heads unless ``toy``."""
    heads, kv, shared, scale = (4, 2, 12, 1) if toy else (32, 8, 384, 16)
    mixed = tuple(scale * length for length in (8, 3, 5, 8))
    return [
        Kind("multi-head", heads, heads, shared, mixed),
        Kind("grouped-query", heads, kv, shared, mixed),
        Kind("sliding window", heads, kv, shared, mixed, window=shared // 2),
        Kind("one-token rows", heads, kv, shared, (1,) * 8),
        Kind("nothing shared", heads, kv, 0, mixed),
        Kind("64 rows", heads, kv, shared, (2 * scale,) * 64),
    ]


def run(report: Report, toy: bool) -> None:
    """Measure every kind's output and gradients."""
    for kind in kinds(toy):
        ours, theirs = measure(kind, head=16 if toy else 128)
        passed = all(ours[part] <= BAR * theirs[part] for part in ours)
        errors = {f"{part}_error": error for part, error in ours.items()}
        report(kind.name, passed, **errors, **{f"sdpa_{part}_error": error for part, error in theirs.items()})


def measure(kind: Kind, head: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the relative errors of ours and of SDPA row by row: output, and gradients of query, key and value."""
    torch.manual_seed(0)
    place = device()
    prefix = list(range(1, kind.shared + 1))
    rows = [[*prefix, *range(1000 * row, 1000 * row + own)] for row, own in enumerate(kind.own, start=1)]
    batch = pack(rows, [[-100] * (len(row) - 1) + row[-1:] for row in rows], share=True).to(place)
    tokens, layout = batch.input_ids.shape[1], batch.layout
    assert (tokens < batch.row_tokens) == (kind.shared > 0), "the prefix is computed once"

    def drawn(heads: int) -> Tensor:
        return torch.randn(1, heads, tokens, head, dtype=torch.bfloat16, device=place)

    tensors = drawn(kind.heads), drawn(kind.kv_heads), drawn(kind.kv_heads)
    cotangent = torch.randn(1, tokens, kind.heads, head, dtype=torch.bfloat16, device=place)

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        module = torch.nn.Module()
        return attend(module, query, key, value, None, layout=layout, scaling=head**-0.5, sliding_window=kind.window)[0]

    def by_rows(one: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda query, key, value: row_by_row(one, query, key, value, layout, rows, kind.window)

    exact = _gradients(by_rows(_explicit), tuple(t.double() for t in tensors), cotangent.double())
    ours = _gradients(packed, tensors, cotangent)
    # Float32 leaves: each row attends in bfloat16, and the rows' gradients add up in float32.
    sdpa = _gradients(by_rows(_sdpa), tuple(t.float() for t in tensors), cotangent.float())
    errors = [{name: relative_error(found[name], exact[name]) for name in exact} for found in (ours, sdpa)]
    return errors[0], errors[1]


def row_by_row(
    one: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rows: list[list[int]],
    window: int | None,
) -> Tensor:
    """Attend in each row by itself [1, T, H, D]; the prefix's outputs are the first row's."""
    outputs: list[Tensor] = []
    owned: list[int] = []  # where in T each of the outputs stands
    for row, ids in enumerate(rows):
        place_of = layout.places(row)
        places = [place_of(token) for token in range(len(ids))]
        index = torch.tensor(places, device=query.device)
        age = torch.arange(len(ids), device=query.device)[:, None] - torch.arange(len(ids), device=query.device)
        seen = (age >= 0) if window is None else (age >= 0) & (age < window)  # [S, S]
        repeat = query.shape[1] // key.shape[1]
        q = query[0].index_select(1, index)  # [H, S, D]
        k, v = (t[0].index_select(1, index).repeat_interleave(repeat, 0) for t in (key, value))
        attended = one(q, k, v, seen).transpose(0, 1)  # [S, H, D]
        # The prefix comes first in every row, and is taken from one of them.
        known = len(set(places) & set(owned))
        outputs.append(attended[known:])
        owned += places[known:]
    order = torch.tensor(owned, device=query.device).argsort()
    return torch.cat(outputs).index_select(0, order)[None]


def _explicit(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    attended: Tensor = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
    return attended


def _sdpa(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    query, key, value = (tensor.bfloat16()[None] for tensor in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=seen)[0].to(torch.float32)


def _gradients(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: tuple[Tensor, ...], cotangent: Tensor
) -> dict[str, Tensor]:
    query, key, value = (tensor.detach().clone().requires_grad_() for tensor in tensors)
    out = attention(query, key, value)
    out.backward(cotangent)
    assert query.grad is not None
    assert key.grad is not None
    assert value.grad is not None
    return {"output": out.detach(), "query": query.grad, "key": key.grad, "value": value.grad}
