"""Room for bases on the card: a fitting base is never refused, a doubtful one gives a warning."""

from __future__ import annotations

import json
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
    project = tiny_project(folder / "project", base)
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("dtype: float32", f"dtype: bfloat16\n  quantization: {quantization}"))
    return OpenProject(ProjectFolder(project), Heard())


def _room(opened: OpenProject, monkeypatch: pytest.MonkeyPatch, free: int) -> list[str]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
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
