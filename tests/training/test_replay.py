"""Replay: training on the base's own conversations keeps the adapter close to the base, and is stored with it."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replay_helpers import replay_project, shorten_turns

import tunewright
from making.command_line import tiny_project
from making.memory_limit import run_out_of_memory
from making.tiny_bases import byte_tokenizer
from making.training_runs import Heard
from making.vllm_child import StopAfter, alive, children_of, install_fake
from tunewright.adapters.registry import REPLAY
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.evaluation.verbs import open_trainings
from tunewright.models.loading import load_model
from tunewright.training import self_samples
from tunewright.training.self_samples import draw_replay, replay_inputs
from tunewright.training.sweep.successive_halving import Progress
from tunewright.training.sweep.sweep import Sweep
from tunewright.training.train import TrainResult

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_turns(monkeypatch)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> TrainResult:
    with pytest.MonkeyPatch.context() as patch:
        shorten_turns(patch)
        return replay_project(tmp_path_factory.mktemp("replay") / "project", tiny_base_folder).train()


def test_replayed_conversations_are_kept_with_the_adapter(replayed: TrainResult) -> None:
    adapter = replayed.adapter
    message = adapter.lineage["replay"]
    assert message["samples"] == len(adapter.replayed) == 6
    assert message["seed"] == "0:replay"
    assert message["method"] == self_samples.METHOD
    assert message["left_out"]
    assert {m["role"] for row in adapter.replayed for m in row} == {"user", "assistant"}
    assert adapter.lineage["config"]["train"]["replay"] == {"samples": 6, "kl_coef": 1.0}


def test_reported_training_loss_is_that_of_the_pairs(replayed: TrainResult) -> None:
    steps = [row for row in replayed.adapter.history if "loss" in row]
    assert all("pair_loss" in row for row in steps)
    assert any("replay_kl" in row for row in steps)
    assert steps[0].get("replay_kl", 0) == 0, "an adapter that is still the base"
    first, _ = replayed.adapter.lineage["training"]["epochs"]
    seen = [row["pair_loss"] for row in steps if row["step"] <= first["step"]]
    assert first["train_loss"] == pytest.approx(np.mean(seen))
    assert first["train_loss"] > np.mean([row["loss"] for row in steps if row["step"] <= first["step"]])


def test_replay_is_part_of_what_decides_the_adapter(replayed: TrainResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(replayed.adapter.folder.parents[1], tmp_path / "same"))
    assert not tunewright.open(folder).train().trained
    file = folder / "tunewright.yaml"
    for other in ("{samples: 6, kl_coef: null}", "null"):
        file.write_text(file.read_text().replace("replay: {samples: 6}", f"replay: {other}"))
        result = tunewright.open(folder).train()
        assert result.trained
        assert result.adapter.digest != replayed.adapter.digest
        assert ("replay" in result.adapter.lineage) == (other != "null")
        assert (result.adapter.folder / REPLAY).exists() == (other != "null")
        file.write_text(file.read_text().replace(f"replay: {other}", "replay: {samples: 6}"))


def test_stopped_run_with_replay_resumes_to_the_same_adapter(
    replayed: TrainResult, tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tmp_path / "project"
    with pytest.raises(KeyboardInterrupt):
        replay_project(folder, tiny_base_folder, reporter=Heard(after=14)).train()
    assert replay_project(folder, tiny_base_folder).train().adapter.digest == replayed.adapter.digest


def test_replay_works_together_with_a_mix_in(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tmp_path / "project"
    tiny_project(folder, tiny_base_folder)
    generic = [{"prompt": f"Write a poem about number {n}.", "completion": f"{n}, oh {n}."} for n in range(30)]
    (folder / "generic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in generic))
    config = folder / "tunewright.yaml"
    text = config.read_text().replace("train:\n", "train:\n  replay: {samples: 6}\n")
    config.write_text(text.replace("data:\n", "data:\n  mix: {source: generic.jsonl, fraction: 0.1}\n"))
    opened = tunewright.open(folder)
    opened.data.add([folder / "pairs.jsonl"])
    version = opened.data.version()
    mixed = sum(m.mixed for m in version.members)
    assert mixed
    lineage = opened.train().adapter.lineage
    assert lineage["training"]["rows"] == len(version.examples("train"))
    assert lineage["dataset"]["mix"]["drawn"] == mixed
    assert lineage["replay"]["rows"] == 6


def test_sweep_counts_the_rows_drawn_and_not_those_requested(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_samples, "_FEWEST_CHUNKS", 1)
    monkeypatch.setattr(self_samples, "_MOST_DRAWN", 1)
    opened = replay_project(tmp_path / "project", tiny_base_folder, "  replay: {samples: 24}\n  eval_max_samples: 0\n")
    with open_trainings(opened) as here:
        sweep = Sweep(opened.folder, opened.data.version(), opened.base, opened.chat, opened.reporter, here)
        (outcome,) = sweep._train(sweep.trials[:1], sweep.steps)
    progress = outcome.result
    assert isinstance(progress, Progress)
    adapter = opened.adapters.list()[-1]
    replayed = adapter.lineage["replay"]["rows"]
    assert 0 < replayed < 24
    assert (
        sweep.steps == sweep.rungs[-1] == 2 * math.ceil((len(opened.data.version().examples("train")) + replayed) / 8)
    )
    assert [row["step"] for row in adapter.history if "loss" in row][-1] == progress.steps == sweep.steps


def test_replay_uses_the_nf4_base_as_reference(tmp_path: Path, tiny_base_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    opened = replay_project(tmp_path / "project", tiny_base_folder, "  replay: {samples: 3}\n  quantization: nf4\n")
    lineage = opened.train().adapter.lineage
    assert lineage["replay"]["weights"] == {"dtype": "float32", "quantization": "nf4"}
    assert lineage["replay"]["rows"] == 3


# The divergence


def _model(base: Path, share: bool, kl: float | None, tmp_path: Path) -> Any:
    """Return a trainer whose adapter differs from the base."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    from tunewright.training.trainer import Trainer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_length=None,
        report_to="none",
        remove_unused_columns=False,
        gradient_checkpointing=False,
    )
    from datasets import Dataset

    trainer = Trainer(
        model,
        share=share,
        kl=kl,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, 2]], "replayed": [True]}),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], r=4, task_type="CAUSAL_LM"),
    )
    torch.manual_seed(5)
    tuned: Any = trainer.model
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return trainer


def _rows() -> list[dict[str, Any]]:
    torch.manual_seed(6)
    rows = []
    for place, (length, trained) in enumerate([(12, 4), (15, 6), (9, 1), (20, 11), (14, 5)]):
        ids = [256, 84, 82, *torch.randint(0, 250, (length,)).tolist()]
        labels = [-100] * (len(ids) - trained) + ids[-trained:]
        rows.append({"input_ids": ids, "labels": labels, "replayed": place in (1, 3)})
    return rows


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kl", [2.5, None])
def test_step_loss_is_logged_in_two_parts(
    share: bool, kl: float | None, tmp_path: Path, tiny_base_folder: Path
) -> None:
    """Two micro-batches are compared with the same rows in batches of one kind each."""
    trainer, rows = _model(tiny_base_folder, share, kl, tmp_path), _rows()
    model = trainer.model

    def alone(replayed: bool) -> float:
        there = [r for r in rows if r["replayed"] == replayed]
        return float(trainer.compute_loss(model, trainer.collate(there)).detach())

    pairs, replay = alone(False), alone(True)
    tokens = {flag: sum(len(_trained(r)) for r in rows if r["replayed"] == flag) for flag in (False, True)}
    parts: Any = trainer._breakdown
    parts.clear()
    step = sum(float(trainer.training_step(model, trainer.collate(part), 27)) for part in (rows[:2], rows[2:]))
    message = parts.means(parts.sums().tolist())
    parts.clear()
    other = "replay_loss" if kl is None else "replay_kl"
    assert message["pair_loss"] == pytest.approx(pairs, rel=1e-5)
    assert message[other] == pytest.approx(replay / (kl or 1), rel=1e-5)
    whole = tokens[False] * message["pair_loss"] + tokens[True] * (kl or 1) * message[other]
    assert step == pytest.approx(whole / sum(tokens.values()), rel=1e-5)
    # A step of pairs alone has nothing to say of replay.
    trainer.training_step(model, trainer.collate([r for r in rows if not r["replayed"]]), tokens[False])
    assert other not in parts.means(parts.sums().tolist())


def _trained(row: dict[str, Any]) -> list[int]:
    return [label for label in row["labels"] if label != -100]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("most_logits", [1 << 25, 1 << 11])
def test_replay_loss_is_the_divergence_from_the_base(
    share: bool, most_logits: int, tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with probabilities summed token by token, one row at a time, with the adapter off and on."""
    from tunewright.training.packing import fused_loss

    monkeypatch.setattr(fused_loss, "TILE_LOGITS", most_logits)  # the smaller: in parts
    trainer, rows = _model(tiny_base_folder, share, 2.5, tmp_path), _rows()
    model = trainer.model
    loss = trainer.compute_loss(model, trainer.collate(rows))
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    terms: list[torch.Tensor] = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad(), model.disable_adapter():
            off = model(ids).logits[0].double().softmax(-1)
        on = model(ids).logits[0].double().softmax(-1)
        for place, label in enumerate(row["labels"]):
            if label == -100:
                continue
            p, q = off[place - 1], on[place - 1]
            terms.append(2.5 * sum(p * (p.log() - q.log())) if row["replayed"] else -q[label].log())
    reference = sum(terms) / len(terms)
    reference.backward()  # type: ignore[union-attr]
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)  # type: ignore[union-attr]
    assert ours
    for name, weight in model.named_parameters():
        if name in ours:
            assert torch.allclose(ours[name], weight.grad, rtol=1e-4, atol=1e-6), name


def test_replay_loss_and_gradient_are_zero_for_an_untrained_adapter(tmp_path: Path, tiny_base_folder: Path) -> None:
    trainer = _model(tiny_base_folder, True, 1.0, tmp_path)
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(weight)
    rows = [row for row in _rows() if row["replayed"]]
    loss = trainer.compute_loss(trainer.model, trainer.collate(rows))
    loss.backward()
    assert loss.item() == 0
    grads = [p.grad.abs().max().item() for p in trainer.model.parameters() if p.grad is not None]
    assert max(grads) < 1e-6
    # The reference pass has switched the adapter off, and on again.
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == trainable
    assert trainer.model.get_model_status().enabled is True


def test_samples_are_written_with_fewer_rows_when_memory_runs_out(replayed: TrainResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(replayed.adapter.folder.parents[1], tmp_path / "project"))
    opened, reporter = tunewright.open(folder), StopAfter()
    shutil.rmtree(opened.folder.work / "self-samples")
    limited = run_out_of_memory(load_model(opened.base, "float32", "none"), 8)
    limit = opened.folder.config.train.max_length
    drawn = draw_replay(
        opened.folder, opened.data.version(), opened.base, opened.chat, lambda: limited, limit, reporter
    )
    assert drawn.files[REPLAY] == (replayed.adapter.folder / REPLAY).read_text()
    # Instructions and answers are lists of their own, and the second list begins with 8 rows.
    assert [message[:30] for message in reporter.warnings] == [
        "Memory ran out with 32 rows at",
        "Memory ran out with 16 rows at",
    ]


# By vLLM


def test_replay_by_vllm_is_drawn_before_loading_and_changes_the_identity(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake(monkeypatch, tmp_path)
    monkeypatch.setenv("FAKE_TOKEN_SECONDS", "0")
    opened = replay_project(tmp_path / "project", tiny_base_folder)
    embedded = replay_inputs(opened.folder)
    config = opened.folder.config
    by_vllm = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"engine": "vllm"})})
    project = ProjectFolder(opened.folder.root, by_vllm)
    assert replay_inputs(project) == {"replay": {**embedded["replay"], "engine": "vllm"}}

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert replay_inputs(project) == embedded, "each of several processes writes with the model that it trains"
    monkeypatch.delenv("WORLD_SIZE")

    def never() -> None:
        raise AssertionError("the base was loaded")

    before = set(children_of(os.getpid()))
    # The stand-in writes turns that come to no end.
    with pytest.raises(UserError, match=r"The base writes no usable sample: .* cut off at the token limit"):
        draw_replay(project, opened.data.version(), opened.base, opened.chat, never, 100, LogReporter())
    left = [child for child in children_of(os.getpid()) if child not in before and alive(child)]
    assert not left, "the training base has the memory"
