"""Wrong answers in free text with several references per input: precision of the first 5% of `data suspects`.

    python benchmarks/suspects_references.py E2E.csv [INPUTS]

The file is devset.csv of the E2E set (columns mr and ref, some eight references for each input; not part of the
project). Takes INPUTS inputs (60 by default) with all their references and gives one row in twenty a reference of
another input. Prints for each ranking how many of the first 5% of the rows are such rows, and one JSON line.
"""

from __future__ import annotations

import csv
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tunewright
from tunewright.api import Project
from tunewright.config.project import CONFIG_FILE
from tunewright.data.review.suspects import conflicts

NOISE = 0.05


def main(file: Path, inputs: int) -> None:
    """Rank one noisy set with each method."""
    logging.getLogger("tunewright").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        project, wrong = _noisy_project(Path(folder), file, inputs)
        version = project.data.version()
        pairs = {m.key: (m.example.input_text, m.example.output) for m in version.members}
        most = round(NOISE * len(pairs))
        print(f"{len(pairs)} rows of {inputs} inputs, {len(wrong)} with a reference of another input")
        results = []

        def show(name: str, keys: Sequence[str], seconds: float) -> None:
            found = sum(pairs[key] in wrong for key in keys[:most])
            print(f"{name:<34} {found:>3} of the first {most} ({found / most:.0%}), {seconds:.0f} s")
            results.append({"ranking": name, "found": found, "listed": most, "seconds": round(seconds)})

        def kept_losses() -> list[str]:
            """Return all rows by their loss given the conversation, from the newest file of losses."""
            newest = max((project.folder.work / "losses").glob("*.json"), key=lambda file: file.stat().st_mtime)
            losses = json.loads(newest.read_text(encoding="utf-8"))
            return sorted(losses, key=lambda key: -losses[key]["given"])

        show("conflicts first", [s.key for s in conflicts(version.domain)], 0)
        for name in ("base", project.train().adapter.name):
            for call in ("", ", again"):
                began = time.perf_counter()
                result = project.data.suspects(name)
                keys = [s.key for s in result.suspects]
                show(f"less without input, {name[:10]}{call}", keys, time.perf_counter() - began)
            show(f"loss, {name[:10]}", kept_losses(), 0)
        print(json.dumps(results))


def _noisy_project(folder: Path, file: Path, inputs: int) -> tuple[Project, set[tuple[str, str]]]:
    """Return the project, and the pairs that are wrong."""
    generator = random.Random(0)
    with file.open(encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    chosen = set(generator.sample(sorted({row["mr"] for row in rows}), inputs))
    pairs = sorted({(row["mr"], row["ref"]) for row in rows if row["mr"] in chosen})
    bad = generator.sample(range(len(pairs)), round(NOISE * len(pairs)))
    given = dict(zip(bad, [*bad[1:], bad[0]], strict=True))
    noisy = [(mr, pairs[given.get(i, i)][1]) for i, (mr, _) in enumerate(pairs)]
    wrong = {pair for pair in noisy if pair not in set(pairs)}
    lines = (json.dumps({"prompt": mr, "completion": ref}) for mr, ref in noisy)
    (folder / "pairs.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (folder / CONFIG_FILE).write_text(
        "data:\n  system_prompt: Describe the restaurant in a sentence.\n  conflicts: accept\n"
        "train:\n  preset: all-linear\n  learning_rate: 0.001\n  epochs: 1\n",
        encoding="utf-8",
    )
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    return project, wrong


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 60)
