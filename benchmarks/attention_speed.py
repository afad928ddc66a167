"""Attention of short suffixes on the CPU in bfloat16: plain matrix products against PyTorch's fused kernel.

    python benchmarks/attention_speed.py

Forward and backward of one layer of the bundled base's shape (9 query heads, 3 key heads of 64), 16 rows. Prints the
best of 15 runs of each and the ratio for several prefixes and suffixes. It is the reason why
training/packing/attention.py uses matrix products up to SHORT tokens and the kernel beyond. Prints a table and one
JSON line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from tunewright.training.packing import attention

ROWS, HEADS, KEY_HEADS, SIZE = 16, 9, 3, 64


def main() -> None:
    """Time both implementations."""
    table = Table(title=f"Attention of {ROWS} rows, forward and backward, ms")
    for name in ("prefix", "suffix", "plain products", "fused kernel", "plain is"):
        table.add_column(name, justify="right")
    results = []
    for prefix, suffix in ((27, 28), (27, 60), (27, 120), (327, 28), (0, 55), (0, 120), (27, 240)):
        plain, fused = (_best(_pass(prefix, suffix, short)) for short in (10_000, 0))
        results.append({"prefix": prefix, "suffix": suffix, "plain_ms": plain, "fused_ms": fused})
        table.add_row(str(prefix), str(suffix), f"{plain:.2f}", f"{fused:.2f}", f"{fused / plain:.2f}x as fast")
    Console(width=100).print(table)
    print(json.dumps(results))


def _pass(prefix: int, suffix: int, short: int) -> Callable[[], None]:
    torch.manual_seed(0)
    query = torch.randn(ROWS, HEADS, suffix, SIZE, dtype=torch.bfloat16, requires_grad=True)
    key, value = (
        torch.randn(ROWS, KEY_HEADS, prefix + suffix, SIZE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
    )

    def run() -> None:
        attention.SHORT = short
        attention._within(query, key, value, prefix, SIZE**-0.5, None).sum().backward()

    return run


def _best(run: Callable[[], None], runs: int = 15) -> float:
    run()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


if __name__ == "__main__":
    main()
