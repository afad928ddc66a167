"""Answers of one arm without a cluster and on Ray clusters of one and two machines: seconds, processor time, digests.

    make build/ray/.installed
    build/ray/bin/python benchmarks/cluster_evaluation.py [--prompts 128] [--workers 0 1 2] [--rounds 1]

The bundled base of 135 million weights answers prompts of 6 to 40 random words with at most 24 tokens, in batches of 8.
The first half of the prompts is an arm of its own, whose time includes loading the base; the second half finds it
loaded. Runs and clusters are those of `cluster_runs.py`.

Bars: at most 10% more seconds with one worker than without a cluster, for jobs of over a minute; the same answers.
Prints a table and writes benchmarks/results/cluster_evaluation.json.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from cluster_runs import Comparison, Run, Sizes, Steps, clocked
from cluster_scale import write_pairs

from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.data.examples import Message
from tunewright.evaluation.generations import Generator
from tunewright.evaluation.verbs import answer_workers

CONFIG = "base_model: bundled:smollm2-135m-instruct\nevaluate:\n  batch_size: 8\ntrain:\n  dtype: float32\n"
LIMIT = 24


def prepare(folder: Path, sizes: Sizes) -> None:
    """Write the prompts."""
    write_pairs(folder / "pairs.jsonl", sizes["prompts"])


def measure(folder: Path, workers: int) -> Run:
    """Answer the prompts in a new project, on a cluster with this many machines (0: without one)."""
    root = folder / f"project-{workers}-{time.time_ns()}"
    root.mkdir()
    (root / "tunewright.yaml").write_text(CONFIG)
    with clocked(workers) as clock:
        project = Project(ProjectFolder(root).on_cluster("auto" if workers else None), Steps())
        with answer_workers(project) as found:
            generator = Generator.of(
                project.folder, project.base, project.chat, "none", project.reporter, workers=found
            )
            texts = [json.loads(line)["prompt"] for line in (folder / "pairs.jsonl").read_text().splitlines()]
            prompts = [generator.prompt([Message("user", text)]) for text in texts]
            half = len(prompts) // 2
            answers = generator.answer("first half", prompts[:half], LIMIT)
            first = time.perf_counter()
            answers += generator.answer("second half", prompts[half:], LIMIT)
            return {
                **clock.times(),
                "second_s": round(time.perf_counter() - first, 1),
                "answers": hashlib.sha256(json.dumps([answer.text for answer in answers]).encode()).hexdigest(),
            }


COMPARISON = Comparison(
    script=__file__,
    help=__doc__,
    sizes={"prompts": 128},
    prepare=prepare,
    measure=measure,
    columns={
        "s": "s",
        "second_s": "2nd half s",
        "cpu_s": "CPU s",
        "ray_cpu_s": "Ray CPU s",
        "load": "load",
        "answers": "answers",
    },
    same="answers",
    ratios=("s", "second_s"),
)

if __name__ == "__main__":
    COMPARISON.main()
