"""Losses and gradients of the trained tokens under a frozen head, against PyTorch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tunewright.training.packing import fused_loss as head_module
from tunewright.training.packing.fused_loss import kl_divergences, token_losses


def _reference(states: Tensor, head: nn.Linear, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    own = states.clone().requires_grad_()
    losses = cross_entropy(head(own), targets, reduction="none")
    (losses * weights).sum().backward()
    assert own.grad is not None
    return losses.detach(), own.grad


@pytest.mark.parametrize("tile", [1, 40, 120, 1 << 25])
def test_token_losses_equal_cross_entropy_for_any_tile_size(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "TILE_LOGITS", tile)
    torch.manual_seed(0)
    head = nn.Linear(16, 37, bias=False).requires_grad_(False)
    states, targets, weights = 3 * torch.randn(11, 16), torch.randint(37, (11,)), torch.rand(11)
    losses, gradient = _reference(states, head, targets, weights)
    states.requires_grad_()
    ours = token_losses(states, head, targets)
    (ours * weights).sum().backward()
    torch.testing.assert_close(ours, losses)
    torch.testing.assert_close(states.grad, gradient)


def test_token_losses_train_a_head_that_requires_grad() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 37, bias=False)
    token_losses(torch.randn(5, 16), head, torch.randint(37, (5,))).sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0


def test_token_losses_compute_no_gradient_without_grad() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 37, bias=False).requires_grad_(False)
    states, targets = torch.randn(11, 16), torch.randint(37, (11,))
    with torch.no_grad():
        losses = token_losses(states, head, targets)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, cross_entropy(states @ head.weight.T, targets, reduction="none"))


def test_kl_divergences_are_non_negative_and_train_only_the_states() -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 50, bias=False)
    states, reference = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    values = kl_divergences(states, reference, head)
    assert bool((values >= 0).all())
    values.sum().backward()
    assert states.grad is not None
    assert reference.grad is None
