"""The LM head on the trained tokens alone: their losses and gradients without ever holding all logits."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

from tunewright.training.fsdp import whole_weight
from tunewright.training.packing.attention import gather

TILE_LOGITS = 1 << 25
"""Logits are computed for so many (token, vocabulary entry) pairs at once: 128 MiB in float32."""


def add_token_losses(model: Any) -> None:
    """Let the model's forward, given ``predict_from`` and ``targets``, return each target's loss instead of logits.

    Given ``predict_from`` alone, it returns the states that the head would see there; given a ``reference`` too, the
    losses of its targets are divergences from that. Inside of forward, so that whatever wraps the model (PEFT, DDP,
    FSDP) sees an ordinary pass. Without these the forward is what it was. To be called before PEFT wraps the model.
    """
    original = type(model).forward
    held = weakref.ref(model)

    @functools.wraps(original)
    def forward(
        _: Any,
        *args: Any,
        predict_from: Tensor | None = None,
        targets: Tensor | None = None,
        reference: Reference | None = None,
        **kwargs: Any,
    ) -> Any:
        self = held()
        assert self is not None, "called through the model"
        if predict_from is None:
            return original(self, *args, **kwargs)
        # Of a prompt that rows share whole, one state predicts the first token of each answer.
        states = gather(self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[0], predict_from)
        if targets is None:
            return states
        if reference is None:
            return token_losses(states, self.get_output_embeddings(), targets)
        return losses_against(reference, states, self.get_output_embeddings(), targets)

    # Bound to a proxy: a model that refers to itself would stay in memory until the garbage collector finds it.
    model.forward = MethodType(forward, weakref.proxy(model))


def token_losses(states: Tensor, head: Any, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in float32 [L].

    Args:
        states: what the head sees [L, hidden size].
        head: the LM head, a linear layer.
        targets: token ids [L].
    """
    if head.weight.requires_grad or head.bias is not None:
        return cross_entropy(head(states).float(), targets, reduction="none")
    losses: Tensor = _FrozenHeadLoss.apply(states, whole_weight(head), targets)
    return losses


@dataclass(frozen=True)
class Reference:
    """What the base predicts for the targets of replayed rows, which the adapter is held to."""

    places: Tensor
    """Which of the targets these are [N]."""
    others: Tensor
    """Which of the targets these are not: known to the host, which would have to wait for a card to find out."""
    states: Tensor
    """What the head sees there with the adapter off [N, hidden size]."""
    weight: float
    """What divergences are multiplied by."""


def losses_against(reference: Reference, states: Tensor, head: Any, targets: Tensor) -> Tensor:
    """Return the losses of all targets in float32 [L]: weighted divergences from the reference where there is one.

    Args:
        reference: of some of the targets.
        states: what the head sees, of all targets [L, hidden size].
        head: the LM head.
        targets: token ids [L].
    """
    others = reference.others
    own = token_losses(states.index_select(0, others), head, targets.index_select(0, others))
    held = divergences(states.index_select(0, reference.places), reference.states, head)
    losses = torch.zeros(len(targets), device=targets.device)
    return losses.index_copy(0, others, own).index_copy(0, reference.places, reference.weight * held)


def divergences(states: Tensor, reference: Tensor, head: Any) -> Tensor:
    """Kullback-Leibler divergence, over the whole vocabulary, from the reference's predictions to the states' [N].

    In nats and float32. Only ``states`` get a gradient.

    Args:
        states, reference: what the head sees [N, hidden size].
        head: the LM head, a linear layer.
    """
    most = max(1, TILE_LOGITS // (2 * head.weight.shape[0]))
    if len(states) <= most:
        return _divergences(states, reference, head)
    parts = zip(states.split(most), reference.split(most), strict=True)
    return torch.cat([checkpoint(_divergences, on, off, head, use_reentrant=False) for on, off in parts])


def _divergences(states: Tensor, reference: Tensor, head: Any) -> Tensor:
    with torch.no_grad():
        off = head(reference.to(head.weight.dtype)).float().log_softmax(-1)
    on = head(states.to(head.weight.dtype)).float().log_softmax(-1)
    return kl_div(on, off, reduction="none", log_target=True).sum(-1)


def token_losses_of(model: Any, batch: Any, reference: Reference | None = None) -> Tensor:
    """Return the losses of a packed batch's trained tokens [L], by a model that has `add_token_losses`."""
    losses: Tensor = model(
        **batch.model_inputs(), predict_from=batch.predict_from, targets=batch.targets, reference=reference
    )
    assert losses.dtype == torch.float32
    return losses


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy under a head that is not trained, tile by tile of tokens.

    A token's gradient by its state is (softmax - one-hot) W, whatever the loss is multiplied by later: it is computed
    at once, while the tile's logits are there, and only scaled in backward. Liger (Hsu et al. 2024, arXiv 2410.10989)
    does the same.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        states = states.to(weight.dtype)
        losses = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(states) if wanted else None
        size = max(1, TILE_LOGITS // len(weight))
        for start in range(0, len(targets), size):
            tile = slice(start, start + size)
            logits = (states[tile] @ weight.T).float()
            target = targets[tile, None]
            normaliser = logits.logsumexp(-1, keepdim=True)
            losses[tile] = (normaliser - logits.gather(-1, target))[:, 0]
            if gradient is not None:
                probabilities = logits.sub_(normaliser).exp_()
                probabilities.scatter_add_(-1, target, probabilities.new_full(target.shape, -1.0))
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[tile])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None
