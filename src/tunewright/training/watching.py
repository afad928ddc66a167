"""What people see of a run while it trains, and when it must not go on."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback

from tunewright.errors import UserError
from tunewright.progress import Task


class Follow(TrainerCallback):
    """Shows loss and speed, and refuses to go on once the loss is no number."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.tokens: float | None = None
        self.began = 0.0
        self.dev_loss = ""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One training step (``loss``) or one pass over the dev split (``eval_loss``) is done."""
        logs = kwargs["logs"]
        if "eval_loss" in logs:
            self.dev_loss = f", dev {float(logs['eval_loss']):.3f}"
        if "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {state.global_step}; the adapter is not kept",
                where="train.learning_rate",
                fix="Lower the learning rate, or train in float32 (train.dtype).",
            )
        tokens = float(logs["num_tokens"])
        if self.tokens is None:
            self.tokens, self.began = tokens, time.monotonic()
            speed = ""
        else:
            speed = f", {(tokens - self.tokens) / (time.monotonic() - self.began):,.0f} tokens/s"
        self.task.advance(1, f"loss {loss:.3f}{self.dev_loss}{speed}")
