"""Near-duplicates among rows that come from templates: seconds and memory by rows, and the same result as brute force.

    python benchmarks/near_duplicates_templates.py [--rows 5000 10000 20000 40000 200000] [--brute-force 10000]

Rows of three templates, each filled with a name and a number, and rows of random words. Both steps of ``data add`` are
timed at a similarity of 0.8: duplicates, where all rows of a template have one output, and clusters, where no row is
left out. Kinds of rows:

- short: 400 names and numbers up to 99,999, so that most rows of a template hang together by chains;
- long: 4 million names and numbers up to 999,999, so that next to none is near another, though all share a template;
- numbers: long templates with a number alone, so that all rows of a template are near each other;
- random: 6 to 15 words of 20,000;
- apart: the same, with one output for all.

Up to ``--brute-force`` rows the clusters are compared with those that all rows with all others give. Each measurement
has its own process. Prints a table and writes benchmarks/results/near_duplicates_templates.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from load_shown import machine
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tunewright.core.progress import LogReporter
from tunewright.data.dedup import comparison_texts, find_clusters, find_duplicates
from tunewright.data.dedup.shingles import shingle_matrix
from tunewright.data.dedup.similarity import similarities
from tunewright.data.examples import Example, Message

RESULTS = Path(__file__).with_name("results") / "near_duplicates_templates.json"
THRESHOLD = 0.8
FIRST = "Anna Ben Clara David Emma Felix Grace Henry Isla Jack Kate Liam Maria Noah Olivia Peter Quinn Rosa Sam Tina"
LAST = "Smith Jones Brown Taylor Wilson Davies Evans Thomas Johnson Roberts Walker Wright Robinson Thompson White"
LAST += " Hughes Edwards Green Hall Wood"
NAMED = (
    "What is the balance of account {number} held by {name} at the end of the month?",
    "Please transfer {number} euros from my savings account to {name} before next Friday.",
    "Has invoice number {number} addressed to {name} been paid in full by the customer?",
)
NUMBERED = (
    "What was the total amount of the purchase order {number} and when was it delivered to the customer in full?",
    "Please send me a printed copy of the delivery note for parcel {number} as soon as it is in the warehouse.",
    "The machine in hall three reports fault {number} and has stopped; which spare part is needed to repair it?",
)


def main() -> None:
    """Measure what the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 10_000, 20_000, 40_000, 200_000])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--brute-force", type=int, default=10_000, metavar="ROWS")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(1), "similarity": THRESHOLD, "measured": []}
    print(
        f"{'rows':<8} {'number':>8} {'duplicates':>10} {'s':>7} {'CPU s':>7} {'clusters':>9} {'s':>7} {'CPU s':>7} "
        f"{'peak GB':>8}  brute force"
    )
    spawn = multiprocessing.get_context("spawn")
    for kind in args.kinds:
        for rows in args.rows:
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                row = process.submit(measure, kind, rows, compared=rows <= args.brute_force).result()
            results["measured"].append(row)
            compared = "" if row["brute_force_s"] is None else f"the same, {row['brute_force_s']} s"
            print(
                f"{kind:<8} {rows:>8,} {row['duplicates']:>10,} {row['duplicates_s']:>7} "
                f"{row['duplicates_cpu_s']:>7} {row['clusters']:>9,} {row['clusters_s']:>7} {row['clusters_cpu_s']:>7} "
                f"{row['peak_gb']:>8}  {compared}",
                flush=True,
            )
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(kind: str, count: int, *, compared: bool) -> dict[str, Any]:
    """Time both steps on `count` different rows of a kind; compare the clusters with those of brute force."""
    draw = random.Random(0)
    made = dict.fromkeys(KINDS[kind](draw) for _ in range(count))
    examples = [Example((Message("user", t), Message("assistant", t[:4] if kind != "apart" else "x"))) for t in made]
    row: dict[str, Any] = {"kind": kind, "rows": count, "different": len(examples), "brute_force_s": None}
    began, worked = time.perf_counter(), time.process_time()
    row["duplicates"] = len(find_duplicates(examples, 0, THRESHOLD, LogReporter()))
    row["duplicates_s"] = round(time.perf_counter() - began, 1)
    row["duplicates_cpu_s"] = round(time.process_time() - worked, 1)
    began, worked = time.perf_counter(), time.process_time()
    names = find_clusters(examples, THRESHOLD, LogReporter())
    row["clusters_s"] = round(time.perf_counter() - began, 1)
    row["clusters_cpu_s"] = round(time.process_time() - worked, 1)
    row["clusters"] = len(set(names))
    row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
    if compared:
        began = time.perf_counter()
        labels = _brute_force(comparison_texts(examples))
        row["brute_force_s"] = round(time.perf_counter() - began, 1)
        assert len(set(zip(names, labels, strict=True))) == len(set(names)) == len(set(labels))
    return row


def _brute_force(texts: Sequence[str]) -> list[int]:
    """Return the cluster of each text, from the similarities of all texts with all others."""
    matrix = shingle_matrix(texts)
    labels = np.arange(len(texts))
    for start in range(0, len(texts), 256):
        near = similarities(matrix[start : start + 256], matrix).tocoo()
        at = near.data >= THRESHOLD
        first, second = np.append(near.row[at] + start, np.arange(len(texts))), np.append(near.col[at], labels)
        links = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(len(texts), len(texts)))
        components = connected_components(links, directed=False)[1]
        labels = np.unique(components, return_index=True)[1][components]  # the first row stands for all
    return [int(label) for label in labels]


def _short(draw: random.Random) -> str:
    name = f"{draw.choice(FIRST.split())} {draw.choice(LAST.split())}"
    return draw.choice(NAMED).format(number=draw.randrange(100_000), name=name)


def _long(draw: random.Random) -> str:
    name = " ".join(_word(random.Random(draw.randrange(2_000)), 2, 4).title() for _ in range(2))
    return draw.choice(NAMED).format(number=draw.randrange(1_000_000), name=name)


def _numbers(draw: random.Random) -> str:
    return draw.choice(NUMBERED).format(number=draw.randrange(1_000_000))


def _random(draw: random.Random) -> str:
    return " ".join(_word(random.Random(draw.randrange(20_000)), 1, 4) for _ in range(draw.randrange(6, 16)))


def _word(draw: random.Random, fewest: int, most: int) -> str:
    return "".join(draw.choice("bcdfghklmnprstvw") + draw.choice("aeiou") for _ in range(draw.randint(fewest, most)))


KINDS: dict[str, Callable[[random.Random], str]] = {
    "short": _short,
    "long": _long,
    "numbers": _numbers,
    "random": _random,
    "apart": _random,
}

if __name__ == "__main__":
    main()
