"""A run that pauses to be measured ends like an uninterrupted one, and is measured at its current state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tunewright
from command_line import tiny_project
from tunewright.api import Project
from tunewright.core.progress import LogReporter
from tunewright.training.checkpoints import latest_complete_checkpoint
from tunewright.training.train import PausedRun, TrainResult, train, train_until

MEASURED = {"tokens_per_s", "memory_bytes"}
"""Numbers of a step that differ from run to run."""

pytestmark = pytest.mark.slow


def _opened_project(folder: Path, base: Path) -> Project:
    if not folder.exists():
        tiny_project(folder, base)
        config = folder / "tunewright.yaml"
        # Dropout draws random numbers at each step: a pause must not use up any.
        config.write_text(config.read_text().replace("train:\n", "train:\n  lora_dropout: 0.1\n"))
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    return project


def _until(project: Project, work: Path, step: int) -> PausedRun:
    return train_until(
        project.folder, project.data.version(), project.base, project.chat, LogReporter(), work=work, step=step
    )


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> TrainResult:
    return _opened_project(tmp_path_factory.mktemp("pausing") / "project", tiny_base_folder).train()


def test_paused_run_ends_with_the_same_adapter_and_measures_each_pause(
    unstopped: TrainResult, tmp_path: Path, tiny_base_folder: Path
) -> None:
    """Pauses are in the middle of an epoch, at its end where the run evaluates anyway, and one step later."""
    project, work = _opened_project(tmp_path / "project", tiny_base_folder), tmp_path / "work"
    middle = _until(project, work, 7)
    assert (middle.step, middle.best.step) == (7, 7)
    checkpoint = latest_complete_checkpoint(work)
    assert checkpoint is not None and checkpoint.name == "checkpoint-7"
    assert middle.best.dev_loss == pytest.approx(_plain_dev_loss(tiny_base_folder, checkpoint, project), rel=1e-5)
    again = _until(project, work, 7)  # as after a kill between the pause and what it is for
    assert again.best == middle.best
    end = _until(project, work, 12)
    own = [row for row in unstopped.adapter.history if "eval_loss" in row]
    assert end.best.dev_loss == own[0]["eval_loss"]
    assert _until(project, work, 13).step == 13
    place = tmp_path / "project" / "adapters"
    ended = train(
        project.folder, project.data.version(), project.base, project.chat, LogReporter(), work=work, adapters=place
    )
    assert ended.adapter.digest == unstopped.adapter.digest
    assert _numbers(ended) == _numbers(unstopped)
    assert not work.exists()


def _numbers(result: TrainResult) -> list[dict[str, Any]]:
    """Return the history without speeds."""
    return [{key: row[key] for key in row if key not in MEASURED} for row in result.adapter.history]


def _plain_dev_loss(base: Path, adapter: Path, project: Project) -> float:
    """Compute the mean loss of dev's trained tokens with transformers and peft alone, row by row."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tunewright.training.rows import as_columns, encode_members

    columns = as_columns(encode_members(project.chat, project.data.version().examples("dev"), 2048).rows)
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
    ).eval()
    total = tokens = 0.0
    for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True):
        count = sum(label >= 0 for label in labels[1:])
        with torch.inference_mode():
            total += float(model(torch.tensor([ids]), labels=torch.tensor([labels])).loss) * count
        tokens += count
    return total / tokens
