"""Merged weights: equal to peft's in float32, and cast once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from export_helpers import adapted, in_bfloat16, open_base
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from making.tiny_bases import build_base
from tunewright.adapters.registry import CONFIG, WEIGHTS
from tunewright.core.errors import UserError
from tunewright.export.weights import Weights, read_deltas
from tunewright.models.loading import load_model

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 5}},
}


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_equal_those_of_peft_in_float32(
    kind: str, architecture: Literal["llama", "mistral"], tmp_path: Path
) -> None:
    base = open_base(build_base(tmp_path / "base", architecture))
    adapter = adapted(base.folder, tmp_path / "adapter", **KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    merged = dict(PeftModel.from_pretrained(model, adapter.folder).merge_and_unload().named_parameters())
    ours = Weights(base, "float32", read_deltas(adapter.folder))
    assert set(ours) == set(merged)
    for name in ours:
        torch.testing.assert_close(ours[name], merged[name].detach(), rtol=1e-5, atol=1e-6)
    changed = [name for name in ours if not torch.equal(ours[name], ours.base[name])]
    assert len(changed) == 14


@pytest.mark.parametrize("pattern", ["q_proj", "model.language_model.layers.0.self_attn.q_proj"])
def test_patterns_match_names_in_the_full_model_where_the_base_reads_images(pattern: str, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    settings: dict[str, Any] = {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "layers_to_transform": [0],
    }
    folder = adapted(base, tmp_path / "adapter", **settings).folder
    named = {
        name.replace(".model.layers.", ".model.language_model.layers."): weight
        for name, weight in load_file(folder / WEIGHTS).items()
    }
    save_file(named, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    config |= {"rank_pattern": {pattern: 2}, "alpha_pattern": {pattern: 3}}
    (folder / CONFIG).write_text(json.dumps(config))
    scales = {name: delta.scale for name, delta in read_deltas(folder).items()}
    assert scales.pop("model.layers.0.self_attn.q_proj.weight") == 3 / 2
    assert set(scales.values()) == {8 / 4}


def test_stored_weights_are_cast_once_and_others_are_identical(tmp_path: Path) -> None:
    base = open_base(in_bfloat16(build_base(tmp_path / "base")))
    adapter = adapted(base.folder, tmp_path / "adapter", target_modules=["q_proj"])
    weights = Weights(base, "bfloat16", read_deltas(adapter.folder))
    for name in weights:
        stored = weights.stored(name)
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, weights[name].to(torch.bfloat16) if "q_proj" in name else weights.base[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantized_weights_equal_those_of_bitsandbytes(dtype: str, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    base = open_base(build_base(tmp_path / "base"))
    held = load_model(base, dtype, "nf4")
    weights = Weights(base, dtype, {}, dequantized=True)
    compared = 0
    for name, parameter in held.named_parameters():
        value: Any = parameter
        if value.dtype == torch.uint8:
            value, compared = dequantize_4bit(value, value.quant_state), compared + 1
        assert torch.equal(weights.held(name), value), name
    assert compared == 14


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "complete layers"),
        ({"target_modules": ["q_proj", "lm_head"]}, "is not a LoRA weight of a linear layer"),
        ({"target_modules": ["embed_tokens"]}, "is not a LoRA weight of a linear layer"),
    ],
)
def test_read_deltas_refuses_more_than_decoder_lora(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter", **settings)
    with pytest.raises(UserError, match=message):
        read_deltas(adapter.folder)


def test_weights_refuse_an_adapter_of_another_base(tmp_path: Path) -> None:
    adapter = adapted(build_base(tmp_path / "base"), tmp_path / "adapter")
    other: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = other.config
    config.intermediate_size = 64
    type(other)(config).save_pretrained(tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / file).write_bytes((tmp_path / "base" / file).read_bytes())
    with pytest.raises(UserError, match=r"as a matrix of shape \(.*128.*\), but its shape is \(64, 64\)"):
        Weights(open_base(tmp_path / "other"), "float32", read_deltas(adapter.folder))
