"""Error rates of the verdict: shipping without a gain, and missing a true difference.

    python benchmarks/verdict_calibration.py [--projects 2000] [--out benchmarks/results/verdict_calibration.json]

Simulates projects whose true gain is known: 0 with a margin of 0, or exactly the margin. Their items are right and
wrong or graded, independent or in clusters of similar items. Each is evaluated: contrasts against the best
prompting arm and against a zero-shot arm that is far worse (so that Holm's adjustment does not protect the first
contrast), then the verdict. The second table holds the formula of the detectable difference against simulated power.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from tunewright.core.io import write_json
from tunewright.evidence.power import minimum_detectable_effect, power
from tunewright.evidence.schema import Evidence, Measured
from tunewright.evidence.scoring import ScoredArms, declared_contrasts, score_arm
from tunewright.evidence.statistics import exact_mcnemar
from tunewright.evidence.verdict import Verdict, verdict
from tunewright.metrics import Scores, scorer_of

RESAMPLES = 500
LIKE = 0.5
"""Share of items that do what their cluster does."""
CHANGED = 0.3
"""Share of items whose score differs between the arms."""

Kind = Literal["exact match", "graded"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """Projects of one kind."""

    kind: Kind
    clusters: int
    size: int
    gain: float
    """The true one; the margin is the same."""


KINDS: tuple[Kind, ...] = ("exact match", "graded")
SETTINGS = [
    Setting(kind, clusters, size, gain)
    for kind, (clusters, size), gain in product(KINDS, ((20, 1), (200, 1), (30, 4), (100, 3)), (0.0, 0.05))
]


def simulated(setting: Setting, rng: np.random.Generator) -> Verdict:
    """Return the verdict on one simulated project."""
    codes = np.repeat(np.arange(setting.clusters), setting.size)
    control, tuned = _scores(setting, codes, rng)
    arms = {"zero-shot": np.zeros_like(control), "retrieved-4": control, "tuned": tuned}
    return verdict(_evidence(setting, [str(code) for code in codes], arms))


def _scores(setting: Setting, codes: NDArray[np.int64], rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return the items' scores without and with the adapter; their expected mean difference is the setting's gain."""
    mean_size = 1.0 if setting.kind == "exact match" else 0.5
    up = 0.5 + setting.gain / (2 * CHANGED * mean_size)

    def changes(count: int) -> Floats:
        sizes = np.ones(count) if setting.kind == "exact match" else rng.random(count)
        signs = np.where(rng.random(count) < up, 1.0, -1.0)
        changed: Floats = np.where(rng.random(count) < CHANGED, sizes * signs, 0.0)
        return changed

    shared, own = changes(setting.clusters)[codes], changes(len(codes))
    change = np.where(rng.random(len(codes)) < LIKE, shared, own) if setting.size > 1 else own
    # Anywhere that leaves room for the change within 0 to 1.
    control = np.where(change < 0, -change, 0) + rng.random(len(codes)) * (1 - np.abs(change))
    if setting.kind == "exact match":
        control = np.round(control)
    return control, control + change


def _evidence(setting: Setting, clusters: list[str], arms: dict[str, Floats]) -> Evidence:
    scorer = scorer_of("exact_match" if setting.kind == "exact match" else "token_f1", Path())
    scores = {
        name: Scores(scorer, values, np.column_stack([values, np.ones_like(values)]), {}, 0)
        for name, values in arms.items()
    }
    scored = ScoredArms(tuple(clusters), {scorer.name: scores})
    return Evidence(
        id="0" * 12,
        project="simulated",
        metric=scorer.name,
        metrics={scorer.name: Measured(kind=scorer.kind, definition=scorer.definition)},
        margin=setting.gain,
        items=len(clusters),
        clusters=setting.clusters,
        train_items=0,
        dev_arms=[],
        best_prompting="retrieved-4",
        arms=[
            score_arm(
                name=name,
                kind="tuned" if name == "tuned" else "zero-shot",
                shots=0,
                scores=[each],
                clusters=clusters,
                truncated=0,
                prompt_tokens=1.0,
                seed=0,
                resamples=10,
            )
            for name, each in scores.items()
        ],
        contrasts=declared_contrasts(scored, [("tuned", "retrieved-4"), ("tuned", "zero-shot")], 0, RESAMPLES),
        lineage={},
    )


def shipped(setting: Setting, projects: int, seed: int = 0) -> int:
    """Count the projects that the verdict ships."""
    rng = np.random.default_rng(seed)
    return sum(simulated(setting, rng).decision == "ship" for _ in range(projects))


def found(items: int, changed: float, gain: float, projects: int, seed: int = 0) -> int:
    """Count the projects of independent right and wrong items in which the test finds this true difference."""
    rng = np.random.default_rng(seed)
    chances = [(changed - gain) / 2, 1 - changed, (changed + gain) / 2]
    names = [str(n) for n in range(items)]
    outcomes = np.array([-1.0, 0.0, 1.0])
    return sum(exact_mcnemar(rng.choice(outcomes, items, p=chances), names) < 0.05 for _ in range(projects))


def main() -> None:
    """Print both tables, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--projects", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/verdict_calibration.json"))
    options = parser.parse_args()
    projects: int = options.projects
    print(f"{projects:,} projects a row; true gain = margin")
    print(f"{'metric':<12} {'clusters':>8} {'items each':>10} {'gain':>6} {'shipped':>8}  95% interval")
    chance: list[dict[str, Any]] = []
    with ProcessPoolExecutor() as pool:
        counts = pool.map(shipped, SETTINGS, [projects] * len(SETTINGS))
    for setting, count in zip(SETTINGS, counts, strict=True):
        low, high = binomtest(count, projects).proportion_ci(method="wilson")
        chance.append({**vars(setting), "shipped": count, "share": count / projects, "low": low, "high": high})
        print(
            f"{setting.kind:<12} {setting.clusters:>8} {setting.size:>10} {setting.gain:>6.0%} "
            f"{count / projects:>8.1%}  {low:.1%} to {high:.1%}",
            flush=True,
        )
    print(f"\n{'items':>6} {'changed':>8} {'difference':>10} {'formula':>8} {'simulated':>10}")
    powers: list[dict[str, Any]] = []
    for items, changed, wanted in product((100, 300, 1000), (0.1, 0.2, 0.3), (0.5, 0.8, 0.95)):
        gain = minimum_detectable_effect(items, changed, wanted)
        if gain >= changed:
            continue
        share = found(items, changed, gain, projects) / projects
        powers.append(
            {
                "items": items,
                "changed": changed,
                "difference": gain,
                "formula": power(items, changed, gain),
                "simulated": share,
            }
        )
        print(
            f"{items:>6} {changed:>8.0%} {gain:>10.1%} {power(items, changed, gain):>8.0%} {share:>10.1%}", flush=True
        )
    write_json(options.out, {"projects": projects, "resamples": RESAMPLES, "shipped": chance, "power": powers})


if __name__ == "__main__":
    main()
