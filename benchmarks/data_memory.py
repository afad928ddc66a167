"""Memory and processor time of ``data add`` for each row, by step, at several sizes; also of an earlier state.

    .venv/bin/python benchmarks/data_memory.py [--rows 50000 100000 200000] [--against FOLDER/src]

The rows are those of ``cluster_scale.py``: 220 characters on average. Each run is a process of its own. Memory is the
peak of the whole process; what a further row takes is the slope between the smallest and the largest size, so that what
every run takes (Python, libraries, steps with parts of a fixed size) is left out. ``--against`` runs another state of
tunewright too, and compares the files of both.

Prints a table and writes benchmarks/results/data_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster_runs import Steps
from cluster_scale import CONFIG, digest, write_pairs
from load_shown import machine

from tunewright.api import Project
from tunewright.config.project import ProjectFolder

RESULTS = Path(__file__).with_name("results") / "data_memory.json"
HERE = Path(__file__).resolve().parents[1] / "src"


def main() -> None:
    """Measure what the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--against", type=Path, help="the src folder of another state")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one)))
        return
    if args.against and not (args.against / "tunewright").is_dir():
        parser.error(f"--against: no tunewright in {args.against}")
    sources = [HERE, *([args.against.resolve()] if args.against else [])]
    runs: list[dict[str, Any]] = []
    print(f"{'rows':>10} {'state':>8} {'CPU s':>8} {'peak MB':>8}  files")
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_pairs(Path(folder, "pairs.jsonl"), rows)
            for source in sources:
                state = "here" if source == HERE else "against"
                runs.append({"rows": rows, "state": state, **run_apart(Path(folder), source)})
                run = runs[-1]
                print(
                    f"{rows:>10,} {state:>8} {run['cpu_s']:>8.1f} {run['peak'] / 1e6:>8.0f}  {run['files'][:12]}",
                    flush=True,
                )
        assert len({run["files"] for run in runs if run["rows"] == rows}) == 1, "the datasets differ"
    for state in ("here", "against"):
        show_costs([run for run in runs if run["state"] == state], state)
    RESULTS.write_text(json.dumps({"machine": machine(1), "runs": runs}, indent=2) + "\n", encoding="utf-8")


def run_apart(folder: Path, source: Path) -> dict[str, Any]:
    """Build the dataset in a process of its own, with this state of tunewright."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", str(folder)]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    run: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return run


def show_costs(runs: list[dict[str, Any]], state: str) -> None:
    """Print what a further row costs."""
    if len(runs) < 2:
        return
    few, many = runs[0], runs[-1]
    rows = many["rows"] - few["rows"]
    print(f"\n{state}: {(many['peak'] - few['peak']) / rows:,.0f} bytes of memory for a further row, in µs:")
    for name in many["steps"]:
        print(f"  {name:<26} {(many['steps'][name] - few['steps'].get(name, 0)) / rows * 1e6:>7.1f}")
    whole = (many["cpu_s"] - few["cpu_s"]) / rows * 1e6
    between = whole - (sum(many["steps"].values()) - sum(few["steps"].values())) / rows * 1e6
    print(f"  {'between the steps':<26} {between:>7.1f}\n  {'all':<26} {whole:>7.1f}")


def measure(folder: Path) -> dict[str, Any]:
    """Build the dataset in a new project."""
    steps = Steps(time.process_time)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        (root / "tunewright.yaml").write_text(CONFIG)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        Project(ProjectFolder(root), steps).data.add([folder / "pairs.jsonl"])
        return {
            "cpu_s": time.process_time() - began,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "start": before * 1024,
            "steps": steps.seconds,
            "files": digest(root / "dataset"),
        }


if __name__ == "__main__":
    main()
