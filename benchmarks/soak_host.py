"""The server of `soak.py` and `crowd.py`: a project on a tiny base, served in a separate process.

The process serves the project as `tunewright serve` does. Each line of its input asks for one look inside, which no
other process can take: ``{"do": "objects"}`` returns the number of objects, tasks and timers since the server started.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from load_tenants import disturbed

import tunewright
from making.command_line import tiny_project
from making.tiny_bases import build_base
from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.core.progress import LogReporter
from tunewright.serving.options import ServeOptions

NOISE = 10.0
"""What the adapters' weights differ by: enough for other answers."""


def make_project(folder: Path, adapters: int, seed: int) -> list[Adapter]:
    """Train an adapter on a tiny base in ``folder``, and return it with versions of it that answer differently."""
    project = tunewright.open(tiny_project(folder, build_base(folder / "base")), LogReporter())
    project.data.add([folder / "pairs.jsonl"])
    project.train()
    trained = find_adapter(project.folder.adapters)
    return [trained, *(disturbed(project.folder.adapters, trained, seed + n, NOISE) for n in range(1, adapters))]


class Host:
    """The server's process; ``url`` is its address, and ``metrics`` that of its metrics. It writes a log file."""

    def __init__(self, project: Path) -> None:
        self._log = project / "server.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(project)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.pid = self._process.pid
        ready = self._read()
        self.url: str = ready["url"]
        self.metrics: str = ready["metrics"]

    def objects(self) -> dict[str, Any]:
        """Return counts of the objects since the server started, after a garbage collection."""
        assert self._process.stdin is not None
        print(json.dumps({"do": "objects"}), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server has ended:\n{self._log.read_text()[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *raised: object) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> None:
    """Serve until the input ends."""
    # What the libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch

    torch.set_num_threads(1)
    service = tunewright.open(sys.argv[1], LogReporter()).serve(options=ServeOptions(port=0, metrics_port=0))
    with service.running() as url:
        print(json.dumps({"url": url, "metrics": service.metrics_url}), file=answers, flush=True)
        for line in sys.stdin:
            assert json.loads(line)["do"] == "objects"
            print(json.dumps(_objects()), file=answers, flush=True)


def _objects() -> dict[str, Any]:
    """Count the objects that the collector tracks; those from before the start are exempt from it."""
    gc.collect()
    alive = gc.get_objects()
    kinds = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in alive)
    tasks = sum(isinstance(one, asyncio.Task) and not one.done() for one in alive)
    return {"objects": len(alive), "tasks": tasks, "kinds": dict(kinds.most_common(60))}


if __name__ == "__main__":
    main()
