"""NF4 with double quantization on the card against the processor, bit by bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_cases.reporting import Report, relative_error
from tunewright.models.loading import device

MATRICES = 20


def run(report: Report, toy: bool) -> None:
    """Compare matrices of 8B size; equal bits are what docs/how-to/qlora.md says of two loads on one device."""
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(0)
    rows, columns = (64, 128) if toy else (4096, 4096)
    different = {"weights": 0, "scales": 0, "offsets": 0}
    worst = 0.0
    for _ in range(MATRICES):
        matrix = torch.randn(rows, columns, dtype=torch.bfloat16) * 0.02
        (data, state), (other, other_state) = _quantized(matrix), _quantized(matrix.to(device()))
        different["weights"] += _unequal(data, other)
        different["scales"] += _unequal(state.absmax, other_state.absmax)
        different["offsets"] += _unequal(state.offset, other_state.offset)
        worst = max(worst, relative_error(dequantize_4bit(other, other_state).cpu(), dequantize_4bit(data, state)))
    report(
        "bytes that differ",
        not any(different.values()),
        matrices=MATRICES,
        size=f"{rows} x {columns}",
        **different,
        largest_relative_difference=worst,
    )


def _quantized(matrix: Tensor) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(matrix, blocksize=64, compress_statistics=True, quant_type="nf4")
    return data, state


def _unequal(a: Tensor, b: Tensor) -> int:
    return int((a.cpu() != b.cpu()).sum())
