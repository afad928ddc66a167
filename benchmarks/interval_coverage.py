"""Coverage of the 95% interval of a difference: tunewright's interval and the plain cluster bootstrap.

    python benchmarks/interval_coverage.py

Simulates paired outcomes with a known difference, in clusters of similar items. Prints a table and one JSON line.
"""

from __future__ import annotations

import json
from itertools import product

import numpy as np
from numpy.typing import NDArray

from tunewright.evidence.statistics import bootstrap_sums, cluster_sums, difference_interval

RUNS, RESAMPLES = 1_000, 1_000


def main() -> None:
    """Simulate 12 settings: clusters, items per cluster, shares fixed and broken."""
    print(f"{'clusters':>8} {'items each':>10} {'fixed':>6} {'broken':>6} {'plain':>7} {'ours':>7}")
    results = []
    for clusters, size, (fixed, broken) in product((8, 30, 100), (1, 4), ((0.2, 0.1), (0.02, 0.0))):
        plain, ours = _coverage(clusters, size, fixed, broken)
        results.append(
            {"clusters": clusters, "size": size, "fixed": fixed, "broken": broken, "plain": plain, "ours": ours}
        )
        print(f"{clusters:>8} {size:>10} {fixed:>6} {broken:>6} {plain:>7.1%} {ours:>7.1%}")
    print(json.dumps(results))


def _coverage(clusters: int, size: int, fixed: float, broken: float) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    names = [str(n // size) for n in range(clusters * size)]
    truth = fixed - broken
    plain = ours = 0
    for run in range(RUNS):
        changes = _changes(rng, clusters, size, fixed, broken)
        sums = cluster_sums(np.column_stack([changes, np.ones_like(changes)]), names)
        drawn = bootstrap_sums(sums, run, RESAMPLES)
        low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
        plain += low <= truth <= high
        interval = difference_interval(changes, names, run, RESAMPLES)
        ours += interval.low <= truth <= interval.high
    return plain / RUNS, ours / RUNS


def _changes(rng: np.random.Generator, clusters: int, size: int, fixed: float, broken: float) -> NDArray[np.float64]:
    """Return +1, 0 or -1 for each item; half of the items follow their cluster."""
    outcomes, chances = [1.0, 0.0, -1.0], [fixed, 1 - fixed - broken, broken]
    shared = np.repeat(rng.choice(outcomes, clusters, p=chances), size)
    own = rng.choice(outcomes, clusters * size, p=chances)
    return np.where(rng.random(clusters * size) < 0.5, shared, own)


if __name__ == "__main__":
    main()
