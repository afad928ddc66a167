"""A tiny project whose first 60 rows have a rejected answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tunewright
from command_line import pairs, tiny_project, write_jsonl
from tunewright.core.progress import LogReporter

ROWS = 80
WITH_REJECTED = 60


class Heard(LogReporter):
    """Keeps what is said, and the titles of tasks."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(message)

    def task(self, title: str, total: int, unit: str) -> Any:
        self.lines.append(title)
        return super().task(title, total, unit)


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


def new_config(folder: Path, train: Mapping[str, Any], **changed: Any) -> None:
    """Add keys to the config's train section, and change keys that are set."""
    file = folder / "tunewright.yaml"
    text = file.read_text()
    for key, value in changed.items():
        text = re.sub(rf"(?m)^( *){key}: .*$", rf"\g<1>{key}: {value}", text)
    file.write_text(text.replace("train:\n", "train:\n" + "".join(f"  {k}: {v}\n" for k, v in train.items())))
