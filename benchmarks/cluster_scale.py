"""``data add`` without a cluster and on Ray clusters of one and two machines: seconds, processor time, memory, digests.

    make build/ray/.installed
    build/ray/bin/python benchmarks/cluster_scale.py [--rows 200000] [--workers 0 1 2] [--rounds 1]

Rows of 6 to 40 random words; some are from two templates, some nearly repeat the one before, some answers are frequent.
Each run is a process of its own. A cluster is a head without CPUs and one raylet with one CPU for each worker, all on
this machine; it starts before the clock does, and joining it is a part of the time. The order alternates. Seconds
depend on what else runs here; processor time does so less. It is that of the command and, apart, of all of Ray's
processes. Memory is the peak of the command's own, and of the workers' sum without pages that they share.

Bars: at most 10% more seconds with one worker than without a cluster, for jobs of over a minute; the same files.
Prints a table and writes benchmarks/results/cluster_scale.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from load_shown import machine

from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter, LogTask, Task

RESULTS = Path(__file__).with_name("results") / "cluster_scale.json"
CONFIG = "data:\n  conflicts: accept\n"
TEMPLATES = (
    "What is the balance of account {number} held by {name} at the end of the month?",
    "Please transfer {number} euros from my savings account to {name} before next Friday.",
)
BAR = 0.10


def main() -> None:
    """Measure what the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="0: without a cluster")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.folder, args.one)))
        return
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_pairs(Path(folder, "pairs.jsonl"), args.rows)
        print(f"{args.rows:,} rows, {pairs.stat().st_size / 1e6:.0f} MB")
        print(f"{'workers':>8} {'s':>7} {'CPU s':>7} {'Ray CPU s':>10} {'peak GB':>8} {'workers GB':>11}  version")
        for count in range(args.rounds):
            for workers in args.workers if count % 2 == 0 else reversed(args.workers):
                runs.append(run_apart(Path(folder), workers))
                show(runs[-1])
    assert len({run["files"] for run in runs}) == 1, "the datasets differ"
    print("All datasets have the same files.")
    compared = [workers for workers in args.workers if workers and 0 in args.workers]
    for workers in compared:
        print(f"{workers} worker{'s' * (workers > 1)}: {ratio(runs, workers, 's'):.2f}x the seconds without a cluster")
    over = ratio(runs, 1, "s") - 1 if 1 in compared else None
    results = {"machine": machine(1), "rows": args.rows, "bar": BAR, "overhead": over, "runs": runs}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def run_apart(folder: Path, workers: int, script: str = __file__) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, script, "--one", str(workers), "--folder", str(folder)]
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    run: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return run


def ratio(runs: list[dict[str, Any]], workers: int, key: str) -> float:
    """Return the smallest value with this many workers, as a share of the smallest without a cluster."""
    with_cluster, without = (min(run[key] for run in runs if run["workers"] == n) for n in (workers, 0))
    return float(with_cluster / without)


def show(run: dict[str, Any]) -> None:
    """Print a run's line."""
    print(
        f"{run['workers'] or 'none':>8} {run['s']:>7.1f} {run['cpu_s']:>7.1f} {run['ray_cpu_s']:>10.1f} "
        f"{run['peak_gb']:>8.2f} {run['workers_gb']:>11.2f}  {run['files'][:12]}",
        flush=True,
    )


def write_pairs(path: Path, count: int) -> Path:
    """Write a file of different pairs."""
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(3, 9))) for _ in range(20_000)]
    text, answer = "none", "none"
    seen: set[bytes] = set()
    with path.open("w", encoding="utf-8") as file:
        while len(seen) < count:
            kind, label = draw.random(), f"label {draw.randint(0, 20)}"
            if kind < 0.1:
                text = draw.choice(TEMPLATES).format(
                    number=draw.randrange(100_000), name=" ".join(draw.choices(words, k=2))
                )
                answer = label
            elif kind < 0.2 and len(text) < 400:
                text = f"{text} {draw.choice(words)}"
            else:
                text = " ".join(draw.choices(words, k=draw.randint(6, 40)))
                answer = draw.choice([label, " ".join(draw.choices(words, k=12))])
            if (known := hashlib.blake2b(text.encode(), digest_size=8).digest()) not in seen:
                seen.add(known)
                file.write(json.dumps({"prompt": text, "completion": answer}) + "\n")
    return path


class Steps(LogReporter):
    """A reporter that measures each step, and writes what it took to standard error: a long run can be followed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def say(self, message: str) -> None:
        """Say nothing."""

    def warn(self, message: str) -> None:
        """Warn of nothing: the rows are made up."""

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        """Measure a step."""
        del total, unit
        began = time.perf_counter()
        yield LogTask()
        self.seconds[title] = round(self.seconds.get(title, 0) + time.perf_counter() - began, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"{time.strftime('%X')} {title}: {self.seconds[title]:,.0f} s, peak {peak:.2f} GB", file=sys.stderr)


def measure(folder: Path, workers: int) -> dict[str, Any]:
    """Build the dataset in a new project, on a cluster with this many machines (0: without one)."""
    root = folder / f"project-{workers}-{time.time_ns()}"
    root.mkdir()
    (root / "tunewright.yaml").write_text(CONFIG)
    steps = Steps()
    with ExitStack() as stack:
        if workers:
            stack.enter_context(cluster(workers))
        project = ProjectFolder(root).on_cluster("auto" if workers else None)
        processes = stack.enter_context(RayProcesses())
        began, worked = time.perf_counter(), time.process_time()
        Project(project, steps).data.add([folder / "pairs.jsonl"])
        return {
            "workers": workers,
            "s": round(time.perf_counter() - began, 1),
            "cpu_s": round(time.process_time() - worked - processes.own_s, 1),
            "ray_cpu_s": round(processes.cpu_s, 1),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
            "workers_gb": round(processes.peak / 1e9, 2),
            "steps": steps.seconds,
            "files": digest(root / "dataset"),
        }


@contextmanager
def cluster(workers: int) -> Iterator[None]:
    """Start a head without CPUs and machines with one each."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(workers):
        started.add_node(num_cpus=1, object_store_memory=500 * 2**20)
    os.environ["RAY_ADDRESS"] = started.address
    try:
        yield
    finally:
        started.shutdown()


class RayProcesses:
    """Ray's processes, looked at every two seconds: they end with the command, before it could ask them.

    Attributes:
        peak: bytes of the workers together, without the pages that they share.
        seconds: processor time of each process, by its number.
        own_s: processor time of looking, which the command does not need.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.seconds: dict[int, float] = {}
        self.own_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> RayProcesses:
        self._before = sum(self._look().values())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        """Processor time since the start."""
        return sum(self.seconds.values()) - self._before

    def _watch(self) -> None:
        while not self._stop.wait(2):
            self.seconds |= self._look()
            self.own_s = time.thread_time()

    def _look(self) -> dict[int, float]:
        seconds, memory = {}, 0
        for process in psutil.Process().children(recursive=True):
            try:
                seconds[process.pid] = sum(process.cpu_times()[:2])
                if process.name().startswith("ray::"):
                    used = process.memory_info()
                    memory += used.rss - used.shared
            except psutil.NoSuchProcess:
                continue
        self.peak = max(self.peak, memory)
        return seconds


def digest(dataset: Path) -> str:
    """Return one digest of all files but the manifest, which has the time."""
    whole = hashlib.sha256()
    for path in sorted(dataset.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            whole.update(f"{path.relative_to(dataset)}\0".encode() + path.read_bytes())
    return whole.hexdigest()


if __name__ == "__main__":
    main()
