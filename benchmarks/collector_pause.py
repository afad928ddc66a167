"""Pause of a server by a full garbage collection: with the loaded objects frozen (as served), and with them collected.

    python benchmarks/collector_pause.py PROJECT [--rounds 9]

No client gets a token during the pause. Prints both sides and their ratio.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path

import tunewright
from tunewright.serving.options import ServeOptions


def main() -> None:
    """Time a collection before the server runs, and while it runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("project", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    service = tunewright.open(options.project).serve(options=ServeOptions(port=0))
    loaded = pause(options.rounds)
    with service.running():
        frozen = pause(options.rounds)
    print(f"loaded objects: {loaded:7.1f} ms\nwhat has come since: {frozen:6.1f} ms\nratio: {loaded / frozen:.0f}x")


def pause(rounds: int) -> float:
    """Return the median time of full collections, in milliseconds."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        gc.collect()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


if __name__ == "__main__":
    main()
