"""Monitoring of a run: progress, metrics, the answers to dev rows, early stopping, and the check for divergence."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerCallback

from tunewright.chat import ChatFormat
from tunewright.chat.answers import answer_limit, answer_text, stop_strings, warn_of_longer_references
from tunewright.config import Config, MetricName, metric_name
from tunewright.core.errors import UserError
from tunewright.core.io import write_text
from tunewright.core.progress import Reporter, Task
from tunewright.data.examples import Example
from tunewright.data.versions import Member
from tunewright.generation.generate import BatchSize, generate_halving
from tunewright.generation.requests import Request
from tunewright.metrics import Scorer, check_references, score_all, score_text, scorer_of
from tunewright.training import fsdp
from tunewright.training.history import (
    DEV_LOSS,
    DEV_METRIC,
    PAIR_LOSS,
    REPLAY_KL,
    REPLAY_LOSS,
    SHOWN,
    Evaluation,
    evaluations,
    history_rows,
    overfitting,
    patience_exceeded,
    place_text,
)
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
        """Return the error for the user, naming the batch's rows among the training set's ``members``."""
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
    - 10 steps each more than 1 nat above the *highest* of the first 10. Those are steps of the warm-up,
      where the model is still close to the base. If training changed nothing, ten given losses would all
      exceed ten others by chance once in 184,756 = C(20, 10) times. The margin makes it rarer still.

    A run that learns and then falls back to its start is not stopped: the dev split selects an earlier adapter.

    ``losses`` are from all steps up to this one, in nats per trained token; ``gradient_norm`` is
    over all LoRA weights, before clipping.
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


_SPEED_STEPS = 20


class MetricsCallback(TrainerCallback):
    """Reports every number, writes it to the run's metrics file, and stops a diverged run.

    The file has a JSON object a line for each step and each evaluation. ``rows_of_step`` returns
    the indices of a step's rows in the training set.
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


_ADAPTER = "default"
"""peft's name for the adapter in training."""


@dataclass(frozen=True)
class DevTask:
    """Dev rows that each evaluation answers with the model in training."""

    scorer: Scorer
    requests: tuple[Request, ...]
    """Distinct requests: an input with several references is answered once."""
    examples: tuple[Example, ...]
    """The answered inputs with their expected outputs."""
    request_of: tuple[int, ...]
    """For each example, the index of its request."""
    split: tuple[Example, ...]
    """All dev rows; their outputs are the references of their inputs."""
    batch_size: BatchSize
    """Shared by all evaluations of a run: later ones begin with the number of rows that fitted before."""
    chat: ChatFormat
    reporter: Reporter
    keys: tuple[str, ...]
    """The examples' pair keys."""

    def answers(self, model: Any, places: Sequence[int]) -> list[str]:
        """Answer the requests at these indices greedily, in their order.

        ``model`` is a PeftModel in eval mode whose adapter is ``default``, as trl's trainer makes it.
        """
        with self.reporter.task("Answering dev rows", len(places), "answers") as task:
            completions = generate_halving(
                model,
                [self.requests[place] for place in places],
                self.batch_size,
                self.reporter,
                stop_ids=self.chat.stop_ids,
                pad_id=self.chat.tokenizer.pad_token_id,
                decode=self.chat.text,
                on_finished=lambda _index, _completion: task.advance(),
                repeatable=not fsdp.is_sharded(model),
            )
        asked = dict(zip(self.request_of, self.examples, strict=True))
        return [
            answer_text(self.chat, completion, asked[place].prompt)
            for place, completion in zip(places, completions, strict=True)
        ]

    def shown(self, answers: Sequence[str]) -> dict[str, str]:
        """Return the first rows' answers by pair key, from the answers to all requests."""
        return {key: answers[place] for key, place in zip(self.keys[:SHOWN], self.request_of, strict=False)}

    def score(self, answers: Sequence[str]) -> float:
        """Score the answers to all requests by the deciding metric, from 0 to 1."""
        return score_all(self.scorer, [answers[place] for place in self.request_of], self.examples, self.split).total()


def dev_task(
    config: Config,
    root: Path,
    chat: ChatFormat,
    train: Sequence[Member],
    dev: Sequence[Member],
    context: int,
    reporter: Reporter,
) -> DevTask | None:
    """Return the rows that each evaluation answers: all of dev, or a sample drawn by the seed and reported.

    Rows with equal prompts are answered once. The answers of the training rows determine the length
    limit, as in evaluation. None means that the config wants no answers, and only the dev loss decides.
    """
    most, split = config.train.eval_max_samples, tuple(m.example for m in dev)
    if most == 0:
        return None
    if most is not None and most < len(dev):
        places = sorted(random.Random(f"{config.seed}:dev").sample(range(len(dev)), most))
        reporter.say(
            f"Each evaluation answers {most} of the {len(dev)} dev rows, drawn by the seed (train.eval_max_samples)."
        )
        dev = [dev[place] for place in places]
    scorer = scorer_of(config.evaluate.metric, root)
    check_references([scorer], [m.example for m in dev], "dev", reporter)
    limit = answer_limit(config, chat, train)
    warn_of_longer_references(chat, [m.example for m in dev], limit, "dev", reporter)
    stop = stop_strings(config, chat)
    prompts = [chat.prompt(m.example.prompt) for m in dev]
    place_of = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    return DevTask(
        scorer=scorer,
        # A row that training accepted fits the context with its answer. An answer cut here is longer, and so wrong.
        requests=tuple(Request(p, _ADAPTER, min(limit, context - len(p)), stop=stop) for p in place_of),
        examples=tuple(m.example for m in dev),
        request_of=tuple(place_of[prompt] for prompt in prompts),
        split=split,
        batch_size=BatchSize(config.evaluate.batch_size),
        chat=chat,
        reporter=reporter,
        keys=tuple(m.key for m in dev),
    )
