"""gpt-oss with experts in MXFP4, in OpenAI's layout: read as the numbers that the format defines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from making.command_line import tiny_project
from making.command_line import tunewright as run
from making.tiny_bases import build_shrunk
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.export.weights import LoraDelta, Weights
from tunewright.models.bases import resolve_base
from tunewright.models.families import read_shape
from tunewright.models.loading import load_model

BLOCK = 32


def _four_bits(code: int) -> float:
    """Return the value of E2M1: a sign, two bits of exponent with bias 1, one bit of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def _dequantized(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return experts [experts, inputs, outputs] of blocks [experts, outputs, groups, 16], the low four bits first."""
    experts, outputs, groups, half = blocks.shape
    result = torch.zeros(experts, groups * BLOCK, outputs)
    for expert, output, group, byte in torch.cartesian_prod(*map(torch.arange, blocks.shape)).tolist():
        pair, scale = int(blocks[expert, output, group, byte]), 2.0 ** (int(scales[expert, output, group]) - 127)
        result[expert, group * BLOCK + 2 * byte, output] = _four_bits(pair & 15) * scale
        result[expert, group * BLOCK + 2 * byte + 1, output] = _four_bits(pair >> 4) * scale
    assert half * 2 == BLOCK
    return result


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny gpt-oss whose experts are random blocks and scales."""
    folder = build_shrunk(tmp_path_factory.mktemp("mxfp4") / "base", "gpt_oss", "GptOssForCausalLM")
    torch.manual_seed(0)
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = weight.shape
            groups = experts, outputs, inputs // BLOCK
            weights[f"{name}_blocks"] = torch.randint(0, 256, (*groups, BLOCK // 2), dtype=torch.uint8)
            weights[f"{name}_scales"] = torch.randint(118, 125, groups, dtype=torch.uint8)
        else:
            weights[name] = weight.to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_have_the_values_that_the_format_defines(
    dtype: str, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    opened = resolve_base(str(base), None, base.parent, LogReporter())
    model = load_model(opened, dtype, "none")
    stored = load_file(base / "model.safetensors")
    compared = 0
    for name, weight in model.named_parameters():
        assert weight.dtype == getattr(torch, dtype)
        if f"{name}_blocks" in stored:
            wanted = _dequantized(stored[f"{name}_blocks"], stored[f"{name}_scales"])
            assert torch.equal(weight, wanted.to(weight.dtype))  # each value is exact in bfloat16
            compared += 1
        else:
            assert torch.equal(weight, stored[name].to(weight.dtype))
    shape = read_shape(base / "config.json")
    assert compared == 2 * shape.layers
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert "stores its experts in MXFP4. They are dequantized: 0.0 GB in bfloat16." in caplog.text


def test_adapter_is_trained_and_merged_over_mxfp4(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    project = tiny_project(tmp_path / "project", base, count=40)
    config = project / "tunewright.yaml"
    text = config.read_text().replace("epochs: 2", "epochs: 1").replace("0.003", "0.01")
    config.write_text(text.replace("evaluate:\n", "evaluate:\n  max_new_tokens: 3\n"))
    plan = run("estimate-memory", "-p", project, "--json").document
    assert plan["parameters"] == read_shape(base / "config.json").parameters
    for command in (["data", "add", project / "pairs.jsonl"], ["train", "--force"], ["export", "merge", "--json"]):
        ran = run(*command, "-p", project)
        assert ran.code == 0, ran.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (base, Path(ran.document["folder"])))
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert before.keys() == after.keys()


def test_merge_refuses_changes_of_experts_in_mxfp4(base: Path) -> None:
    opened = resolve_base(str(base), None, base.parent, LogReporter())
    change = LoraDelta(torch.zeros(4, 3, 96), torch.zeros(4, 128, 3), 1.0, None)
    with pytest.raises(UserError, match="cannot be merged into weights in MXFP4"):
        Weights(opened, "float32", {"model.layers.0.mlp.experts.down_proj": change})
