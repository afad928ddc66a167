"""`crossval` without a cluster and on Ray clusters of one and two machines: seconds, processor time, digests.

    make build/ray/.installed
    build/ray/bin/python benchmarks/cluster_trials.py [--folds 4] [--rows 200] [--workers 0 1 2] [--rounds 1]

The folds train on a random base of 5 million weights and answer with a few tokens. Runs and clusters are those of
`cluster_runs.py`. The folds' trainings are done by the cluster, all answers by the command.

Bars: at most 10% more seconds with one worker than without a cluster, for jobs of over a minute; the same adapters.
Prints a table and writes benchmarks/results/cluster_trials.json.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from cluster_runs import Comparison, Run, Sizes, Steps, clocked

from tunewright.adapters.registry import list_adapters
from tunewright.api import Project
from tunewright.config.project import ProjectFolder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from making.command_line import tiny_project
from making.tiny_bases import build_base

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}


def prepare(folder: Path, sizes: Sizes) -> None:
    """Write the base and a project with data."""
    base = build_base(folder / "base", **SHAPE)
    project = tiny_project(folder / "project", base, count=sizes["rows"])
    config = project / "tunewright.yaml"
    text = config.read_text().replace("epochs: 2", "epochs: 3\n  eval_max_samples: 0")
    config.write_text(text.replace("num_fewshot: [1, 2]", "num_fewshot: [1]\n  retrievers: []\n  max_new_tokens: 4"))
    (folder / "folds").write_text(str(sizes["folds"]))
    Project(ProjectFolder(project), Steps()).data.add([project / "pairs.jsonl"])


def measure(folder: Path, workers: int) -> Run:
    """Cross-validate a copy of the project, on a cluster with this many machines (0: without one)."""
    root = folder / f"project-{workers}-{time.time_ns()}"
    shutil.copytree(folder / "project", root)
    steps = Steps()
    with clocked(workers) as clock:
        project = Project(ProjectFolder(root).on_cluster("auto" if workers else None), steps)
        project.crossval(folds=int((folder / "folds").read_text()), force=True)
        times = clock.times()
    adapters = list_adapters(root / ".tunewright" / "crossval" / "adapters")
    return {
        **times,
        "trainings_s": round(sum(adapter.lineage["training"]["seconds"] for adapter in adapters), 1),
        "steps": steps.seconds,
        "adapters": ",".join(sorted(adapter.digest[:12] for adapter in adapters)),
    }


COMPARISON = Comparison(
    script=__file__,
    help=__doc__,
    sizes={"folds": 4, "rows": 200},
    prepare=prepare,
    measure=measure,
    columns={
        "s": "s",
        "trainings_s": "trainings s",
        "cpu_s": "CPU s",
        "ray_cpu_s": "Ray CPU s",
        "load": "load",
        "adapters": "adapters",
    },
    same="adapters",
)

if __name__ == "__main__":
    COMPARISON.main()
