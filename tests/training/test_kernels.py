"""Optional Liger kernels: refused where they cannot run, and only the layers' kernels are replaced."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from making.command_line import tiny_project, tunewright
from tunewright.core.errors import UserError
from tunewright.training.lora import require_liger

INSTALLED = find_spec("liger_kernel") is not None


def test_train_refuses_liger_without_the_package_or_a_card(tmp_path: Path, tiny_base_folder: Path) -> None:
    if INSTALLED and torch.cuda.is_available():
        pytest.skip("Liger's kernels can run here")
    project = tiny_project(tmp_path / "project", tiny_base_folder)
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("train:\n", "train:\n  use_liger_kernel: true\n"))
    assert tunewright("data", "add", project / "pairs.jsonl", "-p", project).code == 0
    ran = tunewright("train", "-p", project)
    assert ran.code == 2
    assert "train.use_liger_kernel" in ran.stderr
    assert "Loading" not in ran.stderr
    needed = "Set train.use_liger_kernel to false." if INSTALLED else "pip install 'tunewright[liger]', or set"
    assert needed in " ".join(ran.stderr.split())


def test_require_liger_names_the_missing_gpu_when_the_package_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    if not INSTALLED:
        (tmp_path / "liger_kernel").mkdir()
        (tmp_path / "liger_kernel" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="need a CUDA GPU, and none is present"):
        require_liger(True)
    require_liger(False)


def test_use_liger_replaces_the_layers_and_keeps_the_forward_and_the_loss() -> None:
    pytest.importorskip("liger_kernel.transformers", reason="needs tunewright[liger]")
    # In a process of its own: the rotary embedding is replaced for every Llama of the process.
    script = """
from transformers import LlamaConfig, LlamaForCausalLM
from tunewright.training.packing.fused_loss import add_token_losses
from tunewright.training.lora import use_liger
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
add_token_losses(model)
forward, norm, mlp = model.forward, model.model.norm.forward, model.model.layers[0].mlp.forward
use_liger(model)
assert model.forward == forward
assert model.model.norm.forward != norm
assert model.model.layers[0].mlp.forward != mlp
"""
    subprocess.run([sys.executable, "-c", script], check=True)
