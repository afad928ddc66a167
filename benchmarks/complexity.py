"""Measure the cost of twice the text for each function that takes text from outside, in processor time.

python benchmarks/complexity.py [NAME …]

A case is measured at n and 8n characters: the lowest time of several runs, so that other work on the machine
adds little. A case is slow where eight times the text takes more than 2.5³ times as long: 8 is linear, 64 quadratic.
`tests/test_complexity.py` counts lines of Python for the same cases and asserts no time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from making.complexity_cases import CASES, MAX_GROWTH, Case

LEAST_S = 0.005
"""Shorter runs measure the allocator and caches."""
MOST_N = 64_000
RUNS = 3
RETRIES = 3


def seconds(case: Case, n: int) -> float:
    """Return the processor time of one use, without the making of its input."""
    text = case.text(n)
    times = []
    for _ in range(RUNS):
        before = time.thread_time()
        case.use(text)
        times.append(time.thread_time() - before)
    return min(times)


def growth(case: Case) -> tuple[int, float, float]:
    """Return the length of the shortest text, its time, and the factor for eight times the text."""
    n = 500
    while (short := seconds(case, n)) < LEAST_S and n < MOST_N:
        n *= 2
    return n, short, seconds(case, 8 * n) / max(short, LEAST_S)


def main(names: list[str]) -> int:
    """Print the slowest growths; return 1 if a case is slow in each of three measurements."""
    chosen = [case for case in CASES if not names or any(name in case.name for name in names)]
    slow, all_found = [], []
    for case in chosen:
        found = growth(case)
        for _ in range(RETRIES - 1):
            if found[2] <= MAX_GROWTH**3:
                break
            found = min(found, growth(case), key=lambda each: each[2])
        all_found.append((found[2], case.name, *found[:2]))
        if found[2] > MAX_GROWTH**3:
            slow.append(case.name)
    print(f"{'8n':>6}  {'n':>7}  {'seconds':>8}  case")
    for factor, name, n, least in sorted(all_found, reverse=True)[:12]:
        print(f"{factor:6.1f}  {n:7,}  {least:8.4f}  {name}")
    print(f"{len(chosen) - len(slow)} of {len(chosen)} cases grow by at most {MAX_GROWTH**3:.1f} for 8 times the text.")
    for name in slow:
        print(f"SLOW: {name}")
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
