"""Near-duplicates: our exact join beside MinHash, and what a random split would have leaked.

    python benchmarks/near_duplicates.py [banking77/train.csv ...]

Without files it takes the example project's pairs. MinHash is measured where rensa is installed (pip install rensa).
Prints a table and one JSON line.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import sys
import time
from pathlib import Path

import numpy as np

from tunewright.data.examples import Example, Message
from tunewright.data.neighbours import comparison_texts
from tunewright.data.similarity import near_pairs, shingles
from tunewright.examples.legal_citations import PAIRS_FILE, project_files
from tunewright.progress import LogReporter

BANDS, BAND_ROWS = 32, 4


def main(files: list[str]) -> None:
    """Measure at 0.8, 0.7 and 0.5."""
    texts = comparison_texts([Example((Message("user", t), Message("assistant", "x"))) for t in _inputs(files)])
    sets = [shingles(text) for text in texts]
    print(f"{len(texts):,} inputs")
    print(f"{'J >=':>5} {'pairs':>8} {'exact s':>8} {'MinHash s':>10} {'found':>8}  random split leaks")
    results = []
    for threshold in (0.8, 0.7, 0.5):
        began = time.perf_counter()
        found = _exact(texts, threshold)
        seconds = time.perf_counter() - began
        row = {"threshold": threshold, "pairs": len(found), "exact_s": round(seconds, 2)}
        row["leak"] = _leak(found, len(texts))
        if importlib.util.find_spec("rensa"):
            began = time.perf_counter()
            hits = sum(_jaccard(sets[a], sets[b]) >= threshold for a, b in _minhash_candidates(sets))
            row |= {"minhash_s": round(time.perf_counter() - began, 2), "minhash_pairs": hits}
        results.append(row)
        print(
            f"{threshold:>5} {row['pairs']:>8,} {row['exact_s']:>8} {row.get('minhash_s', '-'):>10} "
            f"{row.get('minhash_pairs', '-'):>8}  {row['leak']:.0%} of a random tenth"
        )
    print(json.dumps(results))


def _inputs(files: list[str]) -> list[str]:
    if not files:
        lines = project_files()[PAIRS_FILE].splitlines()
        return sorted({json.loads(line)["prompt"] for line in lines})
    rows = [row for file in files for row in csv.DictReader(Path(file).read_text(encoding="utf-8").splitlines(True))]
    return sorted({row["text"] for row in rows})


def _exact(texts: list[str], threshold: float) -> set[tuple[int, int]]:
    blocks = near_pairs(texts, threshold, lambda first, _: np.ones(len(first), dtype=bool), LogReporter(), "searching")
    return {pair for block in blocks for pair in zip(block.second.tolist(), block.first.tolist(), strict=True)}


def _minhash_candidates(sets: list[set[str]]) -> set[tuple[int, int]]:
    from rensa import RMinHash

    buckets: dict[tuple[int, ...], list[int]] = {}
    for number, members in enumerate(sets):
        minhash = RMinHash(num_perm=BANDS * BAND_ROWS, seed=0)
        minhash.update(list(members))
        digest = minhash.digest()
        for band in range(BANDS):
            key = (band, *digest[band * BAND_ROWS : (band + 1) * BAND_ROWS])
            buckets.setdefault(key, []).append(number)
    return {(a, b) for numbers in buckets.values() for i, b in enumerate(numbers) for a in numbers[:i]}


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def _leak(pairs: set[tuple[int, int]], count: int) -> float:
    """The share of a random tenth that has a near-equal input among the other nine."""
    test = set(random.Random(0).sample(range(count), count // 10))
    leaked = {x for pair in pairs for x in pair if x in test and not set(pair) <= test}
    return len(leaked) / len(test)


if __name__ == "__main__":
    main(sys.argv[1:])
