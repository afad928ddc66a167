"""Adapters to be imported, and the projects they come from and go to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tunewright as api
from making.command_line import tiny_project


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with an adapter of its own, to be copied."""
    folder = tiny_project(tmp_path_factory.mktemp("trained") / "project", tiny_base_folder)
    project = api.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    project.train()
    return folder


@pytest.fixture(scope="module")
def trained(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that project for a module, whose tests may change it."""
    return Path(shutil.copytree(trained_once, tmp_path_factory.mktemp("trained") / "project"))


@pytest.fixture
def ours(trained: Path, tmp_path: Path) -> Path:
    """A copy of that adapter, to be changed and imported."""
    (adapter,) = (trained / "adapters").iterdir()
    return Path(shutil.copytree(adapter, tmp_path / "came" / adapter.name))


@pytest.fixture(scope="session")
def other_once(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project without adapters, to be copied."""
    folder = tiny_project(tmp_path_factory.mktemp("other") / "project", tiny_base_folder)
    api.open(folder).data.add([folder / "pairs.jsonl"])
    return folder


@pytest.fixture
def other(other_once: Path, tmp_path: Path) -> Path:
    """Another project on the same base, with the same pairs."""
    return Path(shutil.copytree(other_once, tmp_path / "other"))


@pytest.fixture
def stock(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """An adapter as peft saves it, with its README, and weights that change the answers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    tuned = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    tuned.save_pretrained(str(tmp_path / "stock"))
    assert (tmp_path / "stock" / "README.md").exists()
    return tmp_path / "stock"
