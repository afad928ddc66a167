"""How long a full garbage collection stops a server: with what was loaded left out, as it is, and with it.

    python benchmarks/collector_pause.py PROJECT [--rounds 9]

While it lasts nobody gets a token. Prints both sides and their ratio.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path

import tunewright


def main() -> None:
    """Collect before the server runs, and while it does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("project", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    service = tunewright.open(options.project).serve(port=0)
    loaded = pause(options.rounds)
    with service.running():
        frozen = pause(options.rounds)
    print(f"all that is loaded: {loaded:7.1f} ms\nwhat has come since: {frozen:6.1f} ms\nratio: {loaded / frozen:.0f}x")


def pause(rounds: int) -> float:
    """The median of some full collections, in milliseconds."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        gc.collect()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


if __name__ == "__main__":
    main()
