"""A run that pauses to be measured ends like an uninterrupted one, and is measured at its current state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from making.training_runs import plain_dev_loss, steady, training_project
from tunewright.api import Project
from tunewright.core.progress import LogReporter
from tunewright.training.checkpoints import latest_complete_checkpoint
from tunewright.training.train import PausedRun, TrainResult, train, train_until

pytestmark = pytest.mark.slow


def _project(folder: Path, base: Path) -> Project:
    """Dropout draws random numbers at each step: a pause must not use up any."""
    return training_project(folder, base, train={"lora_dropout": 0.1})


def _until(project: Project, work: Path, step: int) -> PausedRun:
    return train_until(
        project.folder, project.data.version(), project.base, project.chat, LogReporter(), work=work, step=step
    )


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> TrainResult:
    return _project(tmp_path_factory.mktemp("pausing") / "project", tiny_base_folder).train()


def test_paused_run_ends_with_the_same_adapter_and_measures_each_pause(
    unstopped: TrainResult, tmp_path: Path, tiny_base_folder: Path
) -> None:
    """Pauses are in the middle of an epoch, at its end where the run evaluates anyway, and one step later."""
    project, work = _project(tmp_path / "project", tiny_base_folder), tmp_path / "work"
    middle = _until(project, work, 7)
    assert (middle.step, middle.best.step) == (7, 7)
    checkpoint = latest_complete_checkpoint(work)
    assert checkpoint is not None and checkpoint.name == "checkpoint-7"
    base = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(checkpoint)).eval()
    assert middle.best.dev_loss == pytest.approx(plain_dev_loss(tuned, project), rel=1e-5)
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
    assert steady(ended.adapter.history) == steady(unstopped.adapter.history)
    assert not work.exists()
