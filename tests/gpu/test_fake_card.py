"""The fake card is worth trusting: devices are checked, bytes and transfers are counted."""

from __future__ import annotations

import pytest
import torch
from card_process import CardError, CardProcess
from fake_card import FakeCard

pytestmark = pytest.mark.slow


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
