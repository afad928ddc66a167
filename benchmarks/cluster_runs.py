"""Runs without a cluster and on Ray clusters of one and more machines, for the benchmarks `cluster_*.py`.

Each run is a process of its own. A cluster is a head without CPUs and one raylet with one CPU for each worker, all on
this machine; it starts before the clock does, and joining it is a part of the time. The order alternates. Every process
computes with one thread and has the same priority; Ray would give workers a lower one. Seconds depend on
what else runs here; processor time does so less. It is that of the command and, apart, of all of Ray's processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from load_shown import machine

from tunewright.core.progress import LogReporter, LogTask, Task

BAR = 0.10
"""Share of seconds that one worker may take more than no cluster, for jobs of over a minute."""

Sizes = Mapping[str, int]
Run = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A benchmark with and without clusters.

    Args:
        script: its file.
        help: its docstring.
        sizes: its options, with their defaults.
        prepare: writes what all runs need into a folder.
        measure: one run in that folder, on a cluster with this many machines (0: without one).
        columns: the keys of a run that are printed, with their titles.
        same: the key of what must not differ.
        ratios: the keys of which the share of no cluster's is printed.
    """

    script: str
    help: str
    sizes: Sizes
    prepare: Callable[[Path, Sizes], None]
    measure: Callable[[Path, int], Run]
    columns: Mapping[str, str]
    same: str
    ratios: tuple[str, ...] = ("s",)

    @property
    def results(self) -> Path:
        """The file that has the results."""
        script = Path(self.script)
        return script.parent / "results" / f"{script.stem}.json"

    def main(self) -> None:
        """Measure what the command line requests."""
        parser = argparse.ArgumentParser(description=self.help, formatter_class=argparse.RawDescriptionHelpFormatter)
        for name, default in self.sizes.items():
            parser.add_argument(f"--{name}", type=int, default=default)
        parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="0: without a cluster")
        parser.add_argument("--rounds", type=int, default=1)
        parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
        parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
        args = parser.parse_args()
        if args.one is not None:
            print(json.dumps(self.measure(args.folder, args.one)))
            return
        sizes = {name: getattr(args, name) for name in self.sizes}
        runs = self._runs(sizes, args.workers, args.rounds)
        assert len({run[self.same] for run in runs}) == 1, f"the {self.same} differ"
        print(f"All runs have the same {self.same}.")
        compared = [workers for workers in args.workers if workers and 0 in args.workers]
        shares = {workers: self._shares(runs, workers) for workers in compared}
        results = {"machine": machine(1), **sizes, "bar": BAR, "shares": shares, "runs": runs}
        self.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    def _runs(self, sizes: Sizes, workers: list[int], rounds: int) -> list[Run]:
        titles = {"workers": "workers", **self.columns}
        print("  ".join(f"{title:>8}" for title in titles.values()))
        runs: list[Run] = []
        with tempfile.TemporaryDirectory() as folder:
            self.prepare(Path(folder), sizes)
            for count in range(rounds):
                for number in workers if count % 2 == 0 else reversed(workers):
                    runs.append(self._apart(Path(folder), number))
                    cells = [_cell(runs[-1][key]).rjust(max(len(title), 8)) for key, title in titles.items()]
                    print("  ".join(cells), flush=True)
        return runs

    def _apart(self, folder: Path, workers: int) -> Run:
        """Measure in a process of its own."""
        command = [sys.executable, self.script, "--one", str(workers), "--folder", str(folder)]
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",
        }
        ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        run: Run = json.loads(ran.stdout.splitlines()[-1])
        return {"workers": workers, **run}

    def _shares(self, runs: list[Run], workers: int) -> dict[str, float]:
        """Print and return the smallest values with this many workers, as shares of the smallest without a cluster."""
        shares = {
            key: round(_least(runs, workers, key) / _least(runs, 0, key), 2) for key in (*self.ratios, "all_cpu_s")
        }
        text = ", ".join(f"{key} {share:.2f}x" for key, share in shares.items())
        print(f"{workers} worker{'s' * (workers > 1)}, compared with no cluster: {text}")
        return shares


def _least(runs: list[Run], workers: int, key: str) -> float:
    return min(float(run[key]) for run in runs if run["workers"] == workers)


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)[:12]


class Steps(LogReporter):
    """A reporter that measures each step, and writes what it took to standard error: a long run can be followed.

    Args:
        clock: what is measured: seconds by the clock, or ``time.process_time``.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}

    def say(self, message: str) -> None:
        """Say nothing."""

    def warn(self, message: str) -> None:
        """Warn of nothing: the data is made up."""

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        """Measure a step."""
        del total, unit
        began = self.clock()
        yield LogTask()
        self.seconds[title] = round(self.seconds.get(title, 0) + self.clock() - began, 3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"{time.strftime('%X')} {title}: {self.seconds[title]:,.0f} s, peak {peak:.2f} GB", file=sys.stderr)


@contextmanager
def clocked(workers: int) -> Iterator[Clock]:
    """Start a cluster with this many machines (0: none), and then the clock."""
    with ExitStack() as stack:
        if workers:
            stack.enter_context(_cluster(workers))
        yield stack.enter_context(Clock())


@contextmanager
def _cluster(workers: int) -> Iterator[None]:
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(workers):
        started.add_node(num_cpus=1, object_store_memory=500 * 2**20)
    os.environ["RAY_ADDRESS"] = started.address
    try:
        yield
    finally:
        started.shutdown()


class Clock:
    """Seconds and processor time; Ray's processes are looked at every two seconds, since they end with the command.

    Attributes:
        peak: bytes of the workers together, without the pages that they share.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._load = os.getloadavg()[0]
        self._seconds: dict[int, float] = {}
        self._own_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Clock:
        self._before = sum(self._look().values())
        self._thread.start()
        self._began, self._worked = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def times(self) -> Run:
        """Return the times so far, and the load before: without those of looking, which the command does not need."""
        own, rays = time.process_time() - self._worked - self._own_s, sum(self._seconds.values()) - self._before
        return {
            "s": round(time.perf_counter() - self._began, 1),
            "cpu_s": round(own, 1),
            "ray_cpu_s": round(max(rays, 0.0), 1),
            "all_cpu_s": round(own + max(rays, 0.0), 1),
            "load": round(self._load, 1),
        }

    def _watch(self) -> None:
        while not self._stop.wait(2):
            self._seconds |= self._look()
            self._own_s = time.thread_time()

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
