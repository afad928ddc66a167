"""Forgetting: cost of each remedy on the demo's task, and how much general ability it preserves.

    python benchmarks/forgetting.py [--work build/forgetting] [--rows N] [--samples 100] [--questions 400] [--base BASE]

Trains the demo's config unchanged, with a mix-in of 5% human-written instructions (Self-Instruct's, which are not part
of the project: see tests/making/real_data.py), with self-replay, and at a lower learning rate. Measures exact match on
dev (which also chose the epoch: read it as a comparison), the increase in negative log-likelihood of the base's own
answers, and ARC-easy as lm-eval's acc_norm has it, on a subset drawn by a seed. Resumes where it stopped. Prints a
table; writes benchmarks/results/forgetting.json and docs/images/forgetting.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tunewright import examples
from tunewright.adapters.lineage import packages
from tunewright.adapters.registry import Adapter
from tunewright.api import Project
from tunewright.cli.live import ConsoleReporter
from tunewright.config import MixConfig, ReplayConfig
from tunewright.config.project import CONFIG_FILE, ProjectFolder
from tunewright.core.io import digest, write_json
from tunewright.core.progress import Reporter
from tunewright.evaluation.benchmarks.bench import Bench
from tunewright.evaluation.benchmarks.likelihoods import (
    ChoiceQuestion,
    SamplesSuite,
    likeliest,
    likelihoods,
    read_questions,
)
from tunewright.evaluation.verbs import open_arm_runner
from tunewright.evidence.statistics import effective_items, wilson
from tunewright.open_project import OpenProject

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from making.real_data import SHARED

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "forgetting.json"
PLOT = ROOT / "docs" / "images" / "forgetting.png"
LOWER_RATE = 2e-4
MIX = 0.05
SEED = 0


def main() -> None:
    """Train, measure, show."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "forgetting")
    parser.add_argument("--rows", type=int, help="number of the demo's pairs; all by default")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--base", help="in place of the demo's")
    options = parser.parse_args()
    logging.getLogger("tunewright").setLevel(logging.ERROR)
    console = Console(stderr=True, width=120)
    reporter = ConsoleReporter(console)
    began = time.monotonic()

    domain = project_in(options.work / "domain", options, reporter, mix=False)
    adapters = trained(domain, options, reporter)
    arm_runner = open_arm_runner(OpenProject(domain.folder, reporter))
    suite = SamplesSuite(options.samples, None)
    questions, why_not = arc(options.questions)
    if why_not:
        console.print(why_not, style="yellow")

    rows = {"base": measured(None, arm_runner, suite, questions, options.work)}
    for name, adapter in adapters.items():
        rows[name] = measured(adapter, arm_runner, suite, questions, options.work)
    document: dict[str, Any] = {
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu(),
            "packages": packages(domain.folder.config.train.quantization),
        },
        "task": {
            "dataset": arm_runner.version.digest,
            "train": len(arm_runner.version.domain_of("train")),
            "dev": len(arm_runner.version.examples("dev")),
            "base": domain.folder.config.base_model,
        },
        "arc_easy": {"questions": len(questions), "seed": SEED, "skipped": why_not},
        "rows": rows,
        "seconds": round(time.monotonic() - began),
    }
    write_json(RESULTS, document)
    draw(rows, PLOT)
    Console(width=120).print(table(rows, document))
    print(f"{RESULTS.relative_to(ROOT)}, {PLOT.relative_to(ROOT)}; {document['seconds'] / 60:.0f} minutes this time")


def project_in(folder: Path, options: argparse.Namespace, reporter: Reporter, *, mix: bool) -> Project:
    """Create the demo's project with its dataset version, optionally with the mix-in."""
    folder.mkdir(parents=True, exist_ok=True)
    files = examples.project_files()
    pairs = files[examples.PAIRS_FILE].splitlines(keepends=True)
    if options.rows:
        pairs = random.Random(SEED).sample(pairs, options.rows)
    (folder / examples.PAIRS_FILE).write_text("".join(pairs), encoding="utf-8")
    (folder / CONFIG_FILE).write_text(files[CONFIG_FILE], encoding="utf-8")
    config = ProjectFolder(folder).config
    update: dict[str, Any] = {"base_model": options.base} if options.base else {}
    if mix:
        (folder / "generic.jsonl").write_text(self_instruct(), encoding="utf-8")
        chosen_mix = MixConfig(source="generic.jsonl", fraction=MIX)
        update["data"] = config.data.model_copy(update={"mix": chosen_mix})
    opened = Project(ProjectFolder(folder, config.model_copy(update=update)), reporter)
    opened.data.add([folder / examples.PAIRS_FILE])
    return opened


def self_instruct() -> str:
    """Return Self-Instruct's human-written tasks (Wang et al. 2022, arXiv 2212.10560) as pairs."""
    rows = []
    for name in ("seed_tasks.jsonl", "user_oriented_instructions.jsonl"):
        for line in (SHARED / "self_instruct" / name).read_text(encoding="utf-8").splitlines():
            task = json.loads(line)
            first = task["instances"][0]
            prompt = "\n\n".join(filter(None, (task["instruction"].strip(), first["input"].strip())))
            if first["output"].strip():
                rows.append({"prompt": prompt, "completion": first["output"].strip()})
    return "".join(json.dumps(row) + "\n" for row in rows)


def trained(domain: Project, options: argparse.Namespace, reporter: Reporter) -> dict[str, Adapter]:
    """Train with each remedy; return the adapters by name."""
    config = domain.folder.config

    def changed(**train: Any) -> Adapter:
        train_config = config.train.model_copy(update=train)
        project = ProjectFolder(domain.folder.root, config.model_copy(update={"train": train_config}))
        return Project(project, reporter).train().adapter

    adapters = {"plain": changed()}
    if (SHARED / "self_instruct").is_dir():
        mixed = project_in(options.work / "mixed", options, reporter, mix=True)
        adapters[f"mix-in {MIX:.0%}"] = mixed.train().adapter
    else:
        reporter.warn(f"No mix-in: Self-Instruct's tasks are not in {SHARED}.")
    adapters["self-replay, KL"] = changed(replay=ReplayConfig(samples=options.samples))
    adapters[f"learning rate {LOWER_RATE:g}"] = changed(learning_rate=LOWER_RATE)
    return adapters


def arc(count: int) -> tuple[list[ChoiceQuestion], str | None]:
    """Return a subset of ARC-easy (Clark et al. 2018, arXiv 1803.05457), or the reason why it is missing."""
    path = SHARED / "arc_easy" / "arc_easy.jsonl"
    if not path.exists():
        return [], f"ARC-easy is left out: no {path}."
    questions = read_questions(path)
    return random.Random(SEED).sample(questions, min(count, len(questions))), None


def measured(
    adapter: Adapter | None, arm_runner: Any, suite: SamplesSuite, questions: list[ChoiceQuestion], work: Path
) -> dict[str, Any]:
    """Measure one row of the table."""
    clusters = [member.cluster for member in arm_runner.version.examples("dev")]
    right = arm_runner.dev_scores(adapter).values
    forgetting = {"increase": 0.0, "interval": {"low": 0.0, "high": 0.0}}
    if adapter is not None:
        runner = arm_runner
        found = suite.measure(Bench(runner.project, runner.version, runner.generator, adapter, runner.reporter))
        forgetting = {"increase": found.drop, "interval": found.interval.model_dump()}
    row: dict[str, Any] = {"dev": share(right, clusters), "forgetting": forgetting, "arc_easy": None}
    if questions:
        picked = arc_choices(adapter, arm_runner.generator, questions, work)
        hits = np.array([pick == question.gold for pick, question in zip(picked, questions, strict=True)])
        row["arc_easy"] = share(hits, [str(n) for n in range(len(hits))])
    if adapter is not None:
        summary = adapter.lineage["training"]
        row |= {"adapter": adapter.name, "training_seconds": summary["seconds"], "kept_step": summary["kept_step"]}
        row["replay"] = {k: v for k, v in adapter.lineage.get("replay", {}).items() if k != "left_out"} or None
    return row


def arc_choices(adapter: Adapter | None, generator: Any, questions: list[ChoiceQuestion], work: Path) -> list[int]:
    """Return the model's choices; stored, since they take long."""
    decides = {
        "adapter": adapter.digest if adapter else None,
        "base": generator.base.digest,
        "questions": [(q.text, q.choices) for q in questions],
        "dtype": generator.dtype,
    }
    file = work / "arc" / f"{digest(decides)[:16]}.json"
    if not file.exists():
        title = f"ARC-easy, {adapter.name if adapter else 'the base'}"
        with generator.reporter.task(title, len(questions), "questions") as task, generator.answering(adapter) as model:
            found = likelihoods(model, generator.chat.tokenizer, questions, task)
            write_json(file, list(map(likeliest, found)))
    picked: list[int] = json.loads(file.read_text(encoding="utf-8"))
    return picked


def share(right: Any, clusters: list[str]) -> dict[str, Any]:
    """Return a share of items with its 95% interval (Wilson, by effective items)."""
    value = float(right.mean())
    interval = wilson(value, effective_items(right.astype(np.float64), clusters))
    return {"value": value, "interval": interval.model_dump(), "items": len(right)}


def table(rows: Mapping[str, Any], document: Mapping[str, Any]) -> Table:
    """Return the results as a table."""
    task, questions = document["task"], document["arc_easy"]["questions"]
    made = Table(
        title=f"{task['train']:,} pairs of {examples.LEGAL_CITATIONS}, {task['base']}; 95% intervals",
        title_justify="left",
    )
    for name in ("", f"dev exact match, {task['dev']} items", "forgotten, nats/token", f"ARC-easy, {questions} items"):
        made.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, row in rows.items():
        lost = row["forgetting"]
        summary = f"{lost['increase']:+.4f} ({lost['interval']['low']:+.4f} to {lost['interval']['high']:+.4f})"
        made.add_row(name, percent(row["dev"]), "0" if name == "base" else summary, percent(row["arc_easy"]))
    return made


def percent(share: Mapping[str, Any] | None) -> str:
    """``86.2 (81.3 to 90.0)``."""
    if share is None:
        return "not measured"
    low, high = share["interval"]["low"], share["interval"]["high"]
    return f"{100 * share['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def draw(rows: Mapping[str, Any], path: Path) -> None:
    """Plot the gain on the task against forgetting: up and left is better."""
    base = rows["base"]["dev"]["value"]
    colours = ["#0b6e99", "#b3470f", "#3b7d23", "#7a3b9c", "#c0257a", "#6b6b00"]
    style: dict[Any, Any] = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(8, 5), facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        names: dict[str, list[str]] = {}  # of the same adapter: scaling may keep it unchanged
        for name, row in rows.items():
            if name != "base":
                names.setdefault(row["adapter"], []).append(name)
        for same, colour in zip(names.values(), colours, strict=False):
            name, row = " = ".join(same), rows[same[0]]
            lost, dev = row["forgetting"], row["dev"]
            x, y = lost["increase"], 100 * (dev["value"] - base)
            x_error, y_error = around(x, lost["interval"], 1), around(100 * dev["value"], dev["interval"], 100)
            axes.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", markersize=9, capsize=3, color=colour, label=name)
        axes.plot([0], [0], "s", markersize=9, color="#444444", label="base")
        axes.set_xlabel("forgotten: increase in NLL of the base's own answers, nats per token (Less is better)")
        axes.set_ylabel("gained: exact match on dev, points over the base")
        axes.legend(frameon=False, loc="best")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def around(value: float, interval: Mapping[str, float], unit: float) -> list[list[float]]:
    """Return the lengths of an error bar below and above a value, not below 0 after rounding."""
    return [[max(value - unit * interval["low"], 0.0)], [max(unit * interval["high"] - value, 0.0)]]


def cpu() -> str:
    """Return the processor's name and torch's thread count."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
