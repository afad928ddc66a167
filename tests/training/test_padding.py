"""The plain path: padded rows give the losses and gradients of separate rows, and train like packed rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from replay_helpers import replay_project, shorten_turns
from torch.nn.functional import kl_div
from transformers.modeling_layers import GradientCheckpointingLayer

import tunewright
from making.lora_models import Rows, assert_equal_gradients, gradients, separate_losses, with_lora
from making.plain_models import HYBRIDS, PUBLISHED, Hybrid, hybrid_model, targets
from making.tiny_bases import build_shrunk, tiny_model
from making.training_runs import Heard, new_config, tiny_preference_project, training_project
from tunewright.api import Project
from tunewright.config import TrainConfig
from tunewright.core.errors import UserError
from tunewright.models.families import read_shape
from tunewright.training.packing import attention, pack
from tunewright.training.packing.fused_loss import Reference, add_token_losses, batch_token_losses
from tunewright.training.packing.order import StepBatches, longest_batch
from tunewright.training.packing.padding import measure_padding, pad, token_logits
from tunewright.training.recomputation import RecomputedLayers
from tunewright.training.rows import IGNORED
from tunewright.training.run import require_fsdp_supported
from tunewright.training.train import TrainResult, train

LENGTHS = (25, 9, 17, 2, 30)


def _rows(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> tuple[Rows, Rows]:
    """Rows whose second half is trained, the last one in two places."""
    luck = random.Random(seed)
    rows = [[luck.randrange(3, 256) for _ in range(length)] for length in lengths]
    labels = [[IGNORED] * (len(row) // 2) + row[len(row) // 2 :] for row in rows]
    labels[-1][2:4] = rows[-1][2:4]
    return rows, labels


def _hybrid(kind: Hybrid) -> Any:
    model = hybrid_model(kind)
    return with_lora(model, targets(model))


@pytest.mark.parametrize("kind", HYBRIDS)
def test_padded_rows_give_the_losses_and_gradients_of_rows_one_by_one(kind: Hybrid) -> None:
    rows, labels = _rows()
    model = _hybrid(kind)
    reference = separate_losses(model, rows, labels)
    expected = gradients(model, reference.sum())
    losses = batch_token_losses(model, pad(rows, labels))
    assert torch.allclose(losses, reference, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(gradients(model, losses.sum()), expected)


def test_padded_rows_give_the_losses_and_gradients_of_packed_rows() -> None:
    rows, labels = _rows()
    base = tiny_model("llama", vocab_size=256)
    attention.register()
    add_token_losses(base)
    model = with_lora(base, ["q_proj", "v_proj", "down_proj"])
    padded = batch_token_losses(model, pad(rows, labels))
    expected = gradients(model, padded.sum())
    base.set_attn_implementation(attention.NAME)
    packed = batch_token_losses(model, pack(rows, labels, share=True))
    assert torch.allclose(padded, packed, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(expected, gradients(model, packed.sum()))


def test_loss_of_replayed_padded_rows_is_their_divergence_from_the_base() -> None:
    rows, labels = _rows()
    model = _hybrid("qwen3_5_text")
    batch = pad(rows, labels, replayed=[False, True, False, False, True])
    assert batch.replayed is not None and batch.learnt is not None
    assert sorted([*batch.replayed.tolist(), *batch.learnt.tolist()]) == list(range(len(batch.targets)))
    with torch.no_grad():
        on = token_logits(model, batch).log_softmax(-1)
        with model.disable_adapter():
            off = token_logits(model, batch).log_softmax(-1)
    states = off[batch.replayed]
    losses = batch_token_losses(model, batch, Reference(batch.replayed, batch.learnt, states, 0.5))
    divergence = 0.5 * kl_div(on, off, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(losses[batch.replayed], divergence[batch.replayed], rtol=1e-4, atol=1e-6)
    assert divergence[batch.replayed].min() > 0
    plain = -on.gather(-1, batch.targets[:, None])[:, 0]
    assert torch.allclose(losses[batch.learnt], plain[batch.learnt], rtol=1e-5)


def test_rows_of_one_length_have_no_mask() -> None:
    rows, labels = _rows((7, 7))
    assert pad(rows, labels).attention_mask is None
    ragged = pad(*_rows((7, 5))).attention_mask
    assert ragged is not None and ragged.sum(1).tolist() == [7, 5]


def test_order_by_length_keeps_the_rows_of_each_step() -> None:
    rows, _ = _rows([2 + 7 * n % 23 for n in range(22)])
    steps = [
        [sorted(row for batch in batches[place : place + 2] for row in batch) for place in range(0, len(batches), 2)]
        for batches in (
            list(StepBatches(rows, 5, step_rows=8, micro_batch=4, by_length=by_length)) for by_length in (False, True)
        )
    ]
    assert steps[0] == steps[1]
    for batch in StepBatches(rows, 5, step_rows=8, micro_batch=4, by_length=True):
        lengths = [len(rows[row]) for row in batch]
        assert lengths == sorted(lengths, reverse=True)


def test_longest_padded_batch_counts_padding() -> None:
    rows: Rows = [[1] * 20, [1] * 1, [1] * 12, [1] * 12]
    assert longest_batch(rows, [[0, 1], [2, 3]]) == [2, 3]
    assert longest_batch(rows, [[0, 1], [2, 3]], padded=True) == [0, 1]


def test_measured_padding_counts_computed_and_shareable_tokens() -> None:
    shared = list(range(20))
    rows = [[*shared, 30 + n, *[n] * (n % 4)] for n in range(8)]
    found = measure_padding(rows, micro_batch=8, batch_size=8, seed=0)
    assert (found.tokens, found.computed) == (sum(map(len, rows)), 8 * 24)
    assert found.shared == 20 + sum(len(row) - 20 for row in rows)
    assert str(found) == (
        "6% of the computed tokens are padding, and prompts are not shared "
        "(packed rows would compute 4.8 times fewer tokens)"
    )


def _train(project: Project, *, packed: bool = True, own_cache: bool = True) -> TrainResult:
    base = replace(project.base, packed=packed, own_cache=own_cache)
    return train(project.folder, project.data.version(), base, project.chat, project.reporter)


def _steps(result: TrainResult, *keys: str) -> list[list[float]]:
    return [[row[key] for key in keys] for row in result.adapter.history if keys[0] in row]


@pytest.mark.slow
def test_padded_run_is_the_packed_run_with_another_identity_and_another_line(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    heard = Heard()
    project = training_project(tmp_path / "project", tiny_base_folder, heard, epochs=1)
    packed = _train(project)
    padded = _train(project, packed=False, own_cache=False)
    assert padded.trained and padded.adapter.name != packed.adapter.name
    for keys in (("loss", "grad_norm"), ("eval_loss", "eval_metric")):
        for ours, theirs in zip(_steps(padded, *keys), _steps(packed, *keys), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    (line,) = [line for line in heard.lines if line.startswith("Rows are padded, because")]
    facts = padded.adapter.lineage["training"]
    cost = facts["padding"]
    assert f"{1 - cost['tokens'] / cost['computed']:.0%} of the computed tokens are padding" in line
    assert "prefix_sharing" not in facts
    assert "padding" not in packed.adapter.lineage["training"]
    assert not _train(project, packed=False, own_cache=False).trained


@pytest.mark.slow
def test_stopped_padded_run_resumes_to_the_same_adapter(tmp_path: Path, tiny_base_folder: Path) -> None:
    whole = _train(training_project(tmp_path / "whole", tiny_base_folder, epochs=1), packed=False)
    with pytest.raises(KeyboardInterrupt):
        _train(training_project(tmp_path / "cut", tiny_base_folder, Heard(after=5), epochs=1), packed=False)
    resumed = _train(training_project(tmp_path / "cut", tiny_base_folder), packed=False)
    assert resumed.adapter.digest == whole.adapter.digest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_5_text", "granitemoehybrid", "llama4_text"])
def test_base_that_fails_packing_trains_and_answers_on_the_plain_path(
    kind: Hybrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    heard = Heard()
    project = training_project(
        tmp_path / "project",
        build_shrunk(tmp_path / kind, kind, PUBLISHED[kind][0], **PUBLISHED[kind][1]),
        heard,
        count=80,
        epochs=1,
    )
    adapter = project.train().adapter
    assert adapter.lineage["training"]["padding"]["computed"] > adapter.lineage["training"]["padding"]["tokens"]
    assert any(line.startswith("Rows are padded") for line in heard.lines)
    assert not project.train().trained
    evidence = project.evaluate(adapter.name, dev=True).evidence
    assert {"zero-shot", "tuned"} <= {arm.name for arm in evidence.arms}


@pytest.mark.slow
def test_padded_run_with_replay_has_the_divergences_of_the_packed_run(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_turns(monkeypatch)
    project = replay_project(tmp_path / "project", tiny_base_folder)
    packed, padded = _train(project), _train(project, packed=False)
    for keys in (("loss", "pair_loss"), ("replay_kl",)):
        theirs = _steps(packed, *keys)
        assert len(theirs) > 1
        for ours, expected in zip(_steps(padded, *keys), theirs, strict=True):
            assert ours == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
def test_padded_preference_run_has_the_losses_of_the_packed_run(
    method: str, tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tiny_preference_project(tmp_path / "project", tiny_base_folder)
    new_config(folder, {"method": method}, learning_rate=0.01)
    project = tunewright.open(folder)
    keys = ("loss", "rewards/chosen", "grad_norm")
    packed, padded = _train(project), _train(project, packed=False)
    assert _steps(packed, *keys)
    for ours, theirs in zip(_steps(padded, *keys), _steps(packed, *keys), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "llama4_text"])
def test_recomputed_layers_of_padded_rows_give_the_same_gradients(kind: Hybrid, tiny_base_folder: Path) -> None:
    """A Llama4ForCausalLM is its own decoder."""
    rows, labels = _rows()
    model = _hybrid(kind)
    batch = pad(rows, labels)
    expected = gradients(model, batch_token_losses(model, batch).sum())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = RecomputedLayers(TrainConfig(gradient_checkpointing=1), read_shape(tiny_base_folder / "config.json"))
    recomputed.apply(model)
    flags = [part.gradient_checkpointing for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    assert flags == [True] + [False] * (len(flags) - 1)
    assert_equal_gradients(gradients(model, batch_token_losses(model, batch).sum()), expected)
    recomputed.auto = True
    recomputed.plan(batch)
    assert recomputed.count == 0, "so small a batch fits"


def test_fsdp_refuses_padded_rows() -> None:
    with pytest.raises(UserError, match="trains on padded rows"):
        require_fsdp_supported(TrainConfig(), packed=False)


def test_prompts_that_must_be_shared_refuse_padded_rows(tmp_path: Path, tiny_base_folder: Path) -> None:
    project = training_project(tmp_path / "project", tiny_base_folder, train={"prefix_sharing": "'on'"})
    with pytest.raises(UserError, match="Prompts cannot be shared") as caught:
        _train(project, packed=False)
    assert caught.value.where == "train.prefix_sharing"
    assert not (tmp_path / "project" / "adapters").exists()
