"""The LM head only on trained tokens: losses and gradients without holding all logits.

Shapes: L trained tokens, N of them in replayed rows, V vocabulary entries, D hidden size.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

from tunewright.training.fsdp import full_weight
from tunewright.training.history import (
    PAIR_LOSS,
    REPLAY_KL,
    REPLAY_LOSS,
    REWARD_ACCURACY,
    REWARD_CHOSEN,
    REWARD_REJECTED,
)
from tunewright.training.packing.attention import gather
from tunewright.training.packing.padding import PaddedBatch, token_logits

TILE_LOGITS = 1 << 25
"""(token, vocabulary entry) pairs whose logits are computed at once: 128 MiB in float32."""


def add_token_losses(model: Any) -> None:
    """Make the model's forward return each target's loss instead of logits if it gets ``predict_from`` and ``targets``.

    With only ``predict_from`` it returns the hidden states that the head would see; with a ``reference`` too,
    the losses of its targets are divergences from the reference. Wrappers of the model (PEFT, DDP, FSDP) see
    an ordinary pass. Without these arguments forward is unchanged. Call it before PEFT wraps the model.
    """
    original = type(model).forward
    held = weakref.ref(model)
    head = Head.of(model)

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
        # Rows that share a whole prompt share the state that predicts their first token, so indices
        # may repeat. last_hidden_state[0] is [T, D], states are [L, D].
        states = gather(self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[0], predict_from)
        if targets is None:
            return states
        if reference is None:
            return token_losses(states, self.get_output_embeddings(), targets, head)
        return losses_with_reference(reference, states, self.get_output_embeddings(), targets, head)

    # Bound to a proxy: a model that refers to itself stays in memory until the garbage collector runs.
    model.forward = MethodType(forward, weakref.proxy(model))


@dataclass(frozen=True)
class Head:
    """The steps from the products of a model's output layer to its logits."""

    scale: float = 1.0
    """Factor of the products (Granite, Cohere)."""
    cap: float | None = None
    """Bound of the logits, which are cap * tanh(logits / cap) (Gemma)."""

    @classmethod
    def of(cls, model: Any) -> Head:
        """Return the head of a model, by its configuration; the proof of packing compares it with the model's own."""
        config = model.config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def logits(self, products: Tensor) -> Tensor:
        """Return the logits in float32."""
        logits = products.float() if self.scale == 1 else products.float() * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def token_losses(states: Tensor, output: Any, targets: Tensor, head: Head = Head()) -> Tensor:
    """Return the negative log-likelihood of each target in float32 [L].

    ``states`` are the output layer's input [L, D], ``targets`` token ids [L].
    """
    # The fused loss computes no gradient of the output layer itself, and no bias.
    if output.weight.requires_grad or output.bias is not None:
        return cross_entropy(head.logits(output(states)), targets, reduction="none")
    losses: Tensor = _FrozenHeadLoss.apply(states, full_weight(output), targets, head)
    return losses


@dataclass(frozen=True)
class Reference:
    """The base's predictions for the targets of replayed rows, which the loss keeps the adapter close to."""

    indices: Tensor
    """Indices of these targets among all targets [N]."""
    others: Tensor
    """Indices of all other targets [L - N]; computed on the host, since computing them on a GPU would synchronize."""
    states: Tensor
    """Input of the head with the adapter off [N, D]; for padded rows the log-probabilities [N, V]."""
    weight: float
    """Factor of the divergences."""


def losses_with_reference(
    reference: Reference, states: Tensor, output: Any, targets: Tensor, head: Head = Head()
) -> Tensor:
    """Return the losses of all targets in float32 [L]: weighted divergences for the reference's targets.

    ``states`` are the output layer's input for all targets [L, D].
    """
    others = reference.others
    own = token_losses(states.index_select(0, others), output, targets.index_select(0, others), head)
    kl = kl_divergences(states.index_select(0, reference.indices), reference.states, output, head)
    # index_copy instead of a mask: a boolean mask would make the host wait for the GPU.
    losses = torch.zeros(len(targets), device=targets.device)
    return losses.index_copy(0, others, own).index_copy(0, reference.indices, reference.weight * kl)


def kl_divergences(states: Tensor, reference: Tensor, output: Any, head: Head = Head()) -> Tensor:
    """Return the KL divergence over the whole vocabulary from the reference's predictions to the states' [N].

    In nats and float32. Only ``states`` get a gradient. Both are the output layer's input [N, D].
    """
    # Two logits a pair: the reference's and the adapter's. Tiles are checkpointed, so one tile's logits are held.
    most = max(1, TILE_LOGITS // (2 * output.weight.shape[0]))
    if len(states) <= most:
        return _tile_kl(states, reference, output, head)
    tiles = zip(states.split(most), reference.split(most), strict=True)
    return torch.cat([checkpoint(_tile_kl, on, off, output, head, use_reentrant=False) for on, off in tiles])


def _tile_kl(states: Tensor, reference: Tensor, output: Any, head: Head) -> Tensor:
    with torch.no_grad():
        off = head.logits(output(reference.to(output.weight.dtype))).log_softmax(-1)  # [N, V]
    on = head.logits(output(states.to(output.weight.dtype))).log_softmax(-1)
    # KL(base || adapter): torch's kl_div takes the adapter's log-probabilities first.
    return kl_div(on, off, reduction="none", log_target=True).sum(-1)


def batch_token_losses(model: Any, batch: Any, reference: Reference | None = None) -> Tensor:
    """Return the losses of a batch's trained tokens [L]; for a packed batch `add_token_losses` prepares the model."""
    if isinstance(batch, PaddedBatch):
        return _padded_token_losses(model, batch, reference)
    losses: Tensor = model(
        **batch.model_inputs(), predict_from=batch.predict_from, targets=batch.targets, reference=reference
    )
    assert losses.dtype == torch.float32
    return losses


def _padded_token_losses(model: Any, batch: PaddedBatch, reference: Reference | None) -> Tensor:
    """Return the loss of each trained token in float32 [L].

    The ``reference``'s states are the base's log-probabilities [N, V] for the N tokens of replayed rows. Their losses
    are the weighted divergences from it.
    """
    logits = token_logits(model, batch)
    losses = cross_entropy(logits, batch.targets, reduction="none")
    if reference is None:
        return losses
    on = logits.index_select(0, reference.indices).log_softmax(-1)
    divergence = kl_div(on, reference.states, reduction="none", log_target=True).sum(-1)
    return losses.index_copy(0, reference.indices, reference.weight * divergence)


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy under a frozen head, computed in tiles of tokens.

    A token's gradient with respect to its state is (softmax - one-hot) W, whatever factor the loss
    gets later. So it is computed in forward, while the tile's logits exist, and only scaled in
    backward. Liger (Hsu et al. 2024, arXiv 2410.10989) does the same.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, head: Head) -> Tensor:
        states = states.to(weight.dtype)
        losses = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(states) if wanted else None  # [L, D]
        # L * V logits in float32 would be the largest tensor of a step: 4,096 tokens of Llama 3 take 2 GiB.
        size = max(1, TILE_LOGITS // len(weight))
        for start in range(0, len(targets), size):
            tile = slice(start, start + size)
            logits = head.logits(states[tile] @ weight.T)  # [tile, V]
            target = targets[tile, None]
            # loss = logsumexp(logits) - logit of the target; in float32, since bfloat16 has 8 bits of mantissa.
            normaliser = logits.logsumexp(-1, keepdim=True)
            losses[tile] = (normaliser - logits.gather(-1, target))[:, 0]
            if gradient is not None:
                # The derivative of cap * tanh(x / cap) is 1 - (logit / cap)^2.
                slope = None if head.cap is None else 1 - (logits / head.cap) ** 2
                probabilities = logits.sub_(normaliser).exp_()  # in place: the logits are not needed again
                probabilities.scatter_add_(-1, target, probabilities.new_full(target.shape, -1.0))  # minus one-hot
                if slope is not None:
                    probabilities *= slope
                if head.scale != 1:
                    probabilities *= head.scale
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[tile])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # grad is each token's factor [L]: its weight and the division by the number of tokens.
        return gradient * grad[:, None].to(gradient.dtype), None, None, None


class LossBreakdown:
    """Accumulates the losses of a step's trained tokens, separately for pairs and replayed rows.

    ``kl`` is the weight of the KL divergence in the loss; None means that replayed rows are trained like
    pairs.
    """

    def __init__(self, kl: float | None, device: torch.device) -> None:
        self.kl = kl
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        """Loss sums of pairs and of replayed rows. They stay on the device: reading them would synchronize in each
        pass.
        """
        self._tokens = [0, 0]

    def add(self, losses: Tensor, replayed: Tensor | None) -> None:
        """Add tokens of the step.

        ``replayed`` are indices into the losses [L] of the replayed rows' tokens; None means that no row is
        replayed.
        """
        given = losses.detach().double()
        of_replay = given.new_zeros(()) if replayed is None else given.index_select(0, replayed).sum()
        count = 0 if replayed is None else len(replayed)
        self._sums += torch.stack([given.sum() - of_replay, of_replay])
        self._tokens = [self._tokens[0] + len(losses) - count, self._tokens[1] + count]

    def clear(self) -> None:
        """Reset, for a step that is repeated or a new step."""
        self._sums.zero_()
        self._tokens = [0, 0]

    def sums(self) -> Tensor:
        """Return the sums and the numbers of tokens [4], on the device."""
        # Filled on the device: copying two numbers from the host would synchronize.
        return torch.cat([self._sums, *(self._sums.new_full((1,), count) for count in self._tokens)])

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """Return nats per token of each part that the step has tokens of, the divergence without its weight."""
        pairs, replay, pair_tokens, replay_tokens = sums
        means = {PAIR_LOSS: pairs / pair_tokens} if pair_tokens else {}
        if replay_tokens:
            means[REPLAY_LOSS if self.kl is None else REPLAY_KL] = replay / replay_tokens / (self.kl or 1)
        return means


class RewardStatistics:
    """Accumulates the rewards of a step's answers on the device, and reads them once.

    A reward is ``beta`` times the log-ratio to the reference, with orpo the mean log-probability of a token.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)
        """Sums for chosen answers (rewards, number), for rejected ones, and for pairs (chosen has more, number)."""

    def add(self, rewards: Tensor, chosen: Tensor) -> None:
        """Add answers [A], of which some are ``chosen`` [A]."""
        good = chosen.double()
        given = rewards.double()
        self._sums[:4] += torch.stack([(given * good).sum(), good.sum(), (given * (1 - good)).sum(), (1 - good).sum()])

    def add_pairs(self, right: Tensor) -> None:
        """Add pairs: True where the chosen answer has the higher reward [P]."""
        self._sums[4:] += torch.stack([right.double().sum(), right.new_ones(len(right)).double().sum()])

    def clear(self) -> None:
        """Reset, for a step that is repeated or a new step."""
        self._sums.zero_()

    def sums(self) -> Tensor:
        """Return the sums [6], on the device."""
        return self._sums

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the mean rewards, and the share of pairs whose chosen answer has the higher one."""
        names = (REWARD_CHOSEN, REWARD_REJECTED, REWARD_ACCURACY)
        return {name: sums[2 * n] / sums[2 * n + 1] for n, name in enumerate(names) if sums[2 * n + 1]}
