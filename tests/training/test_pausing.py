"""A run that pauses to be measured ends like an uninterrupted one, and is measured at its current state."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from making.training_runs import plain_dev_loss, steady, training_project
from tunewright.api import Project
from tunewright.core.progress import LogReporter
from tunewright.training import step_numbers, trainer
from tunewright.training.checkpoints import latest_complete_checkpoint
from tunewright.training.monitoring import DivergedError, MetricsCallback
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


def _files(work: Path) -> dict[str, Any]:
    """The files of a run, without what differs from run to run."""
    found: dict[str, Any] = {}
    for path in sorted(work.rglob("*")):
        name = str(path.relative_to(work))
        if path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            found[name] = state | {"log_history": steady(state["log_history"])}
        elif path.name == "metrics.jsonl":
            found[name] = steady([json.loads(line) for line in path.read_text().splitlines()])
        elif path.is_file() and path.name not in ("training_args.bin", "manifest.json"):
            found[name] = path.read_bytes()
    return found


def test_numbers_read_one_step_late_leave_the_same_files(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics and checkpoints at a pause, and after a resumed run that stops early."""
    ends = []
    for name, late in (("at-once", ()), ("late", ("cpu",))):
        monkeypatch.setattr(step_numbers, "READ_LATE", late)
        keys = {"lora_dropout": 0.1, "early_stopping_patience": 1, "eval_steps": 4}
        project = training_project(tmp_path / name, tiny_base_folder, train=keys)
        _until(project, tmp_path / f"{name}-work", 7)
        paused = _files(tmp_path / f"{name}-work")
        _until(project, tmp_path / f"{name}-work", 24)
        ends.append((paused, _files(tmp_path / f"{name}-work")))
    assert {"metrics.jsonl", "checkpoint-7/adapter_model.safetensors", "checkpoint-7/optimizer.pt"} <= ends[0][0].keys()
    assert ends[0][0] == ends[1][0]
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("step", [4, 5])
def test_step_without_a_finite_loss_is_not_saved_when_read_late(
    step: int, tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is due after step 5: the bad step is that one, or the step before it."""
    compute_loss = trainer.Trainer.compute_loss

    def spoilt(self: trainer.Trainer, *arguments: Any, **keys: Any) -> torch.Tensor:
        loss = compute_loss(self, *arguments, **keys)
        return loss * float("nan") if self.state.global_step + 1 == step else loss

    monkeypatch.setattr(step_numbers, "READ_LATE", ("cpu",))
    monkeypatch.setattr(trainer.Trainer, "compute_loss", spoilt)
    project = _project(tmp_path / "project", tiny_base_folder)
    with pytest.raises(DivergedError, match=f"the loss is nan at step {step};"):
        project.train()
    (work,) = (tmp_path / "project" / ".tunewright" / "training").iterdir()
    assert not list(work.glob("checkpoint-*"))


@pytest.mark.parametrize("late", [(), ("cpu",)])
def test_second_stop_while_a_step_is_logged_saves_the_latest_step(
    late: tuple[str, ...],
    unstopped: TrainResult,
    tmp_path: Path,
    tiny_base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read late, step 4 is logged after step 5 has changed the weights."""
    on_log = MetricsCallback.on_log

    def with_signals(self: MetricsCallback, args: Any, state: Any, *others: Any, **keys: Any) -> None:
        on_log(self, args, state, *others, **keys)
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(step_numbers, "READ_LATE", late)
    project = _project(tmp_path / "project", tiny_base_folder)
    with monkeypatch.context() as patched:
        patched.setattr(MetricsCallback, "on_log", with_signals)
        with pytest.raises(KeyboardInterrupt):
            project.train()
    (work,) = (tmp_path / "project" / ".tunewright" / "training").iterdir()
    checkpoint = latest_complete_checkpoint(work)
    assert checkpoint is not None and checkpoint.name == ("checkpoint-5" if late else "checkpoint-4")
    resumed = project.train()
    assert resumed.adapter.digest == unstopped.adapter.digest
    assert steady(resumed.adapter.history) == steady(unstopped.adapter.history)
