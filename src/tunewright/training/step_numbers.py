"""The numbers of a training step, read once the device has computed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

READ_LATE: Sequence[str] = ("cuda",)
"""Types of devices that compute behind the host. There the host reads a step's numbers once the next step is queued,
so the device always has work. A step's numbers are read before anything is evaluated or saved."""


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of a finished step, which the device is still computing or copying to the host."""

    step: int
    epoch: float | None
    learning_rate: float
    values: Tensor
    """Loss, gradient norm, tokens, and the sums of the loss's parts, of all processes."""
    copied: torch.cuda.Event | None
    """Set once ``values`` is on the host; None: it is there already."""

    @classmethod
    def copy(cls, step: int, epoch: float | None, learning_rate: float, parts: Sequence[Tensor]) -> StepNumbers:
        """Start the only copy of a step's numbers to the host."""
        values = torch.cat(list(parts)).to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if parts[0].is_cuda else None
        if copied is not None:
            copied.record()
        return cls(step, epoch, learning_rate, values, copied)

    def read(self) -> list[float]:
        """Wait until the numbers are on the host, and return them."""
        if self.copied is not None:
            self.copied.synchronize()
        read: list[float] = self.values.tolist()
        return read
