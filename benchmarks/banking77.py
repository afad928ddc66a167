"""A part of BANKING77 through the whole pipeline: create the project, run its commands, freeze the answers.

    python benchmarks/banking77.py make DATA PROJECT [--rows 24] [--seed 0]
    python benchmarks/banking77.py run PROJECT
    python benchmarks/banking77.py freeze PROJECT tests/golden/banking77

DATA holds the published train.csv and test.csv (Casanueva et al. 2020, arXiv 2003.04807; CC-BY-4.0). `make`
draws the same number of rows of each intent by the seed. `run` runs the commands of docs/benchmarks/banking77.md,
stores their output in PROJECT/printed, and skips those that have been run. `freeze` stores what the test suite
scores again: key, cluster, reference and answers of each test and dev item, and the evidence; never a query.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import find_adapter
from tunewright.config.io import write_config
from tunewright.config.project import CONFIG_FILE, ProjectFolder, create_project
from tunewright.core.progress import LogReporter
from tunewright.data.dedup.leakage import measure_leakage
from tunewright.data.versions import MANIFEST, Member, version_folder
from tunewright.evaluation.arms import plan_of
from tunewright.evaluation.generations import ArmAnswer
from tunewright.evaluation.prompt_search import first_items
from tunewright.evaluation.verbs import open_arm_runner
from tunewright.evidence.files import (
    EVIDENCE_FILE,
    find_evaluation,
    load_evidence,
    load_items,
)
from tunewright.evidence.schema import Arm
from tunewright.open_project import OpenProject

PART = "part.csv"
ROWS = 24
"""Of each intent: what two cores train on and measure in half an hour, estimated from their speed on the demo."""
INSTRUCTION = "Name the intent of the customer's message."
ROAD: dict[str, tuple[str, ...]] = {
    "add": ("data", "add", PART, "-m", "a part of BANKING77"),
    "check": ("data", "check"),
    "leak": ("data", "leakage"),
    "train": ("train",),
    "evaluate": ("evaluate",),
    "verdict": ("verdict",),
    "report": ("report",),
}
USAGE = ("python benchmarks/banking77.py make DATA banking77", "python benchmarks/banking77.py run banking77")
"""As the page has them."""
ANSWERED_NO = {3, 4}
"""Exit codes of a measured no and of can't tell: the pipeline continues."""

Row = tuple[str, str]


# The project


def make(data: Path, project: Path, rows: int, seed: int) -> None:
    """Write the project: its config and the drawn part of the data."""
    published = read_rows(data)
    drawn = draw(published, rows, seed)
    intents = sorted({intent for _, intent in published})
    create_project(project, {CONFIG_FILE: config(intents, seed), PART: _csv(drawn)})
    print(f"{len(drawn):,} of {len(published):,} rows, {rows} of each of {len(intents)} intents, in {project / PART}")


def read_rows(data: Path) -> list[Row]:
    """Return the rows of both published files, train first; the split is made again, by cluster."""
    rows: list[Row] = []
    for name in ("train.csv", "test.csv"):
        with (data / name).open(encoding="utf-8", newline="") as file:
            rows += [(row["text"], row["category"]) for row in csv.DictReader(file)]
    return rows


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Draw this number of rows of each intent by the seed, in the files' order."""
    generator = random.Random(seed)
    of_intent: dict[str, list[int]] = {}
    for place, (_, intent) in enumerate(rows):
        of_intent.setdefault(intent, []).append(place)
    places = [place for intent in sorted(of_intent) for place in generator.sample(of_intent[intent], count)]
    return [rows[place] for place in sorted(places)]


def config(intents: Sequence[str], seed: int) -> str:
    """Return the project's tunewright.yaml."""
    listed = f"{INSTRUCTION} It is one of these: {', '.join(intents)}."
    choices = {"choices": list(intents)}
    return write_config(
        {
            "name": "banking77",
            "base_model": "bundled:smollm2-135m-instruct",
            "seed": seed,
            "data": {
                "input": "text",
                "output": "category",
                "system_prompt": INSTRUCTION,
                "val_size": 0.08,
                "test_size": 0.16,
                "contaminated": "drop",
                "duplicates": "drop",  # as the recorded run had it
            },
            # As on the demo: a model this small learns at a higher rate than the 7B models that the preset's is for.
            "train": {"preset": "all-linear", "learning_rate": 1e-3, "epochs": 2},
            "evaluate": {
                "metric": choices,
                "structured_outputs": choices,
                "instructions": [listed],
                # Two sizes of the default's five: retrieved ones are most of what there is to compute.
                "num_fewshot": [4, 16],
            },
            # The demo measures forgetting (docs/benchmarks/training.md); here it would take half of the time.
            "regressions": {"samples": 0},
        }
    )


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([("text", "category"), *rows])
    return out.getvalue()


# The pipeline


def opened(project: Path) -> None:
    """Run every command of the pipeline that has not been run, and time it."""
    printed = project / "printed"
    printed.mkdir(exist_ok=True)
    times = printed / "run.json"
    run: dict[str, Any] = (
        json.loads(times.read_text()) if times.exists() else {"machine": machine(), "seconds": {}, "cpu": {}}
    )
    tunewright = str(Path(sys.executable).with_name("tunewright"))
    for name, words in ROAD.items():
        if name in run["seconds"]:
            continue
        print(f"tunewright {' '.join(words)}", flush=True)
        began, spent = time.monotonic(), cpu_of_children()
        with subprocess.Popen(
            [tunewright, *words], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as command:
            assert command.stdout is not None
            with (printed / f"{name}.txt").open("w", encoding="utf-8") as file:
                for line in command.stdout:
                    file.write(line)
                    print(line, end="", flush=True)
        if command.returncode not in {0, *ANSWERED_NO}:
            sys.exit(f"tunewright {words[0]} ended with {command.returncode}")
        run["seconds"][name] = round(time.monotonic() - began, 1)
        run["cpu"][name] = round(cpu_of_children() - spent, 1)
        times.write_text(json.dumps(run, indent=2) + "\n")
    summary = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run["cpu"].items())
    print(f"{sum(run['seconds'].values()) / 60:.1f} minutes; of processor time: {summary}")


def cpu_of_children() -> float:
    """Return the processor seconds of the commands so far over all cores; other work on the machine is excluded."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine() -> str:
    """Return processor and cores as the documentation names them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


# What is frozen


def freeze(project: Path, golden: Path) -> None:
    """Store what the figures are scored from, without any query."""
    folder = find_evaluation(ProjectFolder(project).evaluations)
    evidence, items = load_evidence(folder), load_items(folder)
    opened = OpenProject(ProjectFolder(project), LogReporter())
    adapter = find_adapter(opened.folder.adapters, evidence.lineage["adapter"]["name"])
    arm_runner = open_arm_runner(opened, adapter)
    intents = {member.example.output for member in arm_runner.version.members}

    def answered(arms: Sequence[Arm], members: Sequence[Member], split: str) -> dict[str, list[ArmAnswer]]:
        return {arm.name: arm_runner.answers(plan_of(arm), members, split, adapter) for arm in arms}

    test, dev = (arm_runner.version.examples(split) for split in ("test", "dev"))
    on_test = answered(evidence.arms, test, "test")
    for place, item in enumerate(items):  # else the journal is not that of the evidence
        assert item.key == test[place].key
        assert item.answers == {name: given[place].text for name, given in on_test.items()}
    golden.mkdir(parents=True, exist_ok=True)
    _write(golden / "test.jsonl.gz", _rows(test, on_test, intents, {item.key: item.nearest for item in items}))
    _write(golden / "dev.jsonl.gz", _rows(dev, answered(evidence.dev_arms, dev, "dev"), intents))
    if evidence.narrowing is not None:
        first = [dev[place] for place in first_items(dev, evidence.narrowing.items, opened.folder.config.seed)]
        _write(golden / "first.jsonl.gz", _rows(first, answered(evidence.narrowing.arms, first, "dev"), intents))
    near = measure_leakage(arm_runner.version, opened.folder.config.seed, opened.reporter).as_dict()
    near["nearest"] = [{**row, "of": None} for row in near["nearest"]]
    _write(golden / "leak.jsonl.gz", [near])
    shutil.copy(folder / EVIDENCE_FILE, golden)
    shutil.copy(project / CONFIG_FILE, golden)
    shutil.copy(project / "printed" / "run.json", golden)
    shutil.copy(version_folder(opened.folder.dataset, arm_runner.version.digest) / MANIFEST, golden)
    (advice,) = opened.folder.evaluations.glob("advice-*.json")
    shutil.copy(advice, golden / "advice.json")
    kept = sum(file.stat().st_size for file in golden.iterdir())
    print(f"{kept / 1024:.0f} KiB in {golden}")


def _rows(
    members: Sequence[Member],
    answers: Mapping[str, Sequence[ArmAnswer]],
    intents: Collection[str],
    nearest: Mapping[str, float | None] | None = None,
) -> list[dict[str, Any]]:
    return [
        {
            "key": member.key,
            "cluster": member.cluster,
            "reference": member.example.output,
            **({"nearest": nearest[member.key]} if nearest is not None else {}),
            "answers": {name: _answer(given[place], intents) for name, given in answers.items()},
        }
        for place, member in enumerate(members)
    ]


def _answer(given: ArmAnswer, intents: Collection[str]) -> list[Any]:
    """Return the text, whether it reached the token limit, and the token counts of prompt and answer."""
    return [kept(given.text, intents), given.truncated, len(given.prompt), given.tokens]


def kept(answer: str, intents: Collection[str]) -> str:
    """Return the answer to freeze; several words that are not an intent may repeat a query, so they become a digest.

    Such an answer is wrong in any case.
    """
    if answer.strip() in intents or len(answer.split()) < 2:
        return answer
    return f"sha256:{hashlib.sha256(answer.encode()).hexdigest()[:12]}"


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


def main() -> None:
    """Run one of the three steps."""
    parser = argparse.ArgumentParser()
    steps = parser.add_subparsers(dest="step", required=True)
    making = steps.add_parser("make")
    making.add_argument("data", type=Path)
    making.add_argument("project", type=Path)
    making.add_argument("--rows", type=int, default=ROWS, help="of each intent")
    making.add_argument("--seed", type=int, default=0)
    steps.add_parser("run").add_argument("project", type=Path)
    freezing = steps.add_parser("freeze")
    freezing.add_argument("project", type=Path)
    freezing.add_argument("golden", type=Path)
    given = parser.parse_args()
    if given.step == "make":
        make(given.data, given.project, given.rows, given.seed)
    elif given.step == "run":
        opened(given.project)
    else:
        freeze(given.project, given.golden)


if __name__ == "__main__":
    main()
