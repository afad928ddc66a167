"""Effect of a long prompt on other requests: chunked against whole prefill.

    python benchmarks/long_prompt.py PROJECT [--tokens 2000] [--rounds 3] [--threads N]

PROJECT has a trained adapter. One request decodes all the time; a long prompt arrives, is prefilled, and gets its
first token. The sides alternate. Prints the longest wait for a token of the former and for the first token of the
latter, and writes benchmarks/results/long_prompt.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from contextlib import aclosing
from pathlib import Path
from unittest.mock import patch

import torch
from load_shown import machine
from rich.console import Console
from rich.table import Table

from tunewright.adapters.registry import adapter_digest, find_adapter
from tunewright.config.project import ProjectFolder
from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.engines import peft
from tunewright.engines.peft import PREFILL_CHUNK, PeftEngine
from tunewright.engines.protocol import stream
from tunewright.generation.requests import Request
from tunewright.models.loading import load_model, with_adapters
from tunewright.open_project import OpenProject

SIDES = {"whole": 1 << 20, f"in pieces of {PREFILL_CHUNK}": PREFILL_CHUNK}
RESULTS = Path(__file__).with_name("results") / "long_prompt.json"


def main() -> None:
    """Measure both sides in alternating rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("project", type=Path)
    parser.add_argument("--tokens", type=int, default=2000, help="of the long prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine(options.threads)
    project = ProjectFolder(options.project)
    opened = OpenProject(project, LogReporter())
    folder = find_adapter(project.adapters).folder
    adapter = adapter_digest(folder)
    model = with_adapters(load_model(opened.base, project.config.train.dtype, "none"), {adapter: folder})
    text = "A complaint about a card that was charged twice, and nobody answers. " * options.tokens
    long = Request(opened.chat.continuation(text)[: options.tokens], adapter, 2)
    engine = PeftEngine(model, stop_ids=(), pad_id=0, max_num_seqs=8, context_length=2 * options.tokens)
    waits: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    try:
        for _ in range(options.rounds):
            for name, piece in SIDES.items():
                with patch.object(peft, "PREFILL_CHUNK", piece):
                    waits[name].append(asyncio.run(measured(engine, long)))
    finally:
        engine.stop()
    medians = {name: [statistics.median(values) for values in zip(*both, strict=True)] for name, both in waits.items()}
    table = Table("a prompt of", "the other's longest wait for a token", "its own for the first")
    for name, (gap, first) in medians.items():
        table.add_row(f"{options.tokens} tokens, read {name}", f"{gap:.2f} s", f"{first:.2f} s")
    Console(width=120).print(table)
    whole, pieces = medians.values()
    print(
        f"The others wait {whole[0] / pieces[0]:.1f} times less, the long one {pieces[1] / whole[1]:.2f} times as long."
    )
    write_json(RESULTS, {"machine": about, "tokens": options.tokens, "rounds": options.rounds, "median_s": medians})


async def measured(engine: PeftEngine, long: Request) -> tuple[float, float]:
    """Return a stream's longest gap between tokens during the prefill, and the long prompt's time to first token."""
    gaps: list[float] = []
    first: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def ask() -> None:
        began = time.perf_counter()
        async with aclosing(stream(engine, long)) as deltas:
            async for _ in deltas:
                first.set_result(time.perf_counter() - began)
                return

    async with aclosing(stream(engine, Request(long.prompt_ids[:20], None, len(long.prompt_ids)))) as deltas:
        for _ in range(5):  # it is in progress
            await anext(deltas)
        last, asking = time.perf_counter(), asyncio.create_task(ask())
        while not asking.done():
            await anext(deltas)
            gaps.append(time.perf_counter() - last)
            last += gaps[-1]
    return max(gaps), first.result()


if __name__ == "__main__":
    main()
