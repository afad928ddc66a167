"""The two parts of a step's loss where the base's own words are replayed: that of the pairs, and that of replay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tunewright.training.checkpoint_selection import PAIR_LOSS, REPLAY_KL, REPLAY_LOSS


class LossBreakdown:
    """Adds up the losses of a step's trained tokens, pairs' and replayed rows' apart.

    Args:
        kl: what divergences are multiplied by in the loss; None: replayed rows are learnt as pairs are.
        device: where losses are.
    """

    def __init__(self, kl: float | None, device: torch.device) -> None:
        self.kl = kl
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        """Of pairs and of replayed rows: the sum of the losses. Sums stay where losses are: reading them would have the
        host wait for the card in each pass."""
        self._tokens = [0, 0]

    def add(self, losses: Tensor, replayed: Tensor | None) -> None:
        """Add tokens of the step.

        Args:
            losses: of all trained tokens, as they are in the loss [L].
            replayed: which of them are of replayed rows: places in L; None: none is.
        """
        given = losses.detach().double()
        of_replay = given.new_zeros(()) if replayed is None else given.index_select(0, replayed).sum()
        count = 0 if replayed is None else len(replayed)
        self._sums += torch.stack([given.sum() - of_replay, of_replay])
        self._tokens = [self._tokens[0] + len(losses) - count, self._tokens[1] + count]

    def clear(self) -> None:
        """Forget what was added: the step is done again, or another one begins."""
        self._sums.zero_()
        self._tokens = [0, 0]

    def means(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return nats per token of each part that the step has tokens of, the divergence without its weight.

        Args:
            over_processes: sums a tensor over all processes that share the step.
        """
        # Filled on the device: a copy of two numbers would have the host wait.
        counted = [self._sums.new_full((1,), count) for count in self._tokens]
        pairs, replay, pair_tokens, replay_tokens = over_processes(torch.cat([self._sums, *counted])).tolist()
        told = {PAIR_LOSS: pairs / pair_tokens} if pair_tokens else {}
        if replay_tokens:
            told[REPLAY_LOSS if self.kl is None else REPLAY_KL] = replay / replay_tokens / (self.kl or 1)
        return told
