"""Divergence checks: a loss or gradient that is not finite, or a loss that has exploded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tunewright.core.errors import UserError
from tunewright.data.versions import Member
from tunewright.training.rows import name_of

_MOST_NAMED = 8

# An exploded loss stays up; the loss of a single hard batch does not. So several steps in a row must agree.
STEPS_ABOVE_CHANCE = 5
STEPS_ABOVE_START = 10
MARGIN = 1.0
"""Nats per token: trained tokens are e times less likely than under the reference."""


class DivergedError(UserError):
    """A run that must stop, as the user sees it."""


@dataclass
class UnstableRunError(Exception):
    """A run that must stop, with the rows of the step."""

    what: str
    step: int
    rows: Sequence[int]
    """Indices into the training set of the rows of the step's batch."""

    def as_user_error(self, members: Sequence[Member]) -> DivergedError:
        """Return the error for the user, naming the batch's rows; ``members`` are the examples of the training set's
        rows.
        """
        named = [name_of(members[place]) for place in self.rows if place < len(members)]
        lines = [f"  {name}" for name in named[:_MOST_NAMED]]
        lines += [f"  and {len(named) - _MOST_NAMED:,} more"] * (len(named) > _MOST_NAMED)
        return DivergedError(
            f"{self.what} at step {self.step}; no adapter is kept. The rows of that step:\n" + "\n".join(lines),
            where="train.learning_rate",
            fix="Lower the learning rate or train in float32 (train.dtype), and check those rows.",
        )


def fault(loss: float, gradient_norm: float, losses: Sequence[float], vocabulary: int) -> str | None:
    """Return the fault of a step; None if it has no fault.

    A loss has exploded if it exceeds a bound for several steps in a row:

    - 5 steps more than 1 nat above both ln(vocabulary), the loss of random guessing, and the first step's loss, which
      is the untrained base's. Such a model has unlearnt more than it ever knew.
    - 10 steps each more than 1 nat above the *highest* of the first 10. Those are the warm-up's, where the model is
      still close to the base. If training changed nothing, ten given losses would all exceed ten others by chance once
      in 184,756 = C(20, 10) times. The margin makes it rarer still.

    A run that learns and then falls back to its start is not stopped: the dev split selects an earlier adapter.

    Args:
        loss: the step's, in nats per trained token.
        gradient_norm: over all LoRA weights, before clipping.
        losses: of all steps up to and including this one.
        vocabulary: size of the vocabulary.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"the norm of the gradient is {gradient_norm} (the loss is {loss:.3f})"
    chance = math.log(vocabulary)
    latest = losses[-STEPS_ABOVE_CHANCE:]
    if len(latest) == STEPS_ABOVE_CHANCE and min(latest) > max(chance, losses[0]) + MARGIN:
        return (
            f"the loss has exploded: it is {loss:.2f}, and for {STEPS_ABOVE_CHANCE} steps was more than {MARGIN:g} "
            f"above both the first step's {losses[0]:.2f} and the {chance:.2f} of random guessing"
        )
    start, latest = losses[:STEPS_ABOVE_START], losses[STEPS_ABOVE_START:][-STEPS_ABOVE_START:]
    if len(latest) == STEPS_ABOVE_START and min(latest) > max(start) + MARGIN:
        return (
            f"the loss has exploded: it is {loss:.2f}, and for {STEPS_ABOVE_START} steps was more than {MARGIN:g} "
            f"above {max(start):.2f}, the highest of the first {STEPS_ABOVE_START} steps (median {median(start):.2f})"
        )
    return None
