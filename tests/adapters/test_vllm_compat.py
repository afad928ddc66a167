"""Adapters that vLLM would not load are refused before training and before storing, like non-finite weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tunewright as api
from making.command_line import tiny_project, tunewright
from tunewright.adapters.lora_weights import check_adapter, require_servable
from tunewright.adapters.registry import WEIGHTS, Adapter
from tunewright.config import TrainConfig
from tunewright.core.errors import UserError
from tunewright.serving.options import ServeOptions

IDS = torch.arange(3, 43)[None]


def _saved(base: Path, folder: Path, **model_config: Any) -> Path:
    """Save an adapter by peft."""
    values: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"]} | model_config
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    get_peft_model(model, LoraConfig(**values)).save_pretrained(str(folder))
    return folder


def test_check_adapter_accepts_converted_pissa(tiny_base_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    tuned.save_pretrained(str(tmp_path / "start"))
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            weight.data += 0.01
    tuned.save_pretrained(str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    check_adapter(tmp_path / "converted", servable=True)


def test_check_adapter_refuses_a_tensor_that_is_not_lora(tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = _saved(tiny_base_folder, tmp_path)
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"base_model.model.model.norm.weight": torch.ones(64)}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"model\.norm\.weight, which is not a LoRA weight"):
        check_adapter(folder, servable=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("servable", [True, False])
def test_check_adapter_names_a_non_finite_weight(
    value: float, servable: bool, tiny_base_folder: Path, tmp_path: Path
) -> None:
    folder = _saved(tiny_base_folder, tmp_path)
    weights = load_file(folder / WEIGHTS)
    name = sorted(weights)[-1]
    weights[name][0, 0] = value
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(UserError, match=f"1 of {weights[name].numel():,} weights of {name} are not finite"):
        check_adapter(folder, servable=servable)


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"use_dora": True}, "train.use_dora"),
        ({"lora_r": 600}, "train.lora_r"),
        ({"target_modules": ["q_proj", "experts"]}, "train.target_modules"),
    ],
)
def test_require_servable_refuses_by_config_key(keys: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError, match="vLLM does not load") as caught:
        require_servable(TrainConfig(**keys))
    assert caught.value.where == where
    assert "train.require_vllm_compatible to false" in (caught.value.fix or "")
    require_servable(TrainConfig(**keys, require_vllm_compatible=False))
    require_servable(TrainConfig(lora_r=512, use_rslora=True))


# Through the command line


def _project(folder: Path, base: Path, **train: Any) -> Path:
    tiny_project(folder, base)
    config = folder / "tunewright.yaml"
    keys = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in train.items())
    config.write_text(config.read_text().replace("train:\n", f"train:\n{keys}"))
    assert tunewright("data", "add", folder / "pairs.jsonl", "--project", folder).code == 0
    return folder


def test_training_refuses_dora_before_resolving_the_base(tmp_path: Path) -> None:
    folder = _project(tmp_path / "project", tmp_path / "no-such-base", use_dora=True)
    for command in ("train", "run", "crossval"):
        ran = tunewright(command, "--project", folder)
        assert ran.code == 2
        assert "train.use_dora: vLLM does not load DoRA" in ran.stderr
        assert not (folder / "evaluations").exists()


@pytest.mark.slow
def test_dora_over_nf4_is_trained_and_evaluated_but_not_served(tmp_path: Path, tiny_base_folder: Path) -> None:
    keys = {"use_dora": True, "require_vllm_compatible": False, "quantization": "nf4"}
    folder = _project(tmp_path / "project", tiny_base_folder, **keys)
    ran = tunewright("train", "--project", folder, "--json")
    assert ran.code == 0, ran.stderr
    adapter = Adapter(Path(ran.document["folder"]))
    losses = [row["loss"] for row in adapter.history if "loss" in row]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.5
    weights = load_file(adapter.folder / WEIGHTS)
    assert len([name for name in weights if name.endswith("lora_magnitude_vector")]) == 14
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    ran = tunewright("evaluate", "--project", folder)
    assert ran.code in {0, 3, 4}, ran.stderr
    with pytest.raises(UserError, match="DoRA cannot share a batch with other adapters") as caught:
        api.open(folder).serve([adapter.name])
    assert caught.value.where == adapter.name


def test_dora_matches_its_paper(tmp_path: Path, tiny_base_folder: Path) -> None:
    """W' = m (W + s BA) / |W + s BA|, row by row (Liu et al. 2024, equation 5)."""
    folder = _project(
        tmp_path / "project", tiny_base_folder, use_dora=True, require_vllm_compatible=False, eval_max_samples=0
    )
    adapter = _same_logits_as(folder, tiny_base_folder, scale=32 / 16)
    base = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    for name, weight in load_file(adapter.folder / WEIGHTS).items():
        layer, _, kind = name.removeprefix("base_model.model.").rpartition(".")
        if kind == "lora_magnitude_vector":  # starts as the norm of each row, and is trained
            rows: Any = base.get_submodule(layer).weight
            assert not torch.allclose(weight, rows.norm(dim=1), rtol=1e-3)


def test_rslora_scales_by_the_root_of_the_rank_and_is_served(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = _project(
        tmp_path / "project", tiny_base_folder, use_rslora=True, lora_r=4, lora_alpha=8, eval_max_samples=0
    )
    adapter = _same_logits_as(folder, tiny_base_folder, scale=8 / math.sqrt(4))
    with api.open(folder).serve([adapter.name], ServeOptions(port=0)).running():
        pass


def _same_logits_as(folder: Path, base_folder: Path, scale: float) -> Adapter:
    """Train, and compare the stored adapter in peft with the base whose weights are changed by hand."""
    adapter = api.open(folder).train().adapter
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32), adapter.folder
    )
    by_hand = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    weights = load_file(adapter.folder / WEIGHTS)
    with torch.no_grad():
        before = by_hand(input_ids=IDS).logits
        for name in [name for name in weights if name.endswith(".lora_A.weight")]:
            stem = name.removesuffix(".lora_A.weight")
            weight: Any = by_hand.get_submodule(stem.removeprefix("base_model.model.")).weight
            weight += scale * weights[f"{stem}.lora_B.weight"] @ weights[name]
            magnitude = weights.get(f"{stem}.lora_magnitude_vector")
            if magnitude is not None:
                weight *= (magnitude / weight.norm(dim=1))[:, None]
        expected = by_hand(input_ids=IDS).logits
        found = tuned(input_ids=IDS).logits
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return adapter
