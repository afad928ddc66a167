"""Projects with replay on a base of random weights, for drawing and for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tunewright
from making.command_line import tiny_project
from tunewright.api import Project
from tunewright.training import self_samples


def shorten_turns(patch: pytest.MonkeyPatch) -> None:
    """A base of random weights ends a turn about every 260 tokens, wherever that is."""
    patch.setattr(self_samples, "_CHUNK", 24)
    patch.setattr(self_samples, "INSTRUCTION_TOKENS", 200)
    patch.setattr(self_samples, "ANSWER_TOKENS", 150)


def replay_project(folder: Path, base: Path, config: str = "  replay: {samples: 6}\n", reporter: Any = None) -> Project:
    """A project with its pairs added, made where it is not there yet; ``config`` goes into its train section."""
    if not folder.exists():
        tiny_project(folder, base)
        file = folder / "tunewright.yaml"
        file.write_text(file.read_text().replace("train:\n", f"train:\n{config}"))
    project = tunewright.open(folder, reporter)
    project.data.add([folder / "pairs.jsonl"])
    return project
