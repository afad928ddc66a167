"""A run in bfloat16 against the same run in float32, through the same class as `tunewright train`."""

from __future__ import annotations

import torch

from gpu_cases.bases import shape_of
from gpu_cases.reporting import Report
from gpu_cases.training import LOADS, TOY_LOADS, same_length_rows, train_ours

STEPS = 20
LAYERS = 4
BAR = 0.01
"""The losses may differ by this share at each step."""


def run(report: Report, toy: bool) -> None:
    """Train 20 steps of a few layers of 8B shape twice, from the same weights and rows, and compare each loss."""
    # Tensor cores would round float32 products to TF32, and the reference with them.
    torch.set_float32_matmul_precision("highest")
    load = (TOY_LOADS if toy else LOADS)["shared"]
    size = shape_of("8b", toy, layers=2 if toy else LAYERS)
    rows = same_length_rows(size, load)
    half, whole = (
        train_ours(size, rows, load.rows, STEPS, nf4=False, dtype=dtype).losses for dtype in ("bfloat16", "float32")
    )
    apart = max(abs(a - b) / b for a, b in zip(half, whole, strict=True))
    report("losses", apart <= BAR, steps=STEPS, bfloat16=half, float32=whole, largest_relative_difference=apart)
