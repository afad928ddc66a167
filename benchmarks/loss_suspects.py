"""Wrong answers in free text: share of the planted ones among the tenth of the rows with the highest loss.

    python benchmarks/loss_suspects.py [ROWS]

Takes ROWS pairs of the example project (200 by default) and gives one in twenty the answer of another one. Each row's
loss comes from the adapter of a cross-fit that did not see it; for comparison, from the adapter of `tunewright
train`, which was trained on most of the wrong answers. Prints a table and one JSON line.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import tunewright
from tunewright import examples
from tunewright.api import Project
from tunewright.config.project import CONFIG_FILE

NOISE = 0.05


def main(rows: int) -> None:
    """Rank one noisy set by both kinds of losses."""
    logging.getLogger("tunewright").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        project, wrong = _noisy_project(Path(folder), rows)
        print(f"{rows} rows, {len(wrong)} with the answer of another row: how many are in the top 10% by loss")
        results = []
        project.crossval()
        results.append(_row(project, wrong, "cross-fitted", None))
        adapter = project.train().adapter
        results.append(_row(project, wrong, "one adapter", adapter.name))
        print(json.dumps(results))


def _noisy_project(folder: Path, rows: int) -> tuple[Project, set[str]]:
    """Return the project, and the inputs whose answers are wrong."""
    generator = random.Random(0)
    files = examples.project_files()
    pairs = [json.loads(line) for line in files[examples.PAIRS_FILE].splitlines()]
    pairs = generator.sample(pairs, rows)
    bad = generator.sample(pairs, round(NOISE * rows))
    answers = [pair["completion"] for pair in bad]
    for pair, answer in zip(bad, answers[1:] + answers[:1], strict=True):
        assert pair["completion"] != answer
        pair["completion"] = answer
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    # No answer is needed here: one token of each is the least that an evaluation makes.
    (folder / CONFIG_FILE).write_text(
        "data:\n  system_prompt: Give the citation abbreviation of this court.\n"
        "train:\n  preset: all-linear\n  learning_rate: 0.001\n  epochs: 3\n"
        "evaluate:\n  num_fewshot: [1]\n  max_new_tokens: 1\n",
        encoding="utf-8",
    )
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    return project, {pair["prompt"] for pair in bad}


def _row(project: Project, wrong: set[str], name: str, adapter: str | None) -> dict[str, Any]:
    result = project.data.suspects(adapter)
    inputs = {m.key: m.example.input_text for m in result.version.members}
    found = sum(inputs[suspect.key] in wrong for suspect in result.suspects)
    print(f"{name:<14} {found} of {len(wrong)} in {len(result.suspects)} rows")
    return {"losses": name, "found": found, "wrong": len(wrong), "listed": len(result.suspects)}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
