"""A trained model is freed before the next base is loaded, through the project's own commands."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tunewright
from command_line import tiny_project
from one_base import counted_bases
from tunewright.training.options import SweepOptions
from tunewright.training.packing.fused_loss import add_token_losses

pytestmark = pytest.mark.slow


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    with counted_bases(monkeypatch) as found:
        yield found


def _opened_project(folder: Path, base: Path, also: str = "", count: int = 80) -> Any:
    config = tiny_project(folder, base, count=count) / "tunewright.yaml"
    text = config.read_text().replace("epochs: 2", "epochs: 1\n  max_length: 512\n  eval_max_samples: 3" + also)
    text = text.replace(
        "evaluate:\n  num_fewshot: [1, 2]", "evaluate:\n  num_fewshot: [1]\n  max_new_tokens: 4\n  retrievers: []"
    )
    config.write_text(text)
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    return project


def test_run_holds_one_base_at_a_time(counts: list[int], tmp_path: Path, tiny_base_folder: Path) -> None:
    _opened_project(tmp_path / "project", tiny_base_folder).run()
    assert counts == [0, 0, 0]  # prompting arms, training, evaluation


def test_pilots_hold_one_base_at_a_time(counts: list[int], tmp_path: Path, tiny_base_folder: Path) -> None:
    _opened_project(tmp_path / "project", tiny_base_folder, count=160).advise()
    assert len(counts) >= 3
    assert set(counts) == {0}


def test_crossval_holds_one_base_at_a_time(counts: list[int], tmp_path: Path, tiny_base_folder: Path) -> None:
    _opened_project(tmp_path / "project", tiny_base_folder, count=130).crossval(folds=2)
    assert counts == [0] * 4


def test_sweep_holds_one_base_at_a_time(counts: list[int], tmp_path: Path, tiny_base_folder: Path) -> None:
    project = _opened_project(tmp_path / "project", tiny_base_folder, also="\n  replay: {samples: 6}")
    project.sweep(SweepOptions(rates=[1e-3, 1e-2]))
    assert len(counts) >= 5  # one for the replayed samples, then one for each trial and rung
    assert set(counts) == {0}


def test_sweep_holds_one_base_at_a_time_when_trials_diverge(
    counts: list[int], tmp_path: Path, tiny_base_folder: Path
) -> None:
    project = _opened_project(tmp_path / "project", tiny_base_folder, also="\n  lora_alpha: 1" + 30 * "0")
    result, _ = project.sweep(SweepOptions(rates=[1e-3]))
    assert [entry.event for entry in result.ledger.entries] == ["diverged", "diverged"]
    assert counts == [0, 0]


def test_curve_holds_one_base_at_a_time(counts: list[int], tmp_path: Path, tiny_base_folder: Path) -> None:
    _opened_project(tmp_path / "project", tiny_base_folder, count=300).curve(seeds=2)
    assert counts == [0] * 12


def test_model_with_token_losses_is_freed_without_the_garbage_collector(tiny_base_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    add_token_losses(model)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
