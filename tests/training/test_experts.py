"""LoRA on experts: peft's numbers in training, and in the files that an adapter is merged into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from making.command_line import tiny_project
from making.command_line import tunewright as run
from making.tiny_bases import build_shrunk
from tunewright.adapters.lora_weights import CONFIG
from tunewright.config import TrainConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.export.weights import Weights, read_deltas
from tunewright.models.bases import Base, resolve_base
from tunewright.models.families import read_shape
from tunewright.models.loading import load_model
from tunewright.training.lora import lora_config
from tunewright.training.packing import attention, pack
from tunewright.training.packing.fused_loss import add_token_losses, batch_token_losses

IDS = torch.tensor([[n * 37 % 250 for n in range(60)]])
SETTINGS = TrainConfig(target_modules=("q_proj", "v_proj", "experts"), lora_r=3, lora_alpha=6)
PEFTS_OWN = LoraConfig(
    task_type="CAUSAL_LM",
    r=3,
    lora_alpha=6,
    target_modules=["q_proj", "v_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)
LAYOUTS = {
    "qwen3_moe": "Qwen3MoeForCausalLM",  # a tensor for each of an expert's gate, up and down
    "mixtral": "MixtralForCausalLM",  # the same as w1, w3 and w2, under another name
    "gpt_oss": "GptOssForCausalLM",  # one tensor for all experts, [inputs, outputs]
    "mistral4": "Mistral4ForCausalLM",  # one tensor, [outputs, inputs]
}


def _base(tmp_path: Path, kind: str) -> Base:
    folder = build_shrunk(tmp_path / "base", kind, LAYOUTS[kind])
    return resolve_base(str(folder), None, tmp_path, LogReporter())


def _adapted(base: Base, lora: LoraConfig) -> Any:
    model: Any = get_peft_model(load_model(base, "float32", "none"), lora)
    torch.manual_seed(1)
    for name, weight in sorted(model.named_parameters()):
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def _gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def test_packed_rows_have_the_logits_and_gradients_of_pefts_own_lora(tmp_path: Path) -> None:
    base = _base(tmp_path, "qwen3_moe")
    rows = [IDS[0, :length].tolist() for length in (60, 45, 50)]
    labels = [[-100] * 40 + row[40:] for row in rows]
    reference = _adapted(base, PEFTS_OWN)
    logits = [reference(input_ids=torch.tensor([row])).logits[0, 39:-1] for row in rows]
    wanted = torch.cat(
        [
            torch.nn.functional.cross_entropy(found, torch.tensor(row[40:]), reduction="none")
            for found, row in zip(logits, rows, strict=True)
        ]
    )
    ours = _adapted(base, lora_config(SETTINGS))
    assert torch.equal(ours(input_ids=IDS).logits, reference(input_ids=IDS).logits)
    attention.register()
    ours.base_model.model.set_attn_implementation(attention.NAME)
    add_token_losses(ours.base_model.model)
    found = batch_token_losses(ours, pack(rows, labels, share=True))
    torch.testing.assert_close(found.sort().values, wanted.sort().values, rtol=1e-4, atol=1e-4)
    expected, gradients = _gradients(reference, wanted.mean()), _gradients(ours, found.mean())
    assert sum(".experts." in name for name in gradients) == 4 * read_shape(base.folder / "config.json").layers
    for name, gradient in gradients.items():
        assert gradient.any()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_saved_adapter_is_read_and_merged_to_the_same_logits(kind: str, tmp_path: Path) -> None:
    base = _base(tmp_path, kind)
    settings = SETTINGS.model_copy(
        update={"target_modules": (read_shape(base.folder / "config.json").names[0], "experts")}
    )
    trained = _adapted(base, lora_config(settings)).eval()
    trained.save_pretrained(tmp_path / "adapter")
    count = sum(weight.numel() for name, weight in trained.named_parameters() if ".lora_" in name)
    assert count == read_shape(base.folder / "config.json").adapter_parameters(settings.target_modules, 3)
    read = PeftModel.from_pretrained(load_model(base, "float32", "none"), tmp_path / "adapter").eval()
    weights = Weights(base, "float32", read_deltas(tmp_path / "adapter"))
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_bytes((base.folder / "config.json").read_bytes())
    save_file({name: weights[name].contiguous() for name in weights}, merged / "model.safetensors", {"format": "pt"})
    whole = getattr(transformers, base.architecture).from_pretrained(merged, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = trained(input_ids=IDS).logits
        assert not torch.allclose(wanted, load_model(base, "float32", "none")(input_ids=IDS).logits, atol=0.1)
        torch.testing.assert_close(read(input_ids=IDS).logits, wanted)
        torch.testing.assert_close(whole(input_ids=IDS).logits, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keys", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_experts_are_refused_with_what_peft_cannot_combine(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="experts requires lora_dropout: 0 and use_dora: false"):
        TrainConfig(target_modules=("q_proj", "experts"), **keys)


def test_experts_are_trained_evaluated_and_merged_by_the_command_line_and_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    project = tiny_project(tmp_path / "project", _base(tmp_path, "qwen3_moe").folder, count=40)
    config = project / "tunewright.yaml"
    text = config.read_text().replace("epochs: 2", "epochs: 1\n  target_modules: [q_proj, experts]")
    config.write_text(text.replace("evaluate:\n", "evaluate:\n  max_new_tokens: 3\n"))
    assert run("data", "add", project / "pairs.jsonl", "-p", project).code == 0
    ran = run("train", "--force", "-p", project)
    assert ran.code == 2
    assert "vLLM does not load LoRA on the experts" in ran.stderr
    config.write_text(config.read_text().replace("epochs: 1\n", "epochs: 1\n  require_vllm_compatible: false\n"))
    for command in (["train", "--force"], ["export", "merge"]):
        ran = run(*command, "-p", project)
        assert ran.code == 0, ran.stderr
    (adapter,) = ProjectFolder(project).adapters.iterdir()
    assert json.loads((adapter / CONFIG).read_text())["target_parameters"] == [
        "experts.down_proj",
        "experts.gate_up_proj",
    ]
    assert any(".experts.base_layer.lora_B" in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert run("evaluate", "-p", project).code in (0, 3, 4)
    ran = run("serve", adapter.name, "-p", project)
    assert ran.code == 2
    assert "LoRA on experts cannot share a batch" in ran.stderr
