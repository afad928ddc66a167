"""Answers of one arm without a cluster and on Ray clusters of one and two machines: seconds, processor time, digests.

    make build/ray/.installed
    build/ray/bin/python benchmarks/cluster_evaluation.py [--prompts 128] [--workers 1 2] [--rounds 1]

The bundled base of 135 million weights answers prompts of 6 to 40 random words with at most 24 tokens, in batches of 8.
The first half of the prompts is an arm of its own, whose time includes loading the base; the second half finds it
loaded. Every process computes with one thread, with and without a cluster. Each run is a process of its own; a cluster
is that of `cluster_scale.py`, and starts before the clock does. The order alternates. Processor time is that of the
command and, apart, of all of Ray's processes.

Bars: at most 10% more seconds with one worker than without a cluster, for jobs of over a minute; the same answers.
Prints a table and writes benchmarks/results/cluster_evaluation.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cluster_scale import BAR, RayProcesses, Steps, cluster, ratio, run_apart, write_pairs
from load_shown import machine

from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.data.examples import Message
from tunewright.evaluation.generations import Generator

RESULTS = Path(__file__).with_name("results") / "cluster_evaluation.json"
CONFIG = "base_model: bundled:smollm2-135m-instruct\nevaluate:\n  batch_size: 8\ntrain:\n  dtype: float32\n"
LIMIT = 24


def main() -> None:
    """Measure what the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.folder, args.one)))
        return
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder, "pairs.jsonl"), args.prompts)
        print(f"{'workers':>8} {'s':>7} {'2nd half s':>11} {'CPU s':>7} {'Ray CPU s':>10} {'load':>6}  answers")
        for count in range(args.rounds):
            counts = [0, *args.workers] if count % 2 == 0 else [*reversed(args.workers), 0]
            for workers in counts:
                runs.append(run_apart(Path(folder), workers, __file__))
                show(runs[-1])
    assert len({run["answers"] for run in runs}) == 1, "the answers differ"
    print("All runs have the same answers.")
    for workers in args.workers:
        print(
            f"{workers} worker{'s' * (workers > 1)}: {ratio(runs, workers, 's'):.2f}x the seconds without a cluster, "
            f"{ratio(runs, workers, 'second_s'):.2f}x once the base is loaded"
        )
    over = ratio(runs, 1, "s") - 1 if 1 in args.workers else None
    results = {"machine": machine(1), "prompts": args.prompts, "bar": BAR, "overhead": over, "runs": runs}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def show(run: dict[str, Any]) -> None:
    """Print a run's line."""
    print(
        f"{run['workers'] or 'none':>8} {run['s']:>7.1f} {run['second_s']:>11.1f} {run['cpu_s']:>7.1f} "
        f"{run['ray_cpu_s']:>10.1f} {run['load']:>6.1f}  {run['answers'][:12]}",
        flush=True,
    )


def measure(folder: Path, workers: int) -> dict[str, Any]:
    """Answer the prompts in a new project, on a cluster with this many machines (0: without one)."""
    root = folder / f"project-{workers}-{time.time_ns()}"
    root.mkdir()
    (root / "tunewright.yaml").write_text(CONFIG)
    with ExitStack() as stack:
        if workers:
            stack.enter_context(cluster(workers))
        project = Project(ProjectFolder(root).on_cluster("auto" if workers else None), Steps())
        processes = stack.enter_context(RayProcesses())
        began, worked = time.perf_counter(), time.process_time()
        found = stack.enter_context(project.model_workers())
        generator = Generator.of(project.folder, project.base, project.chat, "none", project.reporter, workers=found)
        texts = [json.loads(line)["prompt"] for line in (folder / "pairs.jsonl").read_text().splitlines()]
        prompts = [generator.prompt([Message("user", text)]) for text in texts]
        half = len(prompts) // 2
        answers = generator.answer("first half", prompts[:half], LIMIT)
        first = time.perf_counter()
        answers += generator.answer("second half", prompts[half:], LIMIT)
        return {
            "workers": workers,
            "s": round(time.perf_counter() - began, 1),
            "second_s": round(time.perf_counter() - first, 1),
            "cpu_s": round(time.process_time() - worked - processes.own_s, 1),
            "ray_cpu_s": round(processes.cpu_s, 1),
            "load": round(os.getloadavg()[0], 1),
            "answers": hashlib.sha256(json.dumps([answer.text for answer in answers]).encode()).hexdigest(),
        }


if __name__ == "__main__":
    main()
