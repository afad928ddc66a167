"""What people see of a run while it trains, and when it must not go on."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback

from tunewright.errors import UserError
from tunewright.metrics import score_text
from tunewright.progress import Reporter, Task
from tunewright.recipe import Recipe
from tunewright.training.choosing import Evaluation, evaluations, overfitting, place_text, runs_out_of_patience


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


class FollowDev(TrainerCallback):
    """Tells each evaluation and overfitting, and stops early where the recipe says so.

    All of it follows from the trainer's history, which checkpoints hold: a run that goes on decides as it would have.
    """

    def __init__(self, recipe: Recipe, reporter: Reporter) -> None:
        self.metric = recipe.evaluate.metric
        self.patience = recipe.train.patience
        self.reporter = reporter

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The dev split has been evaluated after this step."""
        evaluated = evaluations(state.log_history)
        self.reporter.say(self._told(evaluated[-1]))
        warning = overfitting(evaluated)
        if warning is not None and overfitting(evaluated[:-1]) is None:
            self.reporter.warn(warning)
        if runs_out_of_patience(evaluated, self.patience):
            control.should_training_stop = True
            self.reporter.say(
                f"Stopping early: {self.patience} evaluation{'' if self.patience == 1 else 's'} without a better one "
                "(train.patience)."
            )

    def _told(self, latest: Evaluation) -> str:
        metric = "" if latest.dev_metric is None else f", {score_text(self.metric, latest.dev_metric)}"
        gap = latest.dev_loss - latest.train_loss
        place = place_text(latest)
        return (
            f"{place[0].upper()}{place[1:]}: dev loss {latest.dev_loss:.3f} ({gap:+.3f} from the training loss, "
            f"{latest.train_loss:.3f}){metric}"
        )
