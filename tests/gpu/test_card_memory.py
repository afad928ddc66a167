"""Bytes on the card at the peak of a training step, counted, beside what `models.fit.memory` predicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from card_process import CardProcess
from fake_card import FakeCard
from fake_models import SHAPES, build, rows, train

from tunewright.config import PRESETS
from tunewright.models.memory.estimate import Load, Way, need
from tunewright.models.memory.shape import Shape

TARGETS: tuple[str, ...] = PRESETS["all-linear"]["target_modules"]
LORA = Way(TARGETS, 16, checkpointing=True, card=True)
QLORA = replace(LORA, nf4=True)
CARD = 80 * 10**9


def _counted(shape: Shape, way: Way, load: Load) -> int:
    """Run one step as ``tunewright train`` does, after the pass that chooses the micro-batch beside AdamW's moments."""
    settings = {
        "preset": "all-linear" if way.targets == TARGETS else "classic",
        "lora_r": way.rank,
        "epochs": 1,
        "batch_size": load.rows,
        "max_length": 1 << 17,
        "quantization": "nf4" if way.nf4 else "none",
    }
    with FakeCard() as card:
        model = build(shape, nf4=way.nf4)
        # Weights are quantized matrix by matrix before this.
        card.peak = card.now
        train(model, settings, rows(load), rows(Load(1, 0, 4, 2)))
    return card.peak


def _predicted(shape: Shape, way: Way, load: Load) -> int:
    """What the estimate says of tensors: the context and the allocator's reserve are none."""
    told = need(shape, way, load)
    return told.total - told.runtime - told.allocator


def _largest(shape: Shape, way: Way, length: int) -> Load:
    """The micro-batch of rows of this length that the estimate says is the largest for the card."""
    count = 1
    while need(shape, way, Load(count + 1, 0, length, length)).total <= CARD:
        count += 1
    return Load(count, 0, length, length)


@pytest.mark.parametrize(
    ("name", "way", "load"),
    [
        ("llama-3-8b", LORA, Load(8, 0, 2048, 2048)),
        ("llama-3-8b", LORA, Load(8, 384, 128, 32)),
        ("llama-3-8b", LORA, Load(64, 2000, 64, 64)),
        ("llama-3-8b", replace(LORA, targets=("q_proj", "v_proj")), Load(8, 0, 2048, 512)),
        ("llama-3-8b", QLORA, Load(2, 0, 2048, 2048)),
        ("llama-3-8b", QLORA, Load(65, 0, 2048, 2048)),
        ("llama-2-7b", LORA, Load(16, 1000, 200, 64)),
        ("llama-3-70b", LORA, Load(4, 0, 2048, 64)),
        ("llama-3-70b", QLORA, Load(1, 0, 2048, 2048)),
    ],
)
def test_estimate_is_within_5_percent_of_the_bytes_counted(card: CardProcess, name: str, way: Way, load: Load) -> None:
    """At the real width, with four layers, of which each is like the others."""
    shape = replace(SHAPES[name], layers=4)
    assert _predicted(shape, way, load) == pytest.approx(card.run(_counted, shape, way, load), rel=0.05)


@pytest.mark.parametrize(("name", "way"), [("llama-3-8b", LORA), ("llama-3-70b", QLORA)])
def test_largest_micro_batch_for_80_gb_is_within_5_percent_and_fits(card: CardProcess, name: str, way: Way) -> None:
    """At full depth."""
    shape = SHAPES[name]
    load = _largest(shape, way, 2048)
    counted = card.run(_counted, shape, way, load)
    assert _predicted(shape, way, load) == pytest.approx(counted, rel=0.05)
    assert counted <= CARD
