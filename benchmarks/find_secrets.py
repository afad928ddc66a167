"""Secrets and personal data: precision and recall by kind on the labelled set, findings in real files, and speed.

    python benchmarks/find_secrets.py [FILE.csv|FILE.json|FILE.jsonl ...]

The labelled set is the one that the tests generate (tests/data/secret_samples.py), with another seed. In files, every
text is searched; findings are reported by kind, without the value. Where phonenumbers is installed (pip install
phonenumbers), its example numbers of all regions are searched too. Prints tables and one JSON line.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunewright.data.examples import Example, Message
from tunewright.data.pii import LABELS, find, redact, scan

# The labelled set belongs to the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests" / "data"))

SEED, POSITIVES_EACH, NEGATIVES_EACH = 2024, 500, 500
ROWS = 100_000


def main(files: list[str]) -> None:
    """Measure the labelled set, the files and the speed."""
    result = {"labelled": labelled(), "phones": phones(), "files": {file: in_file(Path(file)) for file in files}}
    result["speed"] = speed()
    print(json.dumps(result))


def labelled() -> dict[str, Any]:
    """Return precision and recall by kind, with the sources of the wrong findings."""
    samples = importlib.import_module("secret_samples")
    positives = samples.positives(SEED, POSITIVES_EACH)
    negatives = samples.negatives(SEED + 1, NEGATIVES_EACH)
    right, missed, wrong = Counter[str](), Counter[str](), Counter[str]()
    made_from: dict[str, Counter[str]] = {kind: Counter() for kind in LABELS}
    for sample in (*positives, *negatives):
        found = Counter((f.kind, sample.text[f.start : f.end]) for f in find(sample.text))
        expected = Counter(sample.expected)
        right.update(kind for kind, _ in (found & expected).elements())
        missed.update(kind for kind, _ in (expected - found).elements())
        for kind, _ in (found - expected).elements():
            wrong[kind] += 1
            made_from[kind][sample.name] += 1
    print(f"{len(positives):,} texts with one or two, {len(negatives):,} of {len(samples.NEGATIVES)} sorts with none")
    print(f"{'':>28} {'right':>6} {'missed':>6} {'wrong':>6} {'precision':>10} {'recall':>7}")
    table = {}
    for kind, label in LABELS.items():
        precision = right[kind] / max(right[kind] + wrong[kind], 1)
        recall = right[kind] / max(right[kind] + missed[kind], 1)
        table[kind] = {"precision": round(precision, 4), "recall": round(recall, 4), "wrong": dict(made_from[kind])}
        note = ", ".join(f"{name}: {count}" for name, count in made_from[kind].items())
        counts = f"{right[kind]:>6} {missed[kind]:>6} {wrong[kind]:>6}"
        print(f"{label:>28} {counts} {precision:>10.3f} {recall:>7.3f}  {note}")
    return table


def phones() -> dict[str, int]:
    """Return how many of libphonenumber's example numbers are found in international form."""
    if importlib.util.find_spec("phonenumbers") is None:
        return {}
    library = importlib.import_module("phonenumbers")
    kinds = (library.PhoneNumberType.FIXED_LINE, library.PhoneNumberType.MOBILE)
    found, missed = 0, []
    for region in sorted(library.SUPPORTED_REGIONS):
        for number in (library.example_number_for_type(region, kind) for kind in kinds):
            if number is None or "12345678" in str(number.national_number):
                continue
            text = library.format_number(number, library.PhoneNumberFormat.INTERNATIONAL)
            if [(f.kind, f.end - f.start) for f in find(f"Ring {text}.")] == [("phone", len(text))]:
                found += 1
            else:
                missed.append(text)
    print(f"libphonenumber's examples: {found} of {found + len(missed)} found; not found: {', '.join(missed)}")
    return {"found": found, "missed": len(missed)}


def in_file(path: Path) -> dict[str, int]:
    """Count the findings of each kind in a file's texts."""
    texts = list(_texts(path))
    counts = Counter(finding.kind for text in texts for finding in find(text))
    print(f"{path}: {len(texts):,} texts, {dict(counts) or 'nothing'}")
    return dict(counts)


def _texts(path: Path) -> Iterator[str]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if path.suffix == ".csv":
        for row in csv.reader(text.splitlines(keepends=True)):
            yield from row
    elif path.suffix == ".jsonl":
        for line in text.splitlines():
            yield from _strings(json.loads(line))
    else:
        yield from _strings(json.loads(text))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def speed() -> dict[str, float]:
    """Return seconds for rows without findings, for rows with findings, and to redact those."""
    samples = importlib.import_module("secret_samples")
    rng = random.Random(SEED)
    words = "please can you tell why the payment for my new card of 12 May 2023 has not arrived yet £25 order".split()  # noqa: SIM905
    plain = [(f"a:{i}", _row(" ".join(rng.choices(words, k=14)), "card_arrival")) for i in range(ROWS)]
    texts = [sample.text for sample in samples.positives(SEED, ROWS // 10 // 27)]
    full = [(f"a:{i}", _row(text, f"I have noted: {text}")) for i, text in enumerate(texts)]
    began = time.perf_counter()
    scan(plain)
    plain_s = time.perf_counter() - began
    began = time.perf_counter()
    scan(full)
    full_s = time.perf_counter() - began
    began = time.perf_counter()
    for _, example in full:
        redact(example)
    redact_s = time.perf_counter() - began
    print(f"{ROWS:,} rows of 14 words without anything: {plain_s:.1f} s")
    print(f"{len(full):,} rows with something on both sides: {full_s:.1f} s; to redact them: {redact_s:.1f} s")
    return {
        "plain_s": round(plain_s, 2),
        "full_rows": len(full),
        "full_s": round(full_s, 2),
        "redact_s": round(redact_s, 2),
    }


def _row(prompt: str, answer: str) -> Example:
    return Example((Message("system", "Name the intent."), Message("user", prompt), Message("assistant", answer)))


if __name__ == "__main__":
    main(sys.argv[1:])
