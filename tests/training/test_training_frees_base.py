"""A trained model is freed before the next base is loaded, through the project's own commands."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tunewright
from making.command_line import tiny_project
from making.counted_bases import counted_bases
from tunewright.training.options import SweepOptions
from tunewright.training.packing.fused_loss import add_token_losses

pytestmark = pytest.mark.slow


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    with counted_bases(monkeypatch) as found:
        yield found


def _opened_project(folder: Path, base: Path, also: str, count: int) -> Any:
    config = tiny_project(folder, base, count=count) / "tunewright.yaml"
    text = config.read_text().replace("epochs: 2", "epochs: 1\n  max_length: 512\n  eval_max_samples: 3" + also)
    text = text.replace(
        "evaluate:\n  num_fewshot: [1, 2]", "evaluate:\n  num_fewshot: [1]\n  max_new_tokens: 4\n  retrievers: []"
    )
    config.write_text(text)
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    return project


SWEEP = SweepOptions(rates=[1e-3, 1e-2])


@pytest.mark.parametrize(
    ("command", "count", "also", "loads"),
    [
        (lambda project: project.run(), 80, "", 3),  # prompting arms, training, evaluation
        (lambda project: project.crossval(folds=2), 130, "", 4),
        # One for the replayed samples, then one for each trial and rung.
        (lambda project: project.sweep(SWEEP), 80, "\n  replay: {samples: 6}", None),
        (lambda project: project.sweep(SweepOptions(rates=[1e-3])), 80, "\n  lora_alpha: 1" + 30 * "0", 2),  # diverge
    ],
    ids=["run", "crossval", "sweep", "sweep that diverges"],
)
def test_command_holds_one_base_at_a_time(
    command: Callable[[Any], object],
    count: int,
    also: str,
    loads: int | None,
    counts: list[int],
    tmp_path: Path,
    tiny_base_folder: Path,
) -> None:
    command(_opened_project(tmp_path / "project", tiny_base_folder, also, count))
    assert set(counts) == {0}
    assert len(counts) >= 3 if loads is None else len(counts) == loads


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
