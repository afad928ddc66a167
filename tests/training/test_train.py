"""Training: what is learnt and kept, and that a stopped run ends like an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import tunewright
from making.training_runs import Heard, training_project
from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.core.io import MANIFEST
from tunewright.training import checkpoints, step_numbers
from tunewright.training.train import TrainResult
from tunewright.training.trainer import Trainer


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> TrainResult:
    return training_project(tmp_path_factory.mktemp("train") / "project", tiny_base_folder).train()


def test_train_lowers_the_loss_and_keeps_both_curves(unstopped: TrainResult) -> None:
    history = unstopped.adapter.history
    losses = [row["loss"] for row in history if "loss" in row]
    dev = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert (len(losses), len(dev)) == (24, 2)
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.5
    assert dev[1] < dev[0]


def test_learning_rate_warms_up_over_a_tenth_and_then_falls(unstopped: TrainResult) -> None:
    rates = [row["learning_rate"] for row in unstopped.adapter.history if "loss" in row]
    peak = max(rates)
    assert peak == pytest.approx(0.003)
    assert rates.index(peak) in {2, 3}
    assert rates[-1] < 0.1 * peak


def test_adapter_loads_in_peft_and_changes_the_base(unstopped: TrainResult, tiny_base_folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        before = base(ids).logits.clone()
        tuned = PeftModel.from_pretrained(base, unstopped.adapter.folder)
        after = tuned(ids).logits
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("after", [11, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 24))])
def test_run_resumes_to_the_same_adapter_after_a_stop(
    after: int, unstopped: TrainResult, tmp_path: Path, tiny_base_folder: Path
) -> None:
    """Stops: at the first step, in an epoch's middle, and after the last step."""
    folder = tmp_path / "project"
    with pytest.raises(KeyboardInterrupt):
        training_project(folder, tiny_base_folder, Heard(after)).train()
    assert not list((folder / "adapters").glob("*"))
    (work,) = (folder / ".tunewright" / "training").iterdir()
    # The signal comes while a step is reported: no other one begins.
    assert max(int(c.parent.name.split("-")[1]) for c in work.glob(f"checkpoint-*/{MANIFEST}")) == after
    resumed = training_project(folder, tiny_base_folder).train()
    assert resumed.adapter.digest == unstopped.adapter.digest
    assert not work.exists()


@pytest.mark.slow
@pytest.mark.parametrize("late", [(), ("cpu",)])
def test_stop_abandons_a_long_step_and_saves_the_previous_one(
    late: tuple[str, ...], tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The abandoned passes have drawn random numbers for dropout, which the resumed step draws again."""
    monkeypatch.setattr(step_numbers, "READ_LATE", late)

    def project(name: str) -> Project:
        keys = {"micro_batch_size": 1, "lora_dropout": 0.1}
        return training_project(tmp_path / name, tiny_base_folder, train=keys)

    unstopped = project("unstopped").train()
    stopped = project("project")
    monkeypatch.setattr(checkpoints, "GRACE_S", 0.001)  # the eight passes of a step take longer anywhere
    passes = iter(range(1, 10**6))
    training_step = Trainer.training_step

    def with_signal(self: Trainer, *arguments: Any) -> Any:
        result = training_step(self, *arguments)
        if next(passes) == 6 * 8 + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", with_signal)
        with pytest.raises(KeyboardInterrupt):
            stopped.train()
    (work,) = (tmp_path / "project" / ".tunewright" / "training").iterdir()
    assert (work / "checkpoint-6" / MANIFEST).exists()
    assert not (work / "checkpoint-7").exists()
    assert [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()] == [*range(1, 7)]
    assert stopped.train().adapter.digest == unstopped.adapter.digest


@pytest.mark.slow
def test_train_skips_known_inputs_and_trains_another_seed(
    unstopped: TrainResult, tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = Path(shutil.copytree(unstopped.adapter.folder.parents[1], tmp_path / "project"))
    assert not training_project(folder, tiny_base_folder).train().trained
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("save_steps: 5", "save_steps: 7"))
    assert not training_project(folder, tiny_base_folder).train().trained
    config.write_text(config.read_text() + "seed: 1\n")
    other = tunewright.open(folder).train()
    assert other.trained
    assert other.adapter.digest != unstopped.adapter.digest


def test_train_names_an_overlong_example_and_cuts_nothing(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tmp_path / "project"
    project = training_project(folder, tiny_base_folder, train={"max_length": 42})
    with pytest.raises(UserError, match=r"longer than 42 tokens") as caught:
        project.train()
    assert caught.value.where == "train.max_length"
    assert "tokens" in caught.value.what
    assert project.data.version().examples("train")


def test_train_refuses_fewer_than_fifty_pairs_unless_forced(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tmp_path / "project"
    project = training_project(folder, tiny_base_folder, count=60)
    for go in (project.train, project.run):
        with pytest.raises(UserError, match="48 training pairs, fewer than 50") as caught:
            go()
        assert "`tunewright advise`" in (caught.value.fix or "")
    assert not (folder / "adapters").exists()
    assert not (folder / "evaluations").exists()  # `run` refuses before it measures anything
    forced = project.train(force=True).adapter
    assert forced.lineage["forced"] == "48 training pairs, fewer than 50"


def test_lineage_records_no_force_when_there_are_enough_pairs(unstopped: TrainResult) -> None:
    assert "forced" not in unstopped.adapter.lineage
