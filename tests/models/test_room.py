"""Room for bases on the card: a fitting base is never refused, a doubtful one gives a warning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from making.command_line import tiny_project
from making.training_runs import Heard
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.models.families import read_shape
from tunewright.models.memory_plan import available_memory, plan
from tunewright.open_project import OpenProject
from tunewright.training.memory import SHORT_ROW, require_room
from tunewright.training.proving import prove

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def _opened(folder: Path, quantization: str) -> OpenProject:
    base = folder / "llama-2-7b"
    write_json(base / "config.json", LLAMA_2_7B)
    prove(base / "config.json", Heard())  # before there seems to be a card
    project = tiny_project(folder / "project", base)
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("dtype: float32", f"dtype: bfloat16\n  quantization: {quantization}"))
    return OpenProject(ProjectFolder(project), Heard())


CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


def _room(
    opened: OpenProject,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    capability: tuple[int, int] = (9, 0),
    built: Sequence[str] = CUDA_13,
) -> list[str]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))
    reporter = Heard()
    require_room(OpenProject(opened.folder, reporter))
    return reporter.warned


@pytest.mark.parametrize(("quantization", "gigabytes"), [("none", 24), ("nf4", 12)])
def test_require_room_says_nothing_when_the_longest_rows_fit(
    quantization: str, gigabytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _room(_opened(tmp_path, quantization), monkeypatch, gigabytes * 10**9) == []


def test_require_room_refuses_exactly_where_one_short_row_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = _opened(tmp_path, "none")
    shape = read_shape(tmp_path / "llama-2-7b" / "config.json")
    settings = opened.folder.config.train
    card = available_memory("24GB")
    least = plan("7b", shape, settings, card, rows=1, length=SHORT_ROW, shared=0, answer=SHORT_ROW).setups[1].least
    assert 13.5e9 < least < 15e9  # the weights alone are 13.5 GB
    (warned,) = _room(opened, monkeypatch, least)
    assert "may not fit" in warned
    with pytest.raises(UserError, match=r"needs at least 1\d\.\d GB"):
        _room(opened, monkeypatch, least - 1)


def test_require_room_only_warns_when_an_adapter_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = _opened(tmp_path, "none")
    folder = opened.folder.adapters / "tiny-000000000000"
    folder.mkdir(parents=True)
    (folder / "lineage.json").write_text(json.dumps({"digest": "0", "created": "2026-01-01"}))
    (warned,) = _room(opened, monkeypatch, 8 * 10**9)
    assert "needs at least" in warned


@pytest.mark.parametrize(
    ("capability", "built"),
    [
        *(((major, minor), CUDA_13) for major, minor in ((7, 5), (8, 9), (9, 0), (12, 1), (13, 0))),
        ((9, 4), ("gfx942",)),
    ],
)
def test_require_room_accepts_a_card_that_torch_is_built_for(
    capability: tuple[int, int], built: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that names no CUDA architecture, such as ROCm's, is not refused."""
    assert _room(_opened(tmp_path, "none"), monkeypatch, 80 * 10**9, capability, built) == []


@pytest.mark.parametrize(("capability", "built"), [((7, 0), CUDA_13), ((12, 0), ("sm_80", "sm_90", "sm_90a"))])
def test_require_room_refuses_a_card_that_torch_is_not_built_for(
    capability: tuple[int, int], built: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=rf"has no code for a card, of compute capability {capability[0]}\.0"):
        _room(_opened(tmp_path, "none"), monkeypatch, 80 * 10**9, capability, built)
