"""Progress, metrics and kept evaluations of a run while it trains."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import tunewright
from making.training_runs import Heard, steady, training_project
from tunewright.adapters.registry import Adapter
from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.metrics import normalised
from tunewright.training.history import best_evaluation, evaluations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick_base(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """Return the tiny base with a louder head: a frozen quiet head keeps every probability near chance."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("bases") / "quick"
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 40
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, quick_base: Path) -> tuple[Project, Adapter, Heard]:
    heard = Heard()
    folder = tmp_path_factory.mktemp("watch") / "p"
    keys = {"lr_scheduler_type": "constant", "eval_steps": 20}
    opened = training_project(folder, quick_base, heard, keys, epochs=10)
    return opened, opened.train().adapter, heard


def _files(opened: Project) -> Path:
    (work,) = (opened.folder.work / "training").iterdir()
    return work


def test_evaluations_score_the_answers_of_transformers_with_that_adapter(
    learnt: tuple[Project, Adapter, Heard], quick_base: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    opened, adapter, _ = learnt
    dev = opened.data.version().examples("dev")
    reported = adapter.lineage["training"]
    assert [e["step"] for e in reported["epochs"]] == [20, 40, 60, 80, 100, 120]
    assert (reported["metric"], reported["dev_rows_answered"]) == ("exact_match", len(dev))
    scores = []
    for each in reported["epochs"]:
        step = f"step-{each['step']}"
        folder = adapter.folder if each["step"] == reported["kept_step"] else adapter.checkpoint(step)
        base = AutoModelForCausalLM.from_pretrained(quick_base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder).eval()
        answers = []
        for row in dev:
            prompt = opened.chat.prompt(row.example.prompt)
            with torch.inference_mode():
                ids = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
            answers.append(
                opened.chat.text([i for i in ids[0, len(prompt) :].tolist() if i not in opened.chat.stop_ids])
            )
        right = [normalised(a) == normalised(row.example.output) for a, row in zip(answers, dev, strict=True)]
        scores.append(sum(right) / len(right))
    assert [e["dev_metric"] for e in reported["epochs"]] == pytest.approx(scores)
    assert max(scores) > 0


def test_kept_adapter_is_the_best_by_the_metric_in_lineage_history_and_report(
    learnt: tuple[Project, Adapter, Heard],
) -> None:
    _, adapter, reported = learnt
    epochs = adapter.lineage["training"]["epochs"]
    best = max(epochs, key=lambda e: (e["dev_metric"], -e["dev_loss"], -e["step"]))
    assert adapter.lineage["training"]["kept_step"] == best["step"]
    rows = [row for row in adapter.history if "eval_loss" in row]
    assert [(r["step"], r["eval_loss"], r["eval_metric"]) for r in rows] == [
        (e["step"], e["dev_loss"], e["dev_metric"]) for e in epochs
    ]
    lines = [line for line in reported.lines if "dev loss" in line and line.startswith("Epoch")]
    assert len(lines) == len(epochs)
    assert f"dev loss {epochs[0]['dev_loss']:.3f}" in lines[0]
    assert f"{100 * epochs[-1]['dev_metric']:.1f}%" in lines[-1]


def test_progress_curves_have_every_step_and_evaluation(learnt: tuple[Project, Adapter, Heard]) -> None:
    _, adapter, reported = learnt
    steps = [(step, numbers["loss"]) for step, numbers in reported.measured if "loss" in numbers]
    assert steps == [(row["step"], row["loss"]) for row in adapter.history if "loss" in row]
    dev = [numbers for _, numbers in reported.measured if "eval_loss" in numbers]
    assert all(set(numbers) == {"eval_loss", "exact_match"} for numbers in dev)


def test_step_row_has_speed_learning_rate_and_gradient_norm(learnt: tuple[Project, Adapter, Heard]) -> None:
    first, *others = [row for row in learnt[1].history if "loss" in row]
    assert set(first) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "memory_bytes"}
    assert all(set(row) == {*first, "tokens_per_s"} and row["tokens_per_s"] > 0 for row in others)
    # This process with torch and a tiny model: its size is right, not only its name.
    assert all(50e6 < row["memory_bytes"] < 50e9 for row in [first, *others])


def test_frequent_evaluation_does_not_change_training(tmp_path: Path, tiny_base_folder: Path) -> None:
    """Dropout draws random numbers, so the last step's adapter would differ."""
    last = []
    for name, every in (("seldom", 24), ("often", 4)):
        opened = training_project(tmp_path / name, tiny_base_folder, train={"lora_dropout": 0.2, "eval_steps": every})
        adapter = opened.train().adapter
        kept = adapter.lineage["training"]["kept_step"]
        folder = adapter.folder if kept == 24 else adapter.checkpoint("step-24")
        last.append((folder / "adapter_model.safetensors").read_bytes())
    assert last[0] == last[1]


def test_run_evaluated_at_every_step_keeps_nine_adapters(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check while it trains, after a stop, and when the newest checkpoint is lost."""
    from tunewright.training import checkpoints

    remove = checkpoints._remove_unneeded_adapters
    most = 0

    def counting(work: Path) -> None:
        nonlocal most
        remove(work)
        most = max(most, len(list((work / "evaluated").iterdir())))

    monkeypatch.setattr(checkpoints, "_remove_unneeded_adapters", counting)
    keys = {"eval_steps": 1, "eval_max_samples": 0}
    reported = Heard()
    whole = training_project(tmp_path / "whole", tiny_base_folder, reported, keys).train().adapter
    evaluated = whole.lineage["training"]["epochs"]
    assert len(evaluated) == 24
    # No dev row is answered, so the loss decides.
    training = whole.lineage["training"]
    assert (training["metric"], training["dev_rows_answered"]) == (None, 0)
    assert {e["dev_metric"] for e in evaluated} == {None}
    assert training["kept_step"] == min(evaluated, key=lambda e: e["dev_loss"])["step"]
    best = sorted(evaluated, key=lambda e: e["dev_loss"])[:8]
    expected = {f"step-{e['step']}" for e in [*best, evaluated[-1]]}
    assert {*whole.checkpoints, f"step-{whole.lineage['training']['kept_step']}"} == expected
    assert f"Kept the adapters of {len(expected)} of 24 evaluations: the best ones and the last one." in reported.lines
    assert most <= 10
    with pytest.raises(KeyboardInterrupt):
        training_project(tmp_path / "stopped", tiny_base_folder, Heard(after=17), keys).train()
    newest = max(_files(tunewright.open(tmp_path / "stopped")).glob("checkpoint-*"), key=checkpoints.step_of)
    (newest / "optimizer.pt").write_bytes(b"")
    again = Heard()
    went_on = training_project(tmp_path / "stopped", tiny_base_folder, again).train().adapter
    assert "Resuming from step 16 of 24" in again.lines
    assert went_on.digest == whole.digest
    assert went_on.checkpoints.keys() == whole.checkpoints.keys()


def test_answered_dev_rows_are_bounded(tmp_path: Path, tiny_base_folder: Path) -> None:
    reported = Heard()
    some = training_project(tmp_path / "some", tiny_base_folder, reported, {"eval_max_samples": 5}).train().adapter
    assert some.lineage["training"]["dev_rows_answered"] == 5
    assert "Each evaluation answers 5 of the 12 dev rows, drawn by the seed (train.eval_max_samples)." in reported.lines


def test_patience_ends_a_run_also_after_a_stop(tmp_path: Path, tiny_base_folder: Path) -> None:
    def project(name: str, reporter: Heard) -> Project:
        keys = {"eval_steps": 1, "early_stopping_patience": 1, "lr_scheduler_type": "constant"}
        return training_project(tmp_path / name, tiny_base_folder, reporter, keys, learning_rate=0.3)

    reported = Heard()
    whole = project("whole", reported).train().adapter
    evaluated = evaluations(whole.history)
    last = whole.history[-1]["step"]
    assert last < 24
    assert evaluated.index(best_evaluation(evaluated)) == len(evaluated) - 2
    assert any(line.startswith("Stopping early: 1 evaluation without a better one") for line in reported.lines)
    # At the step before the last, and at the last: stopped when training is over but nothing is stored.
    for after in (last - 1, last):
        with pytest.raises(KeyboardInterrupt):
            project(f"stopped-{after}", Heard(after)).train()
        again = project(f"stopped-{after}", Heard()).train().adapter
        assert again.digest == whole.digest
        assert [row["step"] for row in again.history] == [row["step"] for row in whole.history]


_KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from making.training_runs import Heard, training_project
import signal
training_project(Path({folder!r}), Path({base!r}), Heard({after}, signal.SIGKILL)).train()
"""


def test_metrics_of_a_killed_run_have_no_gap_or_repetition(tmp_path: Path, tiny_base_folder: Path) -> None:
    import subprocess

    folder = tmp_path / "project"
    opened = training_project(folder, tiny_base_folder)
    tests = str(Path(__file__).parents[1])
    script = _KILLED.format(tests=tests, folder=str(folder), base=str(tiny_base_folder), after=9)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    before = [json.loads(line) for line in (_files(opened) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in before] == list(range(1, 10))  # checkpoints are made each 5 steps
    reported = Heard(after=14)
    with pytest.raises(KeyboardInterrupt):
        training_project(folder, tiny_base_folder, reported).train()
    between = [json.loads(line) for line in (_files(opened) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in between if "loss" in row] == list(range(1, 15))
    assert steady(between[:9]) == steady(before)
    history = training_project(folder, tiny_base_folder).train().adapter.history
    assert [row["step"] for row in history if "loss" in row] == list(range(1, 25))
    assert [row["step"] for row in history if "eval_loss" in row] == [12, 24]
    assert steady(history[: len(between)]) == steady(between)


def test_unstable_step_names_exactly_its_rows(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights become infinite after 14 steps; the rows of the 15th are read from its batch."""
    import torch

    from tunewright.training.trainer import Trainer

    batches: list[list[list[int]]] = []
    step = Trainer.training_step

    def breaking(self: Trainer, model: Any, inputs: Any, items: Any = None) -> Any:
        batches.append([inputs["batch"].input_ids.flatten().tolist()])
        if len(batches) == 15:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))
        return step(self, model, inputs, items)

    monkeypatch.setattr(Trainer, "training_step", breaking)
    opened = training_project(tmp_path / "p", tiny_base_folder)
    with pytest.raises(UserError, match="at step 15; no adapter is kept") as caught:
        opened.train()
    text = opened.chat.text(batches[14][0])
    rows = opened.data.version().examples("train")
    # An input ends in a number that no other has.
    inside = {row.key[:12] for row in rows if row.example.input_text.split()[-1] in text.replace("<", " ").split()}
    named = {line.split()[1] for line in caught.value.what.splitlines() if line.startswith("  example")}
    assert len(named) == 8
    assert named <= inside
    assert not list((tmp_path / "p" / "adapters").glob("*"))


def test_tensorboard_gets_every_number_in_the_project_folder(tmp_path: Path, tiny_base_folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = training_project(tmp_path / "p", tiny_base_folder, train={"report_to": ["tensorboard"]})
    before = dict(os.environ)
    adapter = opened.train().adapter
    assert dict(os.environ) == before
    (run,) = (tmp_path / "p" / ".tunewright" / "trackers" / "tensorboard").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("eval/metric", "eval_metric")):
        written = [(e.step, e.value) for e in events.Scalars(tag)]
        assert written == [(r["step"], pytest.approx(r[key])) for r in adapter.history if key in r]


def test_missing_tracker_is_refused_before_loading(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trackio" else found(name, *a))
    _require_refused(tmp_path, tiny_base_folder, "[tensorboard, trackio]", "trackio")


def test_invalid_mlflow_store_is_refused_before_loading(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    _require_refused(tmp_path, tiny_base_folder, "[mlflow]", "file:")


def _require_refused(folder: Path, base: Path, trackers: str, named: str) -> None:
    heard = Heard()
    opened = training_project(folder / "p", base, heard, {"report_to": trackers})
    for go in (opened.train, opened.run):
        with pytest.raises(UserError, match=named) as caught:
            go()
        assert caught.value.where == "train.report_to"
    assert not any(line.startswith("Loading") for line in heard.lines)
