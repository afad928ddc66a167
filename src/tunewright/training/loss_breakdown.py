"""The parts of a step's loss in a run with replay: the pairs' loss and the replayed rows' loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tunewright.training.checkpoint_selection import PAIR_LOSS, REPLAY_KL, REPLAY_LOSS


class StepStatistics(Protocol):
    """Numbers of a step that are added up on the device, and read once when the step is logged."""

    def clear(self) -> None:
        """Reset, for a step that is repeated or a new step."""

    def means(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means by their names in the history; ``over_processes`` sums a tensor over all processes."""


class LossBreakdown:
    """Accumulates the losses of a step's trained tokens, separately for pairs and replayed rows.

    Args:
        kl: weight of the KL divergence in the loss; None: replayed rows are trained like pairs.
        device: the device of the losses.
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

        Args:
            losses: of all trained tokens, as they are in the loss [L].
            replayed: indices into L of the replayed rows' tokens; None: no row is replayed.
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

    def means(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return nats per token of each part that the step has tokens of, the divergence without its weight.

        Args:
            over_processes: sums a tensor over all processes that share the step.
        """
        # Filled on the device: copying two numbers from the host would synchronize.
        counted = [self._sums.new_full((1,), count) for count in self._tokens]
        pairs, replay, pair_tokens, replay_tokens = over_processes(torch.cat([self._sums, *counted])).tolist()
        means = {PAIR_LOSS: pairs / pair_tokens} if pair_tokens else {}
        if replay_tokens:
            means[REPLAY_LOSS if self.kl is None else REPLAY_KL] = replay / replay_tokens / (self.kl or 1)
        return means
