"""Adapters on disk: named by content, found by name, refused once changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tunewright.adapters.registry import CONFIG, WEIGHTS, Adapter, find_adapter, list_adapters, store_adapter
from tunewright.core.errors import UserError
from tunewright.core.io import digest


def _weights(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    save_file({"model.q_proj.lora_A.weight": torch.tensor([*content], dtype=torch.float32)}, folder / WEIGHTS)
    (folder / CONFIG).write_text("{}")
    return folder


def _store(tmp_path: Path, name: str, content: bytes, created: str = "2026-01-01") -> Adapter:
    weights = _weights(tmp_path / "run" / name / content.decode(), content)
    return store_adapter(
        tmp_path / "adapters",
        name,
        weights,
        {"step-5": weights},
        {"created": created, "inputs_digest": digest("inputs")},
        [{"step": 1, "loss": 2.5}],
        servable=True,
    )


def test_stored_adapter_is_named_by_its_content(tmp_path: Path) -> None:
    adapter = _store(tmp_path, "courts", b"one")
    assert adapter.name == f"courts-{adapter.digest[:12]}"
    assert adapter.history == [{"step": 1, "loss": 2.5}]
    assert list(adapter.checkpoints) == ["step-5"]
    adapter.verify()
    assert _store(tmp_path / "again", "courts", b"one").digest == adapter.digest
    assert _store(tmp_path, "courts", b"two").digest != adapter.digest


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    adapter = _store(tmp_path, "courts", b"one")
    for step in (40, 100):
        (adapter.folder / "checkpoints" / f"step-{step}").mkdir()
    assert list(adapter.checkpoints) == ["step-5", "step-40", "step-100"]


def test_verify_refuses_a_changed_adapter(tmp_path: Path) -> None:
    adapter = _store(tmp_path, "courts", b"one")
    (adapter.folder / WEIGHTS).write_bytes(b"One")
    with pytest.raises(UserError, match="changed since they were stored"):
        adapter.verify()
    (adapter.folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"Missing files: {WEIGHTS}"):
        adapter.verify()


def test_find_adapter_accepts_a_unique_prefix(tmp_path: Path) -> None:
    old = _store(tmp_path, "courts", b"one", created="2026-01-01")
    new = _store(tmp_path, "courts", b"two", created="2026-02-01")
    folder = tmp_path / "adapters"
    assert [a.name for a in list_adapters(folder)] == [old.name, new.name]
    assert find_adapter(folder) == new
    assert find_adapter(folder, old.name[:-4]) == old
    with pytest.raises(UserError, match="2 adapters start with 'courts'"):
        find_adapter(folder, "courts")
    with pytest.raises(UserError, match="No adapter is named 'x'"):
        find_adapter(folder, "x")


def test_find_adapter_names_the_command_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tunewright train"):
        find_adapter(tmp_path)
