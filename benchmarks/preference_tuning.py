"""Preference tuning: what it adds to a supervised adapter on the demo's task, and what it costs.

    python benchmarks/preference_tuning.py [--work build/preference_tuning] [--rows 1200] [--samples 1]
        [--tune dpo:5e-5 orpo:2e-4] [--control] [--dev-only]

Trains an adapter on part of the legal citations, samples its answers to the training inputs, and takes the wrong ones
as rejected answers next to the ideal outputs. Preference methods start from the adapter, each with its learning rate,
and dev chooses one. ``--control`` also trains another supervised epoch instead. Then the test split is opened once,
and the chosen adapter is contrasted with its parent. Resumes where it stopped. Prints a table; writes
benchmarks/results/preference_tuning.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tunewright import examples
from tunewright.adapters.registry import Adapter
from tunewright.api import Project
from tunewright.chat.answers import answer_text
from tunewright.cli.live import ConsoleReporter
from tunewright.config import TrainConfig
from tunewright.config.project import CONFIG_FILE, ProjectFolder
from tunewright.core.io import write_json, write_text
from tunewright.core.progress import Reporter
from tunewright.evaluation.verbs import open_arm_runner
from tunewright.generation.requests import Request
from tunewright.open_project import OpenProject

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "preference_tuning.json"
PAIRS = "rejected.jsonl"
COSTS = "costs.json"
SEED = 0
SFT: dict[str, Any] = {"preset": "all-linear", "learning_rate": 1e-3, "epochs": 1}
EVALUATE: dict[str, Any] = {
    "num_fewshot": [4],
    "static_seeds": 1,
    "screening_items": 48,
    "finalists": 1,
    "tuned_retrieved": False,
    "batch_size": 64,
}


def main() -> None:
    """Train, sample, tune by preferences, measure, show."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "preference_tuning")
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--samples", type=int, default=1, help="answers to each training input")
    parser.add_argument("--tune", nargs="+", default=["dpo:5e-5", "orpo:2e-4"], help="METHOD:RATE of each run")
    parser.add_argument("--control", action="store_true", help="another epoch of supervised training, too")
    parser.add_argument("--dev-only", action="store_true", help="leave the test split closed")
    options = parser.parse_args()
    logging.getLogger("tunewright").setLevel(logging.ERROR)
    reporter = ConsoleReporter(Console(stderr=True, width=120))

    project = opened(options, reporter)
    costs = Costs(options.work / COSTS)
    parent = costs.trained("sft", with_train(project, SFT))
    pairs = sampled_pairs(project, parent, options, costs)
    start = {**SFT, "from": parent.name}
    runs = {"sft": parent}
    tuned: dict[str, dict[str, Any]] = {}
    for asked in options.tune:
        method, rate = asked.split(":")
        name = f"{method} {float(rate):g}"
        tuned[name] = {**start, "method": method, "learning_rate": float(rate)}
        runs[name] = costs.trained(name, with_train(project, tuned[name]))
    if options.control:
        runs["more sft"] = costs.trained("more sft", with_train(project, {**start, "learning_rate": 2e-4}))
    arm_runner = open_arm_runner(OpenProject(project.folder, reporter))
    dev = {name: arm_runner.dev_scores(adapter).total() for name, adapter in runs.items()}
    best = max(tuned, key=dev.__getitem__)
    document: dict[str, Any] = {
        "machine": platform.platform(),
        "task": {**{split: len(arm_runner.version.examples(split)) for split in ("train", "dev", "test")}, **pairs},
        "rows": {name: {"dev": dev[name], **costs.of(name)} for name in runs},
        "chosen": best,
    }
    del arm_runner
    if not options.dev_only:
        document["test"] = on_test(with_train(project, tuned[best]), runs[best])
    write_json(RESULTS, document)
    Console(width=120).print(table(document))
    print(RESULTS.relative_to(ROOT))


def opened(options: argparse.Namespace, reporter: Reporter) -> Project:
    """Return the project with its dataset version, created if it is missing."""
    options.work.mkdir(parents=True, exist_ok=True)
    files = examples.project_files(quick=True)
    rows = files[examples.PAIRS_FILE].splitlines(keepends=True)
    chosen = random.Random(SEED).sample(rows, min(options.rows, len(rows)))
    write_text(options.work / examples.PAIRS_FILE, "".join(chosen))
    write_text(options.work / CONFIG_FILE, files[CONFIG_FILE])
    config = ProjectFolder(options.work).config
    data = config.data.model_copy(update={"val_size": 0.15, "test_size": 0.25})
    evaluate = type(config.evaluate).model_validate(EVALUATE)
    config = config.model_copy(update={"data": data, "evaluate": evaluate})
    project = Project(ProjectFolder(options.work, config), reporter)
    project.data.add([options.work / examples.PAIRS_FILE])
    return project


def with_train(project: Project, settings: dict[str, Any]) -> Project:
    """Return the project with another train section."""
    config = project.folder.config.model_copy(update={"train": TrainConfig.model_validate(settings)})
    return Project(ProjectFolder(project.folder.root, config), project.reporter)


def sampled_pairs(project: Project, parent: Adapter, options: argparse.Namespace, costs: Costs) -> dict[str, Any]:
    """Add the adapter's own wrong answers to the training inputs as rejected ones; return their counts."""
    file = options.work / PAIRS
    train = project.data.version().domain_of("train")
    if not file.exists():
        with costs.measured("samples"):
            runner = open_arm_runner(OpenProject(project.folder, project.reporter), parent)
            generator = runner.generator
            requests = [
                Request(generator.prompt(m.example.prompt), parent.name, runner.limit, temperature=1.0, seed=seed)
                for m in train
                for seed in range(options.samples)
            ]
            with project.reporter.task("Sampling answers", len(requests), "answers") as task:
                found = generator.generate(requests, lambda _i, _c: task.advance(), adapter=parent)
        lines = []
        for place, completion in enumerate(found):
            example = train[place // options.samples].example
            answer = answer_text(generator.chat, completion, ()).strip()
            if answer and answer != example.output:
                turns = [turn.as_dict() for turn in example.prompt]
                lines.append({"prompt": turns, "chosen": _turn(example.output), "rejected": _turn(answer)})
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    project.data.add([file])
    asked = options.samples * len(train)
    return {"sampled": asked, "wrong": sum(1 for _ in file.open(encoding="utf-8"))}


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def on_test(project: Project, adapter: Adapter) -> dict[str, Any]:
    """Open the test split, and return the arms' scores and all contrasts."""
    result = project.evaluate(adapter.name)
    evidence = result.evidence
    decision = project.verdict(result.folder)
    return {
        "arms": {arm.name: arm.score(evidence.metric).value for arm in evidence.arms},
        "contrasts": [
            contrast.model_dump(mode="json") for contrast in evidence.contrasts if contrast.metric == evidence.metric
        ],
        "verdict": decision.as_dict(),
    }


class Costs:
    """Wall-clock seconds, seconds of processor time and the peak memory of each step, kept in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._kept: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}

    def of(self, name: str) -> dict[str, float]:
        """Return the costs of a step."""
        return self._kept.get(name, {})

    def trained(self, name: str, project: Project) -> Adapter:
        """Train, or find the adapter; its costs are those of the run that trained it."""
        with self.measured(name):
            result = project.train()
        return result.adapter

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Measure a step, unless it has been."""
        process, peak, ended = psutil.Process(), [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.05):
                peak[0] = max(peak[0], process.memory_info().rss)

        thread = threading.Thread(target=watch, daemon=True)
        wall, used = time.monotonic(), time.process_time()
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        seconds = {"seconds": time.monotonic() - wall, "processor": time.process_time() - used}
        if name not in self._kept:
            self._kept[name] = {**{k: round(v, 1) for k, v in seconds.items()}, "peak_mib": peak[0] >> 20}
            write_json(self._file, self._kept)


def table(document: dict[str, Any]) -> Table:
    """Return one line for each run."""
    task = document["task"]
    title = f"{task['train']} training rows; {task['wrong']} of {task['sampled']} sampled answers are wrong"
    shown = Table("run", "dev exact", "wall s", "processor s", "peak MiB", title=title, title_justify="left")
    for name, row in document["rows"].items():
        shown.add_row(
            name, f"{row['dev']:.1%}", *(f"{row.get(key, 0):,.0f}" for key in ("seconds", "processor", "peak_mib"))
        )
    for contrast in document.get("test", {}).get("contrasts", ()):
        low, high = contrast["interval"]["low"], contrast["interval"]["high"]
        shown.add_row(
            f"test: {contrast['treatment']} - {contrast['control']}",
            f"{100 * contrast['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        )
    return shown


if __name__ == "__main__":
    main()
