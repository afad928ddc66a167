"""Helpers of the data tests: a recording reporter, pairs, projects."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunewright.config.project import CONFIG_FILE, ProjectFolder, create_project
from tunewright.core.progress import LogReporter, LogTask, Task
from tunewright.data.examples import Example, Message

Pair = tuple[str, str]

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "kelp", "larch"]


class _Counting(LogTask):
    def __init__(self, steps: dict[str, tuple[int, int]], title: str) -> None:
        self.all, self.title = steps, title

    def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
        done, total = self.all[self.title]
        self.all[self.title] = (done + steps, total)


class Listener(LogReporter):
    """A reporter that records messages."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.steps: dict[str, tuple[int, int]] = {}  # title: (done, total)

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        self.steps[title] = (0, total)
        yield _Counting(self.steps, title)


def example(prompt: str, completion: str, system: str | None = None) -> Example:
    """A one-turn example."""
    turns = [] if system is None else [Message("system", system)]
    return Example((*turns, Message("user", prompt), Message("assistant", completion)))


def unlike_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Pairs whose inputs have little in common."""
    draw = random.Random(seed)
    return [(" ".join(draw.choices(WORDS, k=8)) + f" {draw.getrandbits(40):x}", f"answer {i}") for i in range(count)]


def write_jsonl(path: Path, pairs: Sequence[Pair]) -> Path:
    """A prompt/completion file."""
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs), encoding="utf-8")
    return path


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A file of rows in the format of its suffix; without one, a folder of ``datasets``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def new_project(root: Path, config: str = "") -> ProjectFolder:
    """A project with this config."""
    return create_project(root, {CONFIG_FILE: config})


def jaccard(a: str, b: str) -> float:
    """The reference: Jaccard similarity of character 4-grams, spelled out."""
    grams = [{t[i : i + 4] for i in range(len(t) - 3)} or {t} for t in (a, b)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])
