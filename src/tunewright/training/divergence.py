"""When a training run must not go on: a loss or gradient that is no number, or a loss that has exploded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tunewright.core.errors import UserError
from tunewright.data.versions import Member
from tunewright.training.rows import name_of

_MOST_NAMED = 8

# An exploded loss stays up; a single hard batch does not. So many steps in a row have to agree.
STEPS_ABOVE_CHANCE = 5
STEPS_ABOVE_START = 10
MARGIN = 1.0
"""Nats per token: the trained tokens are e times less likely than what they are held against."""


class DivergedError(UserError):
    """A run that must not go on, told to the user."""


@dataclass
class BrokenRunError(Exception):
    """A run that must not go on."""

    what: str
    step: int
    rows: Sequence[int]
    """Places in the training set of the rows of the step's batch."""

    def as_user_error(self, members: Sequence[Member]) -> DivergedError:
        """For the user, with the batch's rows by name; ``members`` are the examples that the rows are of."""
        named = [name_of(members[place]) for place in self.rows if place < len(members)]
        lines = [f"  {name}" for name in named[:_MOST_NAMED]]
        lines += [f"  and {len(named) - _MOST_NAMED} more"] * (len(named) > _MOST_NAMED)
        return DivergedError(
            f"{self.what} at step {self.step}; no adapter is kept. The rows of that step:\n" + "\n".join(lines),
            where="train.learning_rate",
            fix="Lower the learning rate, or train in float32 (train.dtype); and look at those rows.",
        )


def fault(loss: float, gradient_norm: float, losses: Sequence[float], vocabulary: int) -> str | None:
    """Return what is wrong with a step, if anything.

    A loss has exploded if it has been over a bound for several steps in a row:

    - 5 steps more than 1 nat above both ln(vocabulary), what guessing tokens by lot costs, and the first step's loss,
      which is the untouched base's: a model that has unlearnt more than all it knew.
    - 10 steps each more than 1 nat above the *highest* of the first 10. Those are the warm-up's, where the model is
      still the base. If training changed nothing at all, ten losses given in advance would all be above ten others by
      chance once in 184,756 = C(20, 10) times, and the nat comes on top. A run that has learnt and then falls back to
      where it began is not stopped: dev, which keeps an earlier adapter, takes care of that.

    Args:
        loss: the step's, in nats per trained token.
        gradient_norm: over all LoRA weights, before it is clipped.
        losses: of all steps up to and with this one.
        vocabulary: tokens that the model chooses among.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"the norm of the gradient is {gradient_norm} (the loss is {loss:.3f})"
    chance = math.log(vocabulary)
    latest = losses[-STEPS_ABOVE_CHANCE:]
    if len(latest) == STEPS_ABOVE_CHANCE and min(latest) > max(chance, losses[0]) + MARGIN:
        return (
            f"the loss has exploded: {loss:.2f}, and for {STEPS_ABOVE_CHANCE} steps more than {MARGIN:g} above "
            f"both the first step's, {losses[0]:.2f}, and {chance:.2f}, what guessing tokens by lot would cost"
        )
    start, latest = losses[:STEPS_ABOVE_START], losses[STEPS_ABOVE_START:][-STEPS_ABOVE_START:]
    if len(latest) == STEPS_ABOVE_START and min(latest) > max(start) + MARGIN:
        return (
            f"the loss has exploded: {loss:.2f}, and for {STEPS_ABOVE_START} steps more than {MARGIN:g} above the "
            f"highest of the first {STEPS_ABOVE_START} steps, {max(start):.2f} (their median is {median(start):.2f})"
        )
    return None
