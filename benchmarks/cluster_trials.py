"""`crossval` without a cluster and on Ray clusters of one and two machines: seconds, processor time, digests.

    make build/ray/.installed
    build/ray/bin/python benchmarks/cluster_trials.py [--folds 4] [--rows 200] [--workers 1 2] [--rounds 1]

Four folds train on a random base of 5 million weights and answer with a few tokens. Every process computes with one
thread, with and without a cluster. Each run is a process of its own; a cluster is that of `cluster_scale.py`, and
starts before the clock does. The folds' trainings are done by the cluster, all answers by the command. The
order alternates. Processor time is that of the command and, apart, of all of Ray's processes.

Bars: at most 10% more seconds with one worker than without a cluster, for jobs of over a minute; the same adapters.
Prints a table and writes benchmarks/results/cluster_trials.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cluster_scale import BAR, RayProcesses, Steps, cluster, ratio, run_apart
from load_shown import machine

from tunewright.adapters.registry import list_adapters
from tunewright.api import Project
from tunewright.config.project import ProjectFolder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from command_line import tiny_project
from tiny import build_base

RESULTS = Path(__file__).with_name("results") / "cluster_trials.json"
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}


def main() -> None:
    """Measure what the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--rows", type=int, default=200)
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
        prepare(Path(folder), args.rows, args.folds)
        print(f"{'workers':>8} {'s':>7} {'trainings s':>12} {'CPU s':>7} {'Ray CPU s':>10} {'load':>6}  adapters")
        for count in range(args.rounds):
            counts = [0, *args.workers] if count % 2 == 0 else [*reversed(args.workers), 0]
            for workers in counts:
                runs.append(run_apart(Path(folder), workers, __file__))
                show(runs[-1])
    assert len({run["adapters"] for run in runs}) == 1, "the adapters differ"
    print("All runs have the same adapters.")
    for workers in args.workers:
        print(f"{workers} worker{'s' * (workers > 1)}: {ratio(runs, workers, 's'):.2f}x the seconds without a cluster")
    over = ratio(runs, 1, "s") - 1 if 1 in args.workers else None
    results = {
        "machine": machine(1),
        "rows": args.rows,
        "folds": args.folds,
        "bar": BAR,
        "overhead": over,
        "runs": runs,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def prepare(folder: Path, rows: int, folds: int) -> None:
    """Write the base and a project with data."""
    base = build_base(folder / "base", **SHAPE)
    project = tiny_project(folder / "project", base, count=rows)
    config = project / "tunewright.yaml"
    text = config.read_text().replace("epochs: 2", "epochs: 3\n  eval_max_samples: 0")
    config.write_text(text.replace("num_fewshot: [1, 2]", "num_fewshot: [1]\n  retrievers: []\n  max_new_tokens: 4"))
    (folder / "folds").write_text(str(folds))
    Project(ProjectFolder(project), Steps()).data.add([project / "pairs.jsonl"])


def measure(folder: Path, workers: int) -> dict[str, Any]:
    """Cross-validate a copy of the project, on a cluster with this many machines (0: without one)."""
    root = folder / f"project-{workers}-{time.time_ns()}"
    shutil.copytree(folder / "project", root)
    steps = Steps()
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        if workers:
            stack.enter_context(cluster(workers))
        project = Project(ProjectFolder(root).on_cluster("auto" if workers else None), steps)
        processes = stack.enter_context(RayProcesses())
        began, worked = time.perf_counter(), time.process_time()
        project.crossval(folds=int((folder / "folds").read_text()), force=True)
        seconds = time.perf_counter() - began
        adapters = list_adapters(root / ".tunewright" / "crossval" / "adapters")
        return {
            "workers": workers,
            "s": round(seconds, 1),
            "trainings_s": round(sum(adapter.lineage["training"]["seconds"] for adapter in adapters), 1),
            "cpu_s": round(time.process_time() - worked - processes.own_s, 1),
            "ray_cpu_s": round(processes.cpu_s, 1),
            "load": round(load, 1),
            "steps": steps.seconds,
            "adapters": ",".join(sorted(adapter.digest[:12] for adapter in adapters)),
        }


def show(run: dict[str, Any]) -> None:
    """Print a run's line."""
    print(
        f"{run['workers'] or 'none':>8} {run['s']:>7.1f} {run['trainings_s']:>12.1f} {run['cpu_s']:>7.1f} "
        f"{run['ray_cpu_s']:>10.1f} {run['load']:>6.1f}  {run['adapters']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
