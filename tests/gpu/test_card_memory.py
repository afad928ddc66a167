"""The fake card's counts, and with them the peak bytes of a training step against `models.memory_estimate`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from card_process import CardError, CardProcess
from fake_card import FakeCard
from fake_models import SHAPES, build, rows, train

from tunewright.config import PRESETS
from tunewright.models.families import Shape
from tunewright.models.memory_estimate import BatchShape, TrainingSetup, estimate

pytestmark = pytest.mark.slow

TARGETS: tuple[str, ...] = PRESETS["all-linear"]["target_modules"]
LORA = TrainingSetup(TARGETS, 16, recomputed="all", card=True)
QLORA = replace(LORA, nf4=True)
CARD = 80 * 10**9


def _mix_devices() -> None:
    with FakeCard():
        torch.ones(3, device="cuda") @ torch.ones(3)


def test_card_refuses_operations_on_two_devices(card: CardProcess) -> None:
    with pytest.raises(CardError, match="FakeTensorDeviceMismatchError"):
        card.run(_mix_devices)


def _bytes_of_a_pass() -> tuple[int, int]:
    with FakeCard() as card:
        weight = torch.ones(1000, 1000, device="cuda", requires_grad=True)
        (weight * 2).sin().sum().backward()
        del weight
    return card.now, card.peak


def test_card_counts_bytes_of_a_backward_pass(card: CardProcess) -> None:
    """The weight, its double, which sin keeps, and their gradients: five million floats at most, then none."""
    now, peak = card.run(_bytes_of_a_pass)
    assert now == 0
    assert 16_000_000 <= peak <= 20_000_100


def _transfers() -> tuple[list[tuple[int, bool]], list[tuple[int, str]]]:
    with FakeCard() as card:
        host = torch.arange(6)
        there = host.to("cuda")
        torch.tensor([1, 2], device="cuda")
        host.pin_memory().to("cuda", non_blocking=True)
        int(there.sum())
        there.tolist()
        there.cpu()
    return [(copy.bytes, copy.blocking) for copy in card.copies], [(read.bytes, read.operation) for read in card.syncs]


def test_card_counts_copies_to_it_and_reads_from_it(card: CardProcess) -> None:
    copies, reads = card.run(_transfers)
    assert copies == [(48, True), (16, True), (48, False)]
    assert reads == [(8, "_local_scalar_dense"), (48, "_to_copy"), (48, "_to_copy")]


def _fill(limit: int) -> tuple[bool, int, int]:
    """Make a tensor of 400 bytes, then one of 4,000, then another of 400."""
    with FakeCard(limit=limit) as card:
        kept, full = [torch.ones(100, device="cuda")], False
        try:
            kept.append(torch.ones(1000, device="cuda"))
        except torch.OutOfMemoryError:
            full = True
        kept.append(torch.ones(100, device="cuda"))
    return full, card.now, card.peak


def test_card_with_a_limit_runs_out_of_memory_and_keeps_what_fits(card: CardProcess) -> None:
    assert card.run(_fill, 4399) == (True, 800, 800)
    assert card.run(_fill, 4800) == (False, 4800, 4800)


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
        "gradient_checkpointing": setup.recomputed,
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


@pytest.mark.parametrize(
    ("name", "setup", "load"),
    [
        ("llama-3-8b", LORA, BatchShape(8, 0, 2048, 2048)),
        ("llama-3-8b", LORA, BatchShape(64, 2000, 64, 64)),
        ("llama-3-8b", replace(LORA, targets=("q_proj", "v_proj")), BatchShape(8, 0, 2048, 512)),
        ("llama-3-8b", QLORA, BatchShape(2, 0, 2048, 2048)),
        ("llama-3-8b", replace(LORA, recomputed=0), BatchShape(2, 0, 2048, 2048)),
        ("llama-3-8b", replace(QLORA, recomputed=2), BatchShape(8, 384, 128, 32)),
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
