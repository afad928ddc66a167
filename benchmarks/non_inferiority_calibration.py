"""Error rate of *replace*: an adapter that is worse than the incumbent by exactly the margin.

    python benchmarks/non_inferiority_calibration.py [--projects 2000] [--out benchmarks/results/non_inferiority.json]

Simulates projects whose true loss is the margin. Items are right and wrong or graded, independent or in clusters of
different sizes whose items mostly change together. ``won`` is the share of items that the adapter gains; at 0 all
changes are losses, which is the hardest case: with few losses in sight the variance looks small. Prints the share of
projects in which the outcome is *replace*, and the same by one-sided limits at a nominal 5%.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from tunewright.core.io import write_json
from tunewright.evidence.incumbents import measured_drop
from tunewright.evidence.non_inferiority import paired_drop
from tunewright.metrics import Scores, scorer_of

LIKE = 0.7
"""Share of items that do what their cluster does."""

Kind = Literal["exact match", "graded"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """Projects of one kind."""

    kind: Kind
    clusters: int
    size: int
    """Mean items of a cluster; above 1, sizes vary."""
    margin: float
    """The true loss is the same."""
    won: float


SHAPES = ((40, 1), (300, 1), (60, 2), (100, 3))
LOSSES = ((0.02, 0.0), (0.05, 0.0), (0.05, 0.05), (0.1, 0.1))
KINDS: tuple[Kind, ...] = ("exact match", "graded")
SETTINGS = [Setting(kind, *shape, margin, won) for kind, shape, (margin, won) in product(KINDS, SHAPES, LOSSES)]


def project(setting: Setting, rng: np.random.Generator) -> tuple[Floats, Floats, list[str]]:
    """Return the incumbent's and the adapter's item scores, and the clusters; the expected loss is the margin."""
    sizes = rng.integers(1, 2 * setting.size, setting.clusters)
    codes = np.repeat(np.arange(setting.clusters), sizes)
    # Graded changes have the mean size one half, so twice as many items lose.
    scale = 1 if setting.kind == "exact match" else 2
    lost = setting.won + scale * setting.margin
    chances = [lost, setting.won, 1 - lost - setting.won]
    shared = rng.choice(3, setting.clusters, p=chances)[codes]
    own = rng.choice(3, len(codes), p=chances)
    kinds = np.where(rng.random(len(codes)) < LIKE, shared, own)
    amounts = np.ones(len(codes)) if setting.kind == "exact match" else rng.random(len(codes))
    return amounts * (kinds == 0), amounts * (kinds == 1), [str(code) for code in codes]


def replaced(setting: Setting, projects: int, seed: int = 0) -> int:
    """Count the projects in which the outcome is *replace*."""
    rng = np.random.default_rng(seed)
    scorer = scorer_of("exact_match" if setting.kind == "exact match" else "token_f1", Path())

    def scores(values: Floats) -> Scores:
        return Scores(scorer, values, np.column_stack([values, np.ones_like(values)]), {}, 0)

    count = 0
    for _ in range(projects):
        before, after, clusters = project(setting, rng)
        drop = measured_drop(scores(after), scores(before), clusters, setting.margin, seed=0)
        count += drop.outcome == "replace"
    return count


def by_one_sided_limits(setting: Setting, projects: int, seed: int = 0) -> int:
    """Count the projects in which the one-sided 95% limit alone, as for forgetting, lies below the margin."""
    rng = np.random.default_rng(seed)
    found = (project(setting, rng) for _ in range(projects))
    return sum(paired_drop(before, after, names, 0, 200).limit < setting.margin for before, after, names in found)


def main() -> None:
    """Print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--projects", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/non_inferiority.json"))
    options = parser.parse_args()
    projects: int = options.projects
    print(f"{projects:,} projects a row; true loss = margin")
    print(
        f"{'metric':<12} {'clusters':>8} {'items each':>10} {'margin':>7} {'won':>5} {'replace':>8} {'one-sided':>10}"
    )
    rows = []
    for setting in SETTINGS:
        count = replaced(setting, projects)
        limits = by_one_sided_limits(setting, projects)
        low, high = binomtest(count, projects).proportion_ci(method="wilson")
        share, naive = count / projects, limits / projects
        rows.append({**asdict(setting), "replace": share, "low": low, "high": high, "one_sided": naive})
        print(
            f"{setting.kind:<12} {setting.clusters:>8} {setting.size:>10} {setting.margin:>7.0%} {setting.won:>5.0%} "
            f"{share:>8.1%} {naive:>10.1%}",
            flush=True,
        )
    write_json(options.out, {"projects": projects, "like": LIKE, "rows": rows})


if __name__ == "__main__":
    main()
