"""Counted peak bytes of a training step on the GPU, against the estimate of `models.memory_estimate`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from card_process import CardProcess
from fake_card import FakeCard
from fake_models import SHAPES, build, rows, train

from tunewright.config import PRESETS
from tunewright.models.families import Shape
from tunewright.models.memory_estimate import BatchShape, TrainingSetup, estimate

TARGETS: tuple[str, ...] = PRESETS["all-linear"]["target_modules"]
LORA = TrainingSetup(TARGETS, 16, checkpointing=True, card=True)
QLORA = replace(LORA, nf4=True)
CARD = 80 * 10**9


def _counted(shape: Shape, setup: TrainingSetup, load: BatchShape) -> int:
    """Run one step as ``tunewright train`` does, after the pass that chooses the micro-batch with AdamW's moments
    allocated.
    """
    settings = {
        "preset": "all-linear" if setup.targets == TARGETS else "classic",
        "lora_r": setup.rank,
        "epochs": 1,
        "batch_size": load.rows,
        "max_length": 1 << 17,
        "quantization": "nf4" if setup.nf4 else "none",
    }
    with FakeCard() as card:
        model = build(shape, nf4=setup.nf4)
        # Weights are quantized matrix by matrix before this.
        card.peak = card.now
        train(model, settings, rows(load), rows(BatchShape(1, 0, 4, 2)))
    return card.peak


def _predicted(shape: Shape, setup: TrainingSetup, load: BatchShape) -> int:
    """Return the estimate without context and allocator reserve, which are not tensors."""
    message = estimate(shape, setup, load)
    return message.total - message.runtime - message.allocator


def _largest(shape: Shape, setup: TrainingSetup, length: int) -> BatchShape:
    """The micro-batch of rows of this length that the estimate says is the largest for the card."""
    count = 1
    while estimate(shape, setup, BatchShape(count + 1, 0, length, length)).total <= CARD:
        count += 1
    return BatchShape(count, 0, length, length)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "setup", "load"),
    [
        ("llama-3-8b", LORA, BatchShape(8, 0, 2048, 2048)),
        ("llama-3-8b", LORA, BatchShape(64, 2000, 64, 64)),
        ("llama-3-8b", replace(LORA, targets=("q_proj", "v_proj")), BatchShape(8, 0, 2048, 512)),
        ("llama-3-8b", QLORA, BatchShape(2, 0, 2048, 2048)),
        ("llama-2-7b", LORA, BatchShape(16, 1000, 200, 64)),
        ("llama-3-70b", QLORA, BatchShape(1, 0, 2048, 2048)),
    ],
)
def test_estimate_is_within_5_percent_of_counted_bytes(
    card: CardProcess, name: str, setup: TrainingSetup, load: BatchShape
) -> None:
    """At the real width, with four layers, of which each is like the others."""
    shape = replace(SHAPES[name], layers=4)
    assert _predicted(shape, setup, load) == pytest.approx(card.run(_counted, shape, setup, load), rel=0.05)


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize(("name", "setup"), [("llama-3-8b", LORA), ("llama-3-70b", QLORA)])
def test_largest_micro_batch_for_80_gb_is_within_5_percent_and_fits(
    card: CardProcess, name: str, setup: TrainingSetup
) -> None:
    """At full depth."""
    shape = SHAPES[name]
    load = _largest(shape, setup, 2048)
    counted = card.run(_counted, shape, setup, load)
    assert _predicted(shape, setup, load) == pytest.approx(counted, rel=0.05)
    assert counted <= CARD
