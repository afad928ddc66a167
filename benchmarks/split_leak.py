"""Leakage of a random split against the split by cluster, and each class's deviation from its share of the test split.

    python benchmarks/split_leak.py [banking77/train.csv banking77/test.csv]

Files are CSV with the columns text and category; without any it takes the example project's pairs. Each setting of
data.dedup_threshold adds them to a new project, as ``tunewright data add`` does, and measures as ``tunewright data
leakage`` does. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tunewright.config import Config, DataConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.data.add import add
from tunewright.data.dedup.leakage import measure_leakage
from tunewright.data.examples import class_like
from tunewright.data.splits import assign_splits
from tunewright.data.versions import DatasetVersion, load_version
from tunewright.examples import PAIRS_FILE, project_files

SIMILARITIES = (0.8, 0.7)


class _Silent(LogReporter):
    """A reporter that drops the warnings of ``data add``."""

    def say(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...


def main() -> None:
    """Measure what the command line requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    args = parser.parse_args()
    print(f"{'similarity':>10} {'rows':>7} {'test rows by nearest training row: 0.0 0.1 … 0.9':^60} {'leak':>16}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for similarity in SIMILARITIES:
            version, data = _version(Path(folder) / str(similarity), args.files, similarity)
            results.append({"similarity": similarity, **_leaks(version), **_classes(version, data)})
    print(json.dumps(results))


def _version(root: Path, files: list[Path], similarity: float) -> tuple[DatasetVersion, DataConfig]:
    """Add the pairs as a dataset version of a new project."""
    root.mkdir()
    columns = {"input": "text", "output": "category"} if files else {}
    data = DataConfig.model_validate({**columns, "dedup_threshold": similarity})
    if not files:
        files = [root / PAIRS_FILE]
        files[0].write_text(project_files()[PAIRS_FILE], encoding="utf-8")
    add(ProjectFolder(root, Config(data=data)), files, _Silent())
    return load_version(root / "dataset"), data


def _leaks(version: DatasetVersion) -> dict[str, Any]:
    report = measure_leakage(version, 0, _Silent())
    counts = report.histogram("test")
    similarity = version.manifest.settings.dedup_threshold
    row = f"{similarity:>10} {len(version.members):>7,} " + " ".join(f"{count:>5}" for count in counts)
    for at in report.leaks:
        print(f"{row:<79} {at.threshold}: {at.here:>6.1%}; random {at.random:>6.1%}")
        row = ""
    shares = {str(at.threshold): {"here": round(at.here, 4), "random": round(at.random, 4)} for at in report.leaks}
    return {"rows": len(version.members), "test_histogram": counts, "leaks": shares}


def _classes(version: DatasetVersion, data: DataConfig) -> dict[str, Any]:
    """Print the largest deviation of a class from its share of test in rows, with and without the split by class."""
    outputs = {m.key: m.example.output for m in version.members}
    if not class_like(list(outputs.values())):
        print(f"{'':>10} the answers are not classes")
        return {}
    clusters: dict[str, list[str]] = defaultdict(list)
    for member in version.members:
        clusters[member.cluster].append(member.key)
    sizes = Counter(outputs.values())
    off = {}
    for name, class_of in (("by class", outputs), ("without", None)):
        splits = assign_splits(clusters, {}, data, 0, class_of)
        test = Counter(outputs[key] for cluster, keys in clusters.items() for key in keys if splits[cluster] == "test")
        off[name] = round(max(abs(test[each] - data.test_size * size) for each, size in sizes.items()), 1)
    print(f"{'':>10} {len(sizes)} classes, rows off their share of test at most: {off}")
    return {"classes": len(sizes), "rows_off": off}


if __name__ == "__main__":
    main()
