"""Near-duplicates: an exact join against rensa, datasketch and semhash; a random split's leak; a million rows.

    python benchmarks/near_duplicates.py [banking77/train.csv ...]
    python benchmarks/near_duplicates.py --rows 1000000 banking77/train.csv ...

Without files it takes the example project's pairs. The other libraries are measured where they are installed
(pip install rensa datasketch semhash). semhash compares vectors of a model; it gets 4-gram counts projected on 256
dimensions in place of one, and is asked which rows have a near-equal one, for it gives no pairs. With --rows it makes
that many texts from parts of those in the files, with numbers and typing errors, and times what ``data add`` does with
them. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.core.progress import LogReporter
from tunewright.data.dedup import comparison_texts, find_clusters, find_duplicates
from tunewright.data.dedup.shingles import shingle_matrix, shingles
from tunewright.data.dedup.similarity import near_pairs, similarities
from tunewright.data.examples import Example, Message
from tunewright.examples import PAIRS_FILE, project_files

BANDS, BAND_ROWS = 32, 4
Pairs = set[tuple[int, int]]


def main() -> None:
    """Measure what the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--rows", type=int)
    args = parser.parse_args()
    inputs = _inputs(args.files)
    print(json.dumps(_many(inputs, args.rows) if args.rows else _beside_others(inputs)))


def _beside_others(inputs: list[str]) -> list[dict[str, Any]]:
    texts = list(comparison_texts([_example(text) for text in inputs]))
    print(f"{len(texts):,} inputs")
    print(f"{'J >=':>5} {'pairs':>8}  {'method':<34} {'seconds':>8} {'recall':>8}")
    results = []
    for threshold in (0.8, 0.7, 0.5):
        truth = _brute_force(texts, threshold)
        for name, find in _methods().items():
            began = time.perf_counter()
            recall = find(texts, threshold, truth)
            seconds = round(time.perf_counter() - began, 2)
            results.append({"threshold": threshold, "pairs": len(truth), "method": name, "seconds": seconds})
            results[-1]["recall"] = round(recall, 4)
            print(f"{threshold:>5} {len(truth):>8,}  {name:<34} {seconds:>8} {recall:>8.4f}")
        leak = _leak(truth, len(texts))
        results.append({"threshold": threshold, "random_split_leaks": round(leak, 4)})
        print(f"{'':>15} of a random tenth, {leak:.0%} have a near-equal input in the rest")
    return results


def _methods() -> dict[str, Callable[[list[str], float, Pairs], float]]:
    """Return the methods that are installed; each returns the share of the true pairs that it finds."""
    methods = {"tunewright, exact": lambda t, at, truth: _recall(_exact(t, at), truth)}
    if importlib.util.find_spec("rensa"):
        methods["rensa 128, 32 x 4, verified"] = lambda t, at, truth: _recall(_rensa(t, at), truth)
    if importlib.util.find_spec("datasketch"):
        methods["datasketch 128, its own bands"] = lambda t, at, truth: _recall(_datasketch(t, at), truth)
    if importlib.util.find_spec("semhash"):
        methods["semhash, 4-gram vectors (rows)"] = _semhash
    return methods


def _recall(found: Pairs, truth: Pairs) -> float:
    return len(found & truth) / max(len(truth), 1)


def _example(text: str, output: str = "x") -> Example:
    return Example((Message("user", text), Message("assistant", output)))


def _inputs(files: list[str]) -> list[str]:
    if not files:
        lines = project_files()[PAIRS_FILE].splitlines()
        return sorted({json.loads(line)["prompt"] for line in lines})
    rows = [row for file in files for row in csv.DictReader(Path(file).read_text(encoding="utf-8").splitlines(True))]
    return sorted({row["text"] for row in rows})


def _brute_force(texts: list[str], threshold: float) -> Pairs:
    """Compare all texts with all others."""
    matrix = shingle_matrix(texts)
    pairs: Pairs = set()
    for start in range(0, len(texts), 256):
        block = similarities(matrix[start : start + 256], matrix).tocoo()
        near = (block.data >= threshold) & (block.col < block.row + start)
        pairs |= set(zip(block.col[near].tolist(), (block.row[near] + start).tolist(), strict=True))
    return pairs


def _exact(texts: list[str], threshold: float) -> Pairs:
    blocks = near_pairs(texts, threshold, lambda first, _: np.ones(len(first), dtype=bool), LogReporter(), "searching")
    return {pair for block in blocks for pair in zip(block.second.tolist(), block.first.tolist(), strict=True)}


def _rensa(texts: list[str], threshold: float) -> Pairs:
    from rensa import RMinHash

    sets = [shingles(text) for text in texts]
    buckets: dict[tuple[int, ...], list[int]] = {}
    for number, members in enumerate(sets):
        minhash = RMinHash(num_perm=BANDS * BAND_ROWS, seed=0)
        minhash.update(list(members))
        digest = minhash.digest()
        for band in range(BANDS):
            key = (band, *digest[band * BAND_ROWS : (band + 1) * BAND_ROWS])
            buckets.setdefault(key, []).append(number)
    candidates = {(a, b) for numbers in buckets.values() for i, b in enumerate(numbers) for a in numbers[:i]}
    return {(a, b) for a, b in candidates if len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= threshold}


def _datasketch(texts: list[str], threshold: float) -> Pairs:
    datasketch = importlib.import_module("datasketch")
    index = datasketch.MinHashLSH(threshold=threshold, num_perm=128)
    pairs: Pairs = set()
    sets = [[s.encode("utf-8", "surrogatepass") for s in shingles(text)] for text in texts]
    for number, minhash in enumerate(datasketch.MinHash.bulk(sets, num_perm=128)):
        pairs |= {(other, number) for other in index.query(minhash)}
        index.insert(number, minhash)
    return pairs


class _FourGrams:
    """4-gram counts that semhash uses in place of a model."""

    def encode(self, inputs: Any, **_: Any) -> Any:
        matrix = shingle_matrix(list(inputs))
        directions = np.random.default_rng(0).standard_normal((matrix.shape[1], 256))
        return (matrix @ directions).astype(np.float32)


def _semhash(texts: list[str], threshold: float, truth: Pairs) -> float:
    """Return the share of rows with a near-duplicate that semhash drops or keeps for a dropped one."""
    semhash = importlib.import_module("semhash")
    result = semhash.SemHash.from_records(texts, model=_FourGrams()).self_deduplicate(2 * threshold / (1 + threshold))
    named = {record for row in result.filtered for record in (row.record, row.duplicate_of)}
    rows = {texts[number] for pair in truth for number in pair}
    return len(rows & named) / max(len(rows), 1)


def _leak(pairs: Pairs, count: int) -> float:
    """Return the share of a random tenth that has a near-equal input among the other nine."""
    test = set(random.Random(0).sample(range(count), count // 10))
    leaked = {x for pair in pairs for x in pair if x in test and not set(pair) <= test}
    return len(leaked) / len(test)


def _many(inputs: list[str], count: int) -> dict[str, Any]:
    rows = list({e.pair_key: e for e in (_example(t, f"answer {i % 500}") for i, t in _made(inputs, count))}.values())
    print(f"{len(rows):,} rows of {np.mean([len(row.input_text) for row in rows]):.0f} characters")
    result: dict[str, Any] = {"rows": len(rows), "before_gb": _peak()}
    for name, step in (
        ("duplicates", lambda: len(find_duplicates(rows, 0, 0.8, LogReporter()))),
        ("clusters", lambda: len(set(find_clusters(rows, 0.8, LogReporter())))),
    ):
        began, worked = time.perf_counter(), time.process_time()
        result[name] = step()
        result[f"{name}_s"] = round(time.perf_counter() - began, 1)
        result[f"{name}_cpu_s"] = round(time.process_time() - worked, 1)
        result["peak_gb"] = _peak()
        print(f"{name:<10} {result[name]:>10,} {result[f'{name}_s']:>7} s (peak {result['peak_gb']} GB)")
    return result


def _peak() -> float:
    """Return the peak resident memory so far in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def _made(inputs: list[str], count: int) -> list[tuple[int, str]]:
    """Return numbered texts: the beginning of one input with the end of another; a fifth of them end in a number.

    One in twenty is a copy of an earlier one, under its number, with another letter somewhere.
    """
    draw = random.Random(0)
    words = [text.split() for text in inputs if len(text.split()) >= 4]
    made: list[tuple[int, str]] = []
    for place in range(count):
        kind, number = draw.random(), place
        if made and kind < 0.05:
            number, text = draw.choice(made)
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice("aeinst ") + text[at + 1 :]
        else:
            one, other = draw.choice(words), draw.choice(words)
            parts = one[: draw.randrange(2, len(one))][-12:] + other[draw.randrange(1, len(other) - 1) :][:12]
            text = " ".join(parts)
            if kind < 0.25:
                text += f" {draw.choice(['ref', 'order', 'card', 'on the'])} {draw.randrange(10_000)}"
        made.append((number, text))
    return made


if __name__ == "__main__":
    main()
