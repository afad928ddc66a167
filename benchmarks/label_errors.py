"""Label errors: share of the errors planted in BANKING77 that are among the most suspicious rows.

    python benchmarks/label_errors.py [SEEDS]

5% of the answers are replaced: by any other class (random), or by that of the other classes which is most like the
row's text, as a model of *words* sees it (plausible; the detector looks at characters). The set's own errors count
as false alarms here. Baselines are a model's doubt, 1 - p(answer), and disagreement with the 10 nearest rows. Needs
the data set, which is not part of the project: see tests/making/real_data.py. Prints a table and one JSON line.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunewright.config.project import CONFIG_FILE, create_project
from tunewright.core.progress import LogReporter
from tunewright.data.add import add
from tunewright.data.examples import Example, Message
from tunewright.data.review.label_models import text_features
from tunewright.data.review.suspects import find_suspects
from tunewright.data.versions import DatasetVersion, Member, load_version

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from making.real_data import banking77

NOISE = 0.05
TOPS = (0.05, 0.1, 0.2)

Labels = NDArray[np.int64]
Ranking = Callable[[DatasetVersion, int], list[str]]  # keys, the most suspicious first


def main(seeds: int) -> None:
    """Measure every detector on both kinds of errors."""
    logging.getLogger("tunewright").setLevel(logging.ERROR)
    clean = _version()
    detectors: dict[str, Ranking] = {"suspects": _suspects, "1 - p(answer)": _doubt, "10 nearest": _nearest}
    found: dict[tuple[str, str], list[list[float]]] = {}
    for kind in ("random", "plausible"):
        for seed in range(seeds):
            noisy, bad = _with_errors(clean, kind, seed)
            for name, ranking in detectors.items():
                began = time.perf_counter()
                order = ranking(noisy, seed)
                seconds = time.perf_counter() - began
                row = [_recall(order, bad, top, len(noisy.members)) for top in TOPS]
                found.setdefault((kind, name), []).append([*row, seconds])
    print(f"{len(clean.members):,} rows, {NOISE:.0%} errors, {seeds} seeds: errors found in the top 5%, 10%, 20%")
    results: list[dict[str, Any]] = []
    for (kind, name), rows in found.items():
        mean, least = np.mean(rows, axis=0), np.min(rows, axis=0)
        shares = "  ".join(f"{share:6.1%}" for share in mean[:-1])
        print(f"{kind:<10} {name:<14} {shares}   least in the top 10%: {least[1]:.1%}   {mean[-1]:5.1f} s")
        results.append({"errors": kind, "detector": name, "runs": np.round(rows, 4).tolist()})
    print(json.dumps(results))


def _version() -> DatasetVersion:
    with tempfile.TemporaryDirectory() as folder:
        project = create_project(Path(folder) / "banking77", {CONFIG_FILE: ""})
        file = project.root / "banking77.jsonl"
        rows = [{"prompt": e.input_text, "completion": e.output} for e in banking77()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        add(project, [file], LogReporter())
        return load_version(project.dataset)


def _with_errors(clean: DatasetVersion, kind: str, seed: int) -> tuple[DatasetVersion, set[str]]:
    """Return the version with wrong answers, and the keys of their rows."""
    draw = np.random.default_rng(seed)
    names, labels = np.unique([m.example.output for m in clean.members], return_inverse=True)
    rows = draw.choice(len(labels), round(NOISE * len(labels)), replace=False)
    if kind == "random":
        wrong = (labels[rows] + draw.integers(1, len(names), len(rows))) % len(names)
    else:
        wrong = _likely_others([m.example.input_text for m in clean.members], labels)[rows]
    members = list(clean.members)
    for row, label in zip(rows.tolist(), wrong.tolist(), strict=True):
        members[row] = _answered(members[row], str(names[label]))
    bad = {members[row].key for row in rows.tolist()}
    # Two rows with one input can become the same pair: one row then, as in any version.
    unique = {m.key: m for m in members}
    return replace(clean, members=tuple(unique[key] for key in sorted(unique))), bad


def _answered(member: Member, output: str) -> Member:
    example = Example((*member.example.prompt, Message("assistant", output)))
    return replace(member, example=example, key=example.pair_key)


def _likely_others(texts: Sequence[str], labels: Labels) -> Labels:
    """Return for each row the other class whose mean vector of words and word pairs is nearest."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)
    centres = normalize((words.T @ np.eye(int(labels.max()) + 1)[labels]).T)
    likeness = words @ centres.T
    likeness[np.arange(len(labels)), labels] = -1
    best: Labels = likeness.argmax(axis=1)
    return best


def _suspects(version: DatasetVersion, seed: int) -> list[str]:
    return [s.key for s in find_suspects(version, LogReporter(), share=max(TOPS), seed=seed).suspects]


def _doubt(version: DatasetVersion, seed: int) -> list[str]:
    """Return a model's doubt with the same features and folds of rows, without cleanlab or near-duplicates."""
    from sklearn.linear_model import SGDClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    features, labels = _problem(version)
    model = SGDClassifier(loss="log_loss", alpha=1e-5, random_state=seed)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    chances = cross_val_predict(model, features, labels, cv=folds, method="predict_proba")
    return _ordered(version, 1 - chances[np.arange(len(labels)), labels])


def _nearest(version: DatasetVersion, _seed: int) -> list[str]:
    """Return the share of the 10 nearest rows (cosine) with another answer."""
    from sklearn.neighbors import NearestNeighbors

    features, labels = _problem(version)
    distance, near = NearestNeighbors(n_neighbors=11, metric="cosine").fit(features).kneighbors(features)
    own = near == np.arange(len(labels))[:, None]
    weight = np.where(own, 0, 1 - distance)
    other = np.where(labels[near] != labels[:, None], weight, 0).sum(axis=1)
    return _ordered(version, other / np.maximum(weight.sum(axis=1), 1e-9))


def _problem(version: DatasetVersion) -> tuple[Any, Labels]:
    labels = np.unique([m.example.output for m in version.members], return_inverse=True)[1]
    return text_features([m.example.input_text for m in version.members]), labels


def _ordered(version: DatasetVersion, doubt: NDArray[np.float64]) -> list[str]:
    return [version.members[row].key for row in np.argsort(-doubt, kind="stable").tolist()]


def _recall(order: Sequence[str], bad: set[str], top: float, rows: int) -> float:
    return Counter(key in bad for key in order[: round(top * rows)])[True] / len(bad)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
