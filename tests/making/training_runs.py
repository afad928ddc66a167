"""Tiny projects to train, reporters that keep what is said or stop a run, and losses without our trainer."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tunewright
from making.command_line import pairs, tiny_project, write_jsonl
from tunewright.api import Project
from tunewright.core.progress import LogReporter, LogTask, Task

ROWS = 80
WITH_REJECTED = 60
DIFFERENT = {"tokens_per_s", "memory_bytes"}
"""Numbers of a step that differ from run to run."""


class Heard(LogReporter):
    """Keeps messages, titles of tasks and measured numbers; signals this process after some training steps."""

    def __init__(self, after: int | None = None, number: int = signal.SIGINT) -> None:
        self.lines: list[str] = []
        self.warned: list[str] = []
        self.measured: list[tuple[int, dict[str, float]]] = []
        self.after = after
        self.number = number

    def say(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(message)
        self.warned.append(message)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        self.lines.append(title)
        with super().task(title, total, unit) as task:
            yield _Steps(self) if title.startswith("Training") else task


class _Steps(LogTask):
    def __init__(self, heard: Heard) -> None:
        self.heard = heard
        self.done = 0

    def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
        self.done += steps
        if self.done == self.heard.after:
            os.kill(os.getpid(), self.heard.number)

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        self.heard.measured.append((step, dict(numbers)))


def new_config(folder: Path, train: Mapping[str, Any], **changed: Any) -> None:
    """Add keys to the config's train section, and change keys that are set."""
    file = folder / "tunewright.yaml"
    text = file.read_text()
    for key, value in changed.items():
        text = re.sub(rf"(?m)^( *){key}: .*$", rf"\g<1>{key}: {value}", text)
    file.write_text(text.replace("train:\n", "train:\n" + "".join(f"  {k}: {v}\n" for k, v in train.items())))


def training_project(
    folder: Path,
    base: Path,
    reporter: LogReporter | None = None,
    train: Mapping[str, Any] | None = None,
    count: int = 120,
    **changed: Any,
) -> Project:
    """The project in ``folder``, opened, with its pairs; made first, with these config keys, if it is missing."""
    if not folder.exists():
        tiny_project(folder, base, count)
        new_config(folder, train or {}, **changed)
    opened = tunewright.open(folder, reporter)
    opened.data.add([folder / "pairs.jsonl"])
    return opened


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history without what differs from run to run."""
    return [{key: value for key, value in row.items() if key not in DIFFERENT} for row in rows]


def plain_dev_loss(model: Any, project: Project) -> float:
    """The mean loss of dev's trained tokens with transformers alone, row by row."""
    import torch

    from tunewright.training.rows import IGNORED, as_columns, encode_members

    columns = as_columns(encode_members(project.chat, project.data.version().examples("dev"), 2048).rows)
    total = tokens = 0.0
    for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True):
        count = sum(label != IGNORED for label in labels[1:])
        with torch.inference_mode():
            total += float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss) * count
        tokens += count
    return total / tokens


def preference_rows() -> list[dict[str, str]]:
    """Rows whose chosen answer is the input's first word, and whose rejected one is its second."""
    rows = pairs(ROWS)
    chosen = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["prompt"].split()[1]}
        for row in rows[:WITH_REJECTED]
    ]
    return [*chosen, *rows[WITH_REJECTED:]]


def tiny_preference_project(folder: Path, base: Path, *, rejected: bool = True) -> Path:
    """A project with one dataset version that trains in six steps, without answering dev."""
    tiny_project(folder, base, ROWS)
    if rejected:
        write_jsonl(folder / "pairs.jsonl", preference_rows())
    new_config(folder, {"eval_max_samples": 0}, epochs=1)
    tunewright.open(folder).data.add([folder / "pairs.jsonl"])
    return folder
