"""The LM head on the trained tokens alone, and their losses without ever holding all logits where those are many."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

MOST_LOGITS = 1 << 25
"""Up to so many logits (128 MiB in float32) are computed at once; more of them in tiles, and again for the gradient."""

_TILE = 32_768  # vocabulary entries of a tile


def add_token_losses(model: Any) -> None:
    """Let the model's forward, given ``predict_from`` and ``targets``, return each target's loss instead of logits.

    Inside of forward, so that whatever wraps the model (PEFT, DDP, FSDP) sees an ordinary pass. Without the two the
    forward is what it was. To be called before PEFT wraps the model.
    """
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, predict_from: Tensor | None = None, targets: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if predict_from is None or targets is None:
            return original(*args, **kwargs)
        states = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[0]
        return token_losses(states.index_select(0, predict_from), self.get_output_embeddings(), targets)

    model.forward = MethodType(forward, model)


def token_losses(states: Tensor, head: Any, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in float32 [L].

    Args:
        states: what the head sees [L, hidden size].
        head: the LM head, a linear layer.
        targets: token ids [L].
    """
    if targets.numel() * head.weight.shape[0] <= MOST_LOGITS:
        return cross_entropy(head(states).float(), targets, reduction="none")
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    log_probabilities: Tensor = ChunkedLogProbFunction.apply(
        states.to(head.weight.dtype), head.weight, head.bias, targets, 1.0, _TILE, None, 1.0, ("log_probs",)
    )[0]
    return -log_probabilities.float()


def token_losses_of(model: Any, batch: Any) -> Tensor:
    """The losses of a packed batch's trained tokens [L], by a model that has `add_token_losses`."""
    losses: Tensor = model(**batch.model_inputs(), predict_from=batch.predict_from, targets=batch.targets)
    assert losses.dtype == torch.float32
    return losses
