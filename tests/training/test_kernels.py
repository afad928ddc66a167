"""Liger's kernels: refused or left out where they cannot run, and only the layers' kernels are replaced."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from making.command_line import tiny_project, tunewright
from making.training_runs import Heard
from tunewright.core.errors import UserError
from tunewright.training.liger import choose_liger, require_liger

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
    needed = "Set train.use_liger_kernel to auto." if INSTALLED else "pip install 'tunewright[liger]', or set"
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
        require_liger(True, "LlamaForCausalLM")
    require_liger(False, "LlamaForCausalLM")
    require_liger("auto", "LlamaForCausalLM")


@pytest.mark.parametrize("began_with", [None, False, True])
def test_auto_uses_no_liger_kernels_without_a_card(began_with: bool | None) -> None:
    """It is silent, except where the run began with them on another machine."""
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    heard = Heard()
    assert choose_liger("auto", "LlamaForCausalLM", began_with, heard) is False
    assert len(heard.lines) == bool(began_with)
    assert all("It resumes without them, because" in line for line in heard.lines)


def test_liger_kernels_replace_the_layers_until_the_end_and_keep_the_forward_and_the_loss() -> None:
    pytest.importorskip("liger_kernel.transformers", reason="needs tunewright[liger]")
    script = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from tunewright.training.packing.fused_loss import add_token_losses
from tunewright.training.liger import liger_kernels
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
add_token_losses(model)
forward, norm, mlp = model.forward, model.model.norm.forward, model.model.layers[0].mlp.forward
shared = [modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP]
with liger_kernels(model):
    assert model.forward == forward
    assert model.model.norm.forward != norm
    assert model.model.layers[0].mlp.forward != mlp
    assert modeling_llama.apply_rotary_pos_emb != shared[0]
assert shared == [modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
