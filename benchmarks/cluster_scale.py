"""``data add`` without a cluster and on Ray clusters of one and two machines: seconds, processor time, memory, digests.

    make build/ray/.installed
    build/ray/bin/python benchmarks/cluster_scale.py [--rows 200000] [--workers 0 1 2] [--rounds 1]

Rows of 6 to 40 random words; some are from two templates, some nearly repeat the one before, some answers are frequent.
Runs and clusters are those of `cluster_runs.py`. Memory is the peak of the command's own, and of the workers' sum
without pages that they share.

Bars: at most 10% more seconds with one worker than without a cluster, for jobs of over a minute; the same files.
Prints a table and writes benchmarks/results/cluster_scale.json.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import time
from pathlib import Path

from cluster_runs import Comparison, Run, Sizes, Steps, clocked

from tunewright.api import Project
from tunewright.config.project import ProjectFolder

CONFIG = "data:\n  conflicts: accept\n"
TEMPLATES = (
    "What is the balance of account {number} held by {name} at the end of the month?",
    "Please transfer {number} euros from my savings account to {name} before next Friday.",
)


def write_pairs(path: Path, count: int) -> Path:
    """Write a file of different pairs."""
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(3, 9))) for _ in range(20_000)]
    text, answer = "none", "none"
    seen: set[bytes] = set()
    with path.open("w", encoding="utf-8") as file:
        while len(seen) < count:
            kind, label = draw.random(), f"label {draw.randint(0, 20)}"
            if kind < 0.1:
                text = draw.choice(TEMPLATES).format(
                    number=draw.randrange(100_000), name=" ".join(draw.choices(words, k=2))
                )
                answer = label
            elif kind < 0.2 and len(text) < 400:
                text = f"{text} {draw.choice(words)}"
            else:
                text = " ".join(draw.choices(words, k=draw.randint(6, 40)))
                answer = draw.choice([label, " ".join(draw.choices(words, k=12))])
            if (known := hashlib.blake2b(text.encode(), digest_size=8).digest()) not in seen:
                seen.add(known)
                file.write(json.dumps({"prompt": text, "completion": answer}) + "\n")
    return path


def prepare(folder: Path, sizes: Sizes) -> None:
    """Write the rows."""
    write_pairs(folder / "pairs.jsonl", sizes["rows"])


def measure(folder: Path, workers: int) -> Run:
    """Build the dataset in a new project, on a cluster with this many machines (0: without one)."""
    root = folder / f"project-{workers}-{time.time_ns()}"
    root.mkdir()
    (root / "tunewright.yaml").write_text(CONFIG)
    steps = Steps()
    with clocked(workers) as clock:
        project = ProjectFolder(root).on_cluster("auto" if workers else None)
        Project(project, steps).data.add([folder / "pairs.jsonl"])
        return {
            **clock.times(),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
            "workers_gb": round(clock.peak / 1e9, 2),
            "steps": steps.seconds,
            "files": digest(root / "dataset"),
        }


def digest(dataset: Path) -> str:
    """Return one digest of all files but the manifest, which has the time."""
    whole = hashlib.sha256()
    for path in sorted(dataset.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            whole.update(f"{path.relative_to(dataset)}\0".encode() + path.read_bytes())
    return whole.hexdigest()


COMPARISON = Comparison(
    script=__file__,
    help=__doc__,
    sizes={"rows": 200_000},
    prepare=prepare,
    measure=measure,
    columns={
        "s": "s",
        "cpu_s": "CPU s",
        "ray_cpu_s": "Ray CPU s",
        "peak_gb": "peak GB",
        "workers_gb": "workers GB",
        "load": "load",
        "files": "files",
    },
    same="files",
)

if __name__ == "__main__":
    COMPARISON.main()
