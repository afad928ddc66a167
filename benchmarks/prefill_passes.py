"""The processor time of a prompt token by how many tokens are prefilled in one pass.

    python benchmarks/prefill_passes.py [--rows 32] [--shortest 200] [--longest 330] [--rounds 3] [--sizes 8192 2048]

Prompts of random tokens, as long as those with eight retrieved demonstrations of the demo, go through the bundled base
in bfloat16. The sides take turns, so that other programs on the machine disturb all of them. Prints medians of the
processor time, the ratio to the first side, and how many prompts get the first side's next token. Writes
benchmarks/results/prefill_passes.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from load_shown import machine
from rich.console import Console
from rich.table import Table

from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.generation.decoding import Batch
from tunewright.generation.generate import prefill_groups
from tunewright.generation.requests import Request
from tunewright.models.bases import resolve_base
from tunewright.models.loading import load_model

RESULTS = Path(__file__).with_name("results") / "prefill_passes.json"


def main() -> None:
    """Time all sides and show them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--shortest", type=int, default=200)
    parser.add_argument("--longest", type=int, default=330)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 2048, 1024])
    options = parser.parse_args()
    model = load_model(resolve_base("bundled:smollm2-135m-instruct", None, Path(), LogReporter()), "bfloat16", "none")
    draw = random.Random(0)
    vocabulary = range(model.config.vocab_size)
    lengths = [draw.randint(options.shortest, options.longest) for _ in range(options.rows)]
    requests = [Request(tuple(draw.choices(vocabulary, k=length)), None, 1) for length in lengths]
    times: dict[int, list[float]] = {size: [] for size in options.sizes}
    tokens: dict[int, list[int]] = {}
    for _ in range(options.rounds):
        for size in options.sizes:
            milliseconds, tokens[size] = prefilled(model, requests, size)
            times[size].append(milliseconds)
    first = options.sizes[0]
    sides = {
        size: {
            "ms_per_token": statistics.median(taken),
            "ratio": statistics.median(times[first]) / statistics.median(taken),
            "same_next_token": sum(a == b for a, b in zip(tokens[size], tokens[first], strict=True)),
        }
        for size, taken in times.items()
    }
    table = Table(
        title=f"{options.rows} prompts of {options.shortest} to {options.longest} tokens", title_justify="left"
    )
    for name in ("tokens of a pass", "ms of a token", "ratio", "same next token"):
        table.add_column(name, justify="right")
    for size, side in sides.items():
        same = f"{side['same_next_token']} of {options.rows}"
        table.add_row(f"{size:,}", f"{side['ms_per_token']:.3f}", f"{side['ratio']:.2f}x", same)
    Console().print(table)
    write_json(
        RESULTS,
        {"machine": machine(torch.get_num_threads()), "settings": vars(options), "rounds": times, "sides": sides},
    )


def prefilled(model: Any, requests: list[Request], size: int) -> tuple[float, list[int]]:
    """Return the milliseconds of processor time of a token, padding not counted, and each prompt's next token."""
    batch = Batch(model, stop_ids=[], pad_id=0)
    next_tokens = [0] * len(requests)
    began = time.process_time()
    for places in prefill_groups([len(request.prompt_ids) for request in requests], size):
        for place, row in zip(places, batch.admit([requests[place] for place in places]), strict=True):
            next_tokens[place] = row.ids[0]
    seconds = time.process_time() - began
    return 1000 * seconds / sum(len(request.prompt_ids) for request in requests), next_tokens


if __name__ == "__main__":
    main()
