"""Speed of decoding and training on the CPU, alone and next to another busy process, by OpenMP's spin count.

    python benchmarks/busy_machine.py [--rounds 3] [--seconds 5] [--busy 1] [--spins 300000 10000]

An OpenMP thread that waits for the others spins first and sleeps later. The spin count decides when; libgomp's own is
300,000. Each side is a process of its own on the bundled base in bfloat16: it decodes 16 rows, then makes steps of LoRA
on all linear layers. Sides and loads take turns. Prints medians, and the ratio to the first side under the same load.
Writes benchmarks/results/busy_machine.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from load_shown import machine
from rich.console import Console
from rich.table import Table

from tunewright.core.io import write_json

RESULTS = Path(__file__).with_name("results") / "busy_machine.json"
ROWS, PROMPT, ANSWER = 16, 40, 24
MEASURES = ("decode", "train")


def main() -> None:
    """Time all sides under all loads and show them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--busy", type=int, default=1, help="other processes, each busy on one core")
    parser.add_argument("--spins", type=int, nargs="+", default=[300_000, 10_000])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(_speeds(asked.seconds)))
        return
    loads = (0, asked.busy)
    runs: dict[tuple[int, int], list[dict[str, float]]] = {(load, spin): [] for load in loads for spin in asked.spins}
    for number in range(asked.rounds):
        for load, spin in runs:
            runs[load, spin].append(_run(load, spin, asked.seconds))
            print(f"round {number + 1}, {load} busy, spin count {spin}: {runs[load, spin][-1]}", file=sys.stderr)
    rows = [
        {
            "busy": load,
            "spins": spin,
            **{name: statistics.median(run[name] for run in measured) for name in MEASURES},
            "runs": measured,
        }
        for (load, spin), measured in runs.items()
    ]
    write_json(RESULTS, {"machine": machine(os.cpu_count() or 1), "rounds": asked.rounds, "rows": rows})
    _show(rows, asked.spins[0])


def _run(load: int, spin: int, seconds: float) -> dict[str, float]:
    """Return a side's tokens per second, measured next to ``load`` busy processes."""
    with ExitStack() as others:
        for _ in range(load):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            others.callback(other.wait)
            others.callback(other.kill)
        done = subprocess.run(
            [sys.executable, __file__, "--child", "--seconds", str(seconds)],
            env={**os.environ, "GOMP_SPINCOUNT": str(spin)},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _speeds(seconds: float) -> dict[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model

    from tunewright.core.progress import LogReporter
    from tunewright.generation.generate import generate
    from tunewright.generation.requests import Request
    from tunewright.models.bases import resolve_base
    from tunewright.models.loading import load_model

    model = load_model(resolve_base("bundled:smollm2-135m-instruct", None, Path(), LogReporter()), "bfloat16", "none")
    ids = torch.randint(100, 40_000, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    requests = [Request(tuple(row), None, ANSWER) for row in ids.tolist()]

    def decode() -> None:
        generate(model, requests, stop_ids=(), pad_id=0, batch_size=ROWS)

    decoded = _per_second(decode, ROWS * ANSWER, seconds)
    tuned: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    def step() -> None:
        tuned(input_ids=ids, labels=ids).loss.backward()

    return {"decode": decoded, "train": _per_second(step, ids.numel(), seconds)}


def _per_second(work: Any, tokens: int, seconds: float) -> float:
    work()  # the first call allocates
    began, times = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        work()
        times += 1
    return tokens * times / passed


def _show(rows: list[dict[str, Any]], first: int) -> None:
    table = Table(title=f"Tokens per second, {machine(os.cpu_count() or 1)['cpu']}")
    for column in ("busy processes", "spin count", *(c for name in MEASURES for c in (name, "ratio"))):
        table.add_column(column, justify="right")
    for row in rows:
        reference = next(r for r in rows if r["busy"] == row["busy"] and r["spins"] == first)
        cells = (c for name in MEASURES for c in (f"{row[name]:,.0f}", f"{row[name] / reference[name]:.2f}x"))
        table.add_row(str(row["busy"]), f"{row['spins']:,}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
