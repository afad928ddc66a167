"""Time of a decoding pass by number of adapters in the batch, and the savings of two optimizations.

    python benchmarks/adapter_passes.py PROJECT [--rows 16] [--tokens 32] [--rounds 15] [--threads N]

PROJECT has a trained adapter; each row may use a separate copy of it. Each side runs in a separate process, in a
different thread from the one that loaded the base and has computed before, as in a server:

    current         with both
    one by one      each adapter is a separate product while decoding, too (generation/batched_lora.py off)
    helpers kept    the loading thread's helper threads stay alive (release_openmp_threads left out)

Prints a table of medians, and writes benchmarks/results/adapter_passes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from load_shown import machine
from rich.console import Console
from rich.table import Table

from tunewright.adapters.lora_weights import load_lora_weights
from tunewright.adapters.registry import find_adapter
from tunewright.config.project import ProjectFolder
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.generation.batched_lora import Lora
from tunewright.generation.decoding import Batch
from tunewright.generation.requests import Request
from tunewright.models.loading import load_model, release_openmp_threads
from tunewright.open_project import OpenProject

SIDES = ("current", "one by one", "helpers kept")
RESULTS = Path(__file__).with_name("results") / "adapter_passes.json"


def main() -> None:
    """Run all sides, or one of them as a child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("project", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        with ExitStack() as without:
            if options.side == "one by one":
                without.enter_context(patch("tunewright.generation.lora_dispatch._STACK_FROM_CPU", options.rows + 1))
            print(json.dumps(measure(options)))
        return
    about = machine(options.threads)
    sides = {}
    for side in SIDES:
        ran = subprocess.run([sys.executable, *sys.argv, "--side", side], stdout=subprocess.PIPE, text=True, check=True)
        sides[side] = json.loads(ran.stdout.splitlines()[-1])
    show(sides)
    settings = {name: getattr(options, name) for name in ("rows", "tokens", "rounds")}
    write_json(RESULTS, {"machine": about, "settings": settings, "median_ms": sides})


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return milliseconds by kind of pass."""
    import torch

    torch.set_num_threads(options.threads)
    opened = OpenProject(ProjectFolder(options.project), LogReporter())
    model: Any = load_model(opened.base, opened.folder.config.train.dtype, "none")
    batch = Batch(model, stop_ids=(), pad_id=0)
    loras = load_lora_weights(find_adapter(opened.folder.adapters).folder, model)
    for row in range(options.rows):
        own = {name: Lora(lora.down.clone(), lora.up.clone(), lora.scale) for name, lora in loras.items()}
        batch.add_adapter(f"{row:03}", own)
    torch.ones(2**20).norm()  # the loading thread has helpers from here on
    if options.side != "helpers kept":
        release_openmp_threads()
    took: dict[str, float] = {}
    passes = threading.Thread(target=lambda: took.update(passes_of(batch, options)))
    passes.start()
    passes.join()
    return took


def passes_of(batch: Batch, options: argparse.Namespace) -> dict[str, float]:
    """Return a pass of each kind: with no adapter, one, and one per row."""
    took = {}
    for name, own in (("base", lambda _: None), ("one", lambda _: "000"), ("each", lambda row: f"{row:03}")):
        prompts = [
            tuple((7 * place + row) % 1000 + 10 for place in range(options.tokens)) for row in range(options.rows)
        ]
        requests = [Request(prompt, own(row), 10_000) for row, prompt in enumerate(prompts)]

        def read(requests: list[Request] = requests) -> None:
            for row in list(batch.rows):
                batch.cancel(row)
            batch.admit(requests)

        took[f"{name}, prompts"] = median_ms(read, options.rounds)
        took[f"{name}, a token"] = median_ms(batch.step, options.rounds)
    return took


def median_ms(work: Callable[[], object], rounds: int) -> float:
    """Return the median time in milliseconds, after two warm-up passes."""
    times = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[2:])


def show(sides: dict[str, dict[str, float]]) -> None:
    """Print each side next to the current code."""
    table = Table("the rows' adapters, and what is done", *SIDES)
    for what, now in sides["current"].items():
        others = [f"{sides[side][what]:.0f} ms ({sides[side][what] / now:.2f}x)" for side in SIDES[1:]]
        table.add_row(what, f"{now:.0f} ms", *others)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
