"""An adapter of rows with thinking, through the command line: what is recorded, and which settings are its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tunewright
from making.command_line import document, tiny_project, write_jsonl
from making.command_line import tunewright as run
from making.thinking_templates import build_thinking_base
from tunewright.adapters.registry import list_adapters, require_compatible
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.training.train import training_inputs


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tiny_project(tmp_path / "project", build_thinking_base(tmp_path / "base"), 80)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows = [{**row, "completion": f"<think>{row['prompt'][:9]}</think>{row['completion']}"} for row in rows]
    write_jsonl(folder / "pairs.jsonl", rows)
    _set(folder, "train:\n", "chat: {reasoning: mask}\ntrain:\n")
    _set(folder, "epochs: 2", "epochs: 1")
    return folder


def _set(folder: Path, old: str, new: str) -> None:
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace(old, new))


def _inputs(folder: Path) -> str:
    project = tunewright.open(folder)
    return digest(training_inputs(project.folder, project.data.version(), project.base, project.chat))


def _require_compatible(folder: Path) -> None:
    project = tunewright.open(folder)
    require_compatible(list_adapters(project.folder.adapters)[0], project.base, project.chat)


def test_use_of_thinking_is_part_of_an_adapter_whose_rows_have_it(project: Path) -> None:
    added = document(project, "data", "add")
    assert added["reasoning"] == 80
    document(project, "train")
    (adapter,) = list_adapters(project / "adapters")
    lineage = adapter.lineage
    assert lineage["reasoning"] == {"mode": "mask", "rows": lineage["dataset"]["splits"]["train"]["examples"]}
    masked = _inputs(project)
    _set(project, "reasoning: mask", "reasoning: train")
    assert _inputs(project) != masked
    _require_compatible(project)  # masked and trained thinking is rendered alike
    _set(project, "reasoning: train", "reasoning: strip")
    with pytest.raises(UserError, match=r"chat\.reasoning was mask and is strip"):
        _require_compatible(project)


def test_use_of_thinking_is_no_part_of_an_adapter_whose_rows_have_none(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    document(folder, "data", "add")
    before = _inputs(folder)
    _set(folder, "train:\n", "chat: {reasoning: mask}\ntrain:\n")
    assert _inputs(folder) == before


def test_base_without_thinking_names_strip(project: Path, tiny_base_folder: Path) -> None:
    document(project, "data", "add")
    _set(project, str(project.parent / "base"), str(tiny_base_folder))
    refused = run("train", "-p", project)
    assert refused.code == 2 and "no form for thinking" in refused.stderr
