"""False stops and power of a shadow that is looked at after every unit.

    python benchmarks/shadow_calibration.py [--runs 2000] [--out benchmarks/results/shadow_calibration.json]

The first table simulates shadows without a difference, whose mean difference drifts, or whose rare differing answers
are all worse. A run stops falsely if the bounds exclude the true running mean at any look. The 99% interval of the
share of such runs must begin at 5% or below, and the share must be at most 5.5%; otherwise the exit code is 1. *Fixed
interval* is the share in which the usual 95% interval excludes it at any look from the 100th on. The second table has
candidates that are worse, with 12% differing answers: the requests and the labels until the upper bound is below 0.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from tunewright.core.io import write_json
from tunewright.evidence.confidence_sequences import (
    FEWEST_UNITS,
    confidence_sequence,
    empirical_bernstein_boundary,
    largest_difference,
    unit_differences,
)
from tunewright.evidence.statistics import Floats, Integers

UNITS = 4000
LABELLED = 0.2
"""Share of the differing answers that a person labels where there is a judge."""
JUDGE_ERROR = 0.1
WRONG = "the same, each request a unit"
"""The wrong way, shown for comparison: it fails, and does not decide the exit code."""
CHUNK = 250

Drawn = tuple[Floats, Floats | float, float, Integers | None]
"""Values [runs, units], the true running mean, the largest possible value, and the labels up to each unit if judged."""
Draw = Callable[[np.random.Generator, int], Drawn]


def differences(
    rng: np.random.Generator, shape: tuple[int, int], differ: Floats | float, mean: Floats | float
) -> Floats:
    """Draw differences of -1, 0 and 1."""
    at = rng.random(shape)
    return np.where(at < (differ + mean) / 2, 1.0, np.where(at < differ, -1.0, 0.0))


def independent(differ: float, mean: float = 0.0, units: int = UNITS) -> Draw:
    """Return units of one request."""
    return lambda rng, runs: (differences(rng, (runs, units), differ, mean), mean, 1.0, None)


def drifting(rng: np.random.Generator, runs: int) -> Drawn:
    """Draw units whose mean swings by 10 points and whose share of differing answers falls from 40% to 12%."""
    unit = np.arange(1, UNITS + 1)
    mean = 0.1 * np.sin(unit / 100)
    values = differences(rng, (runs, UNITS), np.linspace(0.4, 0.12, UNITS), mean)
    return values, np.cumsum(mean) / unit, 1.0, None


def many_requests(rng: np.random.Generator, runs: int) -> Drawn:
    """Draw units of 1 to 300 requests, most of them small, whose differing answers all favour the same adapter."""
    sizes = np.minimum(rng.pareto(1.2, (runs, UNITS)).astype(np.int64) + 1, 300)
    return rng.binomial(sizes, 0.3) / sizes * rng.choice([-1.0, 1.0], (runs, UNITS)), 0.0, 1.0, None


def one_by_one(rng: np.random.Generator, runs: int) -> Drawn:
    """Draw the same requests, user by user, as if each were a unit."""
    sizes = np.minimum(rng.pareto(1.2, (runs, UNITS)).astype(np.int64) + 1, 300)
    favoured = rng.choice([-1.0, 1.0], (runs, UNITS))
    requests = np.stack([np.repeat(side, size)[:UNITS] for side, size in zip(favoured, sizes, strict=True)])
    return requests * (rng.random((runs, UNITS)) < 0.3), 0.0, 1.0, None


def judged(truth: Floats, rng: np.random.Generator) -> tuple[Floats, Integers]:
    """Return corrected differences, and the labels so far: a judge on all answers, people on some that differ."""
    chance = np.where(truth != 0, LABELLED, 1.0)
    human = np.where(rng.random(len(truth)) < chance, truth, np.nan)
    judge = np.where(rng.random(len(truth)) < JUDGE_ERROR, -truth, truth)
    return unit_differences(np.arange(len(truth)), human, judge, chance), np.cumsum((human != 0) & ~np.isnan(human))


def with_judge(differ: float, mean: float = 0.0) -> Draw:
    """Return units that a judge with an error of 10% labels, and people a fifth of those that differ."""

    def draw(rng: np.random.Generator, runs: int) -> Drawn:
        found = [judged(row, rng) for row in differences(rng, (runs, UNITS), differ, mean)]
        values, labels = (np.stack(each) for each in zip(*found, strict=True))
        return values, mean, largest_difference(LABELLED, judge=True), labels

    return draw


def unequal_samples(rng: np.random.Generator, runs: int) -> Drawn:
    """Draw two kinds of users, sampled at 100% and at 20%, with differences of -3 and +3 points that cancel."""
    rare = rng.random((runs, UNITS)) < 0.5
    values = differences(rng, (runs, UNITS), 0.12, np.where(rare, 0.03, -0.03))
    sampled = np.where(rare, 0.2, 1.0)
    return np.where(rng.random((runs, UNITS)) < sampled, values / sampled, 0.0), 0.0, 5.0, None


NULLS: dict[str, Draw] = {
    "2% differ": independent(0.02),
    "5% differ": independent(0.05),
    "12% differ": independent(0.12),
    "30% differ": independent(0.3),
    "all differ": independent(1.0),
    "all differ, under 100 units": independent(1.0, units=FEWEST_UNITS - 1),
    "2% differ, all worse": independent(0.02, -0.02),
    "5% differ, all worse": independent(0.05, -0.05),
    "drifting traffic": drifting,
    "1 to 300 requests a unit": many_requests,
    WRONG: one_by_one,
    "judge with 10% error": with_judge(0.12),
    "judge, 2% differ, all worse": with_judge(0.02, -0.02),
    "users sampled at 20% and 100%": unequal_samples,
}


@dataclass(frozen=True)
class NullRow:
    """One row of the first table."""

    setting: str
    stops: float
    low: float
    high: float
    fixed: float
    passes: bool


def chunks(runs: int, rng: np.random.Generator, draw: Draw) -> Iterator[Drawn]:
    """Draw the runs in parts that fit the memory."""
    for start in range(0, runs, CHUNK):
        yield draw(rng, min(CHUNK, runs - start))


def null_row(setting: str, runs: int) -> NullRow:
    """Count false stops."""
    stops = fixed = 0
    for values, mean, largest, labels in chunks(runs, np.random.default_rng(0), NULLS[setting]):
        found = confidence_sequence(values, largest=largest, labels=labels)
        stops += int(((found.low > mean) | (found.high < mean)).any(axis=1).sum())
        looks = np.arange(1, values.shape[1] + 1)
        error = np.sqrt((np.cumsum(values**2, axis=1) / looks - found.means**2) / looks)
        outside = np.abs(found.means - mean) > 1.96 * error
        fixed += int(outside[:, FEWEST_UNITS - 1 :].any(axis=1).sum())
    interval = binomtest(stops, runs).proportion_ci(0.99)
    passes = interval.low <= 0.05 and stops / runs <= 0.055
    return NullRow(setting, stops / runs, float(interval.low), float(interval.high), fixed / runs, passes)


def power_row(difference: float, runs: int) -> dict[str, Any]:
    """Return medians and 80% quantiles of requests and labels until *worse*, by kind of bound."""
    rng = np.random.default_rng(0)
    units = int(12 / difference**2)
    first: dict[str, list[int]] = {"people": [], "EB only": [], "judge": []}
    labels: dict[str, list[int]] = {name: [] for name in first}

    def count(name: str, below: NDArray[np.bool_], labelled: Integers) -> None:
        # A run that never stops counts as the whole: quantiles of most runs do not notice.
        stop = int(below.argmax()) + 1 if below.any() else units
        first[name].append(stop)
        labels[name].append(int(labelled[stop - 1]))

    for _ in range(runs):
        truth = differences(rng, (1, units), 0.12, -difference)[0]
        differing = np.cumsum(truth != 0)
        count("people", confidence_sequence(truth).high < 0, differing)
        boundary = empirical_bernstein_boundary(np.cumsum(truth**2), 0.025)
        count("EB only", np.cumsum(truth) + boundary < 0, differing)
        values, labelled = judged(truth, rng)
        found = confidence_sequence(values, largest=largest_difference(LABELLED, judge=True), labels=labelled)
        count("judge", found.high < 0, labelled)
    return {
        "difference": -difference,
        **{
            name: [int(np.quantile(each[name], share)) for share in (0.5, 0.8) for each in (first, labels)]
            for name in first
        },
    }


def main() -> int:
    """Print both tables, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shadow_calibration.json"))
    options = parser.parse_args()
    began = time.perf_counter()
    print(f"{options.runs:,} shadows a row, a look at every unit, up to {UNITS:,} units")
    print(f"{'shadow':<30} {'false stops':>11}  {'99% interval':<15} {'fixed interval':>14}")
    nulls = []
    for setting in NULLS:
        row = null_row(setting, options.runs)
        nulls.append(row)
        failed = "" if row.passes else "  FAILED" if setting != WRONG else "  wrong, as expected"
        fixed = "-" if setting.endswith("under 100 units") else f"{row.fixed:.1%}"
        print(
            f"{setting:<30} {row.stops:>11.1%}  {f'{row.low:.1%} to {row.high:.1%}':<15} {fixed:>14}{failed}",
            flush=True,
        )
    print("\nrequests / labels until worse: half of the shadows, and 80% of them; 12% of the answers differ")
    print(f"{'difference':>10}  {'people':>11} {'80%':>11}  {'EB only':>11} {'80%':>11}  {'judge':>11} {'80%':>11}")
    powers = []
    for difference in (0.1, 0.05, 0.03):
        power = power_row(difference, options.runs)
        powers.append(power)
        cells = [
            f"{f'{power[name][at]:,} / {power[name][at + 1]:,}':>{12 - at // 2}}"
            for name in ("people", "EB only", "judge")
            for at in (0, 2)
        ]
        print(f"{-100 * difference:>10.0f} {' '.join(cells)}", flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
    write_json(options.out, {"runs": options.runs, "nulls": [vars(row) for row in nulls], "power": powers})
    return 0 if all(row.passes or row.setting == WRONG for row in nulls) else 1


if __name__ == "__main__":
    raise SystemExit(main())
