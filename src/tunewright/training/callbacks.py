"""Trainer callbacks: progress, metrics, early stopping and the divergence check."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerCallback

from tunewright.config import Config, MetricName, metric_name
from tunewright.core.io import write_text
from tunewright.core.progress import Reporter, Task
from tunewright.metrics import score_text
from tunewright.training.checkpoint_selection import (
    DEV_LOSS,
    DEV_METRIC,
    PAIR_LOSS,
    REPLAY_KL,
    REPLAY_LOSS,
    Evaluation,
    evaluations,
    history_rows,
    overfitting,
    patience_exceeded,
    place_text,
)
from tunewright.training.divergence import UnstableRunError, fault

_SPEED_STEPS = 20


class MetricsCallback(TrainerCallback):
    """Reports every number, writes it to the run's metrics file, and stops a diverged run.

    Args:
        task: the run's progress.
        file: the metrics file, one JSON object a line for each step and each evaluation.
        metric: the metric of the dev rows' answers.
        vocabulary: size of the vocabulary.
        rows_of_step: returns the indices of a step's rows in the training set.
    """

    def __init__(
        self,
        task: Task,
        file: Path,
        metric: MetricName,
        vocabulary: int,
        rows_of_step: Callable[[int], Sequence[int]],
    ) -> None:
        self.task = task
        self.file = file
        self.metric = metric
        self.vocabulary = vocabulary
        self.rows_of_step = rows_of_step
        self.speeds: list[float] = []
        self.dev = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the checkpoint's metrics, without later lines of a killed run: those steps are repeated."""
        rows = history_rows(state.log_history)
        if not state.is_world_process_zero:
            return
        write_text(self.file, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            self._show(row)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Handle a finished training step (``loss``) or evaluation (``eval_loss``)."""
        rows = history_rows(state.log_history[-1:])
        if not rows:
            return
        (row,) = rows
        self._check_divergence(state, row)
        if not state.is_world_process_zero:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._show(row)
        if "loss" in row:
            self.speeds += [row["tokens_per_s"]] if "tokens_per_s" in row else []
            speed = f", {median(self.speeds[-_SPEED_STEPS:]):,.0f} tokens/s" if self.speeds else ""
            self.task.advance(1, f"loss {row['loss']:.3f}{self.dev}{speed}")

    def _check_divergence(self, state: Any, row: Mapping[str, Any]) -> None:
        what = None
        if "loss" in row:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            what = fault(row["loss"], row.get("grad_norm", 0.0), losses, self.vocabulary)
        elif not math.isfinite(row[DEV_LOSS]):
            what = f"The dev loss is {row[DEV_LOSS]}"
        if what is not None:
            raise UnstableRunError(what, state.global_step, self.rows_of_step(state.global_step))

    def _show(self, row: Mapping[str, Any]) -> None:
        curves = ("loss", PAIR_LOSS, REPLAY_KL, REPLAY_LOSS, DEV_LOSS)
        numbers = {name: row[name] for name in curves if name in row}
        if DEV_METRIC in row:
            numbers[self.metric] = row[DEV_METRIC]
        self.task.measured(row["step"], numbers)
        if DEV_LOSS in row:
            self.dev = f", dev {row[DEV_LOSS]:.3f}"


class EvaluationCallback(TrainerCallback):
    """Reports each evaluation and overfitting, and stops early if the config says so.

    All of it follows from the trainer's history, which checkpoints contain, so a resumed run decides the same.
    """

    def __init__(self, config: Config, reporter: Reporter) -> None:
        self.metric = metric_name(config.evaluate.metric)
        self.patience = config.train.early_stopping_patience
        self.trained = "training loss" if config.train.replay is None else "pairs' training loss"
        self.reporter = reporter

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the evaluation after this step, and stop the run if it is out of patience."""
        evaluated = evaluations(state.log_history)
        self.reporter.say(self._summary(evaluated[-1]))
        warning = overfitting(evaluated)
        if warning is not None and overfitting(evaluated[:-1]) is None:
            self.reporter.warn(warning)
        if patience_exceeded(evaluated, self.patience):
            control.should_training_stop = True
            self.reporter.say(
                f"Stopping early: {self.patience} evaluation{'' if self.patience == 1 else 's'} without a better one "
                "(train.early_stopping_patience)."
            )

    def _summary(self, latest: Evaluation) -> str:
        metric = "" if latest.dev_metric is None else f", {score_text(self.metric, latest.dev_metric)}"
        place = place_text(latest)
        gap = ""
        if latest.train_loss is not None:
            distance = latest.dev_loss - latest.train_loss
            gap = f" ({distance:+.3f} from the {self.trained}, {latest.train_loss:.3f})"
        return f"{place[0].upper()}{place[1:]}: dev loss {latest.dev_loss:.3f}{gap}{metric}"
