"""Runs in bfloat16, with and without Liger's kernels, against the same run in float32.

They go through the same class as `tunewright train`.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu_cases.bases import shape_of
from gpu_cases.reporting import Report
from gpu_cases.training import LOADS, TOY_LOADS, same_length_rows, train_ours
from tunewright.training.liger import missing_for_liger

STEPS = 20
LAYERS = 4
BAR = 0.01
"""The losses may differ by this share at each step."""


def run(report: Report, toy: bool) -> None:
    """Train 20 steps of a few layers of 8B shape each time, from the same weights and rows, and compare each loss."""
    # Tensor cores would round float32 products to TF32, and the reference with them.
    torch.set_float32_matmul_precision("highest")
    load = (TOY_LOADS if toy else LOADS)["shared"]
    size = shape_of("8b", toy, layers=2 if toy else LAYERS)
    rows = same_length_rows(size, load)
    sides: dict[str, dict[str, Any]] = {"losses": {}}
    if missing_for_liger("LlamaForCausalLM") is None:
        sides["losses with Liger"] = {"use_liger_kernel": True}
    whole = train_ours(size, rows, load.rows, STEPS, nf4=False, dtype="float32").losses
    for name, settings in sides.items():
        half = train_ours(size, rows, load.rows, STEPS, nf4=False, **settings).losses
        apart = max(abs(a - b) / b for a, b in zip(half, whole, strict=True))
        report(name, apart <= BAR, steps=STEPS, bfloat16=half, float32=whole, largest_relative_difference=apart)
