"""A run's record without torch: losses, dev evaluations and answers, the choice of the best adapter, and trackers.

Trackers are transformers' own integrations; here is what they need, and where they write.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from tunewright.config import Tracker
from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.training import distributed

COMMAND = "command"
"""File of a working folder that names the command of the run."""

DEV_LOSS = "eval_loss"
DEV_METRIC = "eval_metric"
"""Names in the history, as transformers' trackers expect them."""

PAIR_LOSS = "pair_loss"
REPLAY_KL = "replay_kl"
REPLAY_LOSS = "replay_loss"
"""Parts of ``loss`` in a run with replay: the pairs' loss, and the replayed rows' KL divergence or loss."""

REWARD_CHOSEN = "rewards/chosen"
REWARD_REJECTED = "rewards/rejected"
REWARD_ACCURACY = "rewards/accuracies"
"""trl's names in preference tuning: mean rewards, and the share of pairs whose chosen answer has more."""

_KEPT = (
    "step",
    "epoch",
    "loss",
    PAIR_LOSS,
    REPLAY_KL,
    REPLAY_LOSS,
    REWARD_CHOSEN,
    REWARD_REJECTED,
    REWARD_ACCURACY,
    DEV_LOSS,
    DEV_METRIC,
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "memory_bytes",
)
"""Keys of transformers' ``log_history`` that the history keeps; gradient norms are before clipping."""

_MOST_KEPT = 8
"""Best evaluations whose adapters stay on disk, so that frequent evaluations do not fill it."""

_RISES = 2
"""Consecutive rises of the dev loss that count as overfitting: a single one is often noise."""


@dataclass(frozen=True)
class Evaluation:
    """Dev results after one step, and the mean training loss since the previous evaluation."""

    step: int
    epoch: float
    dev_loss: float
    dev_metric: float | None
    """The task's metric on the answered dev rows, from 0 to 1; None if no rows are answered."""
    train_loss: float | None
    """Training loss, with replay only of the pairs; None without a trained pair since the previous evaluation."""

    @property
    def rank(self) -> tuple[float, float, int]:
        """A sort key, larger is better: the metric, then the dev loss; among equal evaluations the earlier one wins."""
        return (0.0 if self.dev_metric is None else self.dev_metric, -self.dev_loss, -self.step)


def adapter_folder(work: Path, step: int) -> Path:
    """Return the folder of the adapter that was evaluated after ``step``."""
    return work / "evaluated" / f"step-{step}"


def history_rows(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the kept history of a run: one row for each step and each evaluation, in order."""
    kept = [entry for entry in log_history if "loss" in entry or DEV_LOSS in entry]
    return [{key: entry[key] for key in _KEPT if key in entry} for entry in kept]


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """Return a run's evaluations in order; ``history`` is transformers' ``log_history`` or an adapter's history."""
    found: list[Evaluation] = []
    losses: list[float] = []
    for row in history:
        if (loss := pairs_loss(row)) is not None:
            losses.append(loss)
        if DEV_LOSS in row:
            train_loss = fmean(losses) if losses else None
            found.append(Evaluation(row["step"], row["epoch"], row[DEV_LOSS], row.get(DEV_METRIC), train_loss))
            losses = []
    return found


def pairs_loss(row: Mapping[str, Any]) -> float | None:
    """Return the training loss of a step's pairs, in nats per token.

    It is None for other rows, for a step of only replayed rows, and in preference tuning, which has another loss.
    """
    if PAIR_LOSS in row:
        return float(row[PAIR_LOSS])
    other = {REPLAY_KL, REPLAY_LOSS, REWARD_CHOSEN, REWARD_REJECTED}
    pairs_only = "loss" in row and not other & row.keys()
    return float(row["loss"]) if pairs_only else None


def best_evaluation(evaluated: Sequence[Evaluation]) -> Evaluation:
    """Return the best evaluation by the metric; the dev loss breaks ties, then the earlier step."""
    return max(evaluated, key=lambda e: e.rank)


def evaluations_to_keep(evaluated: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the evaluations whose adapters stay on disk, in order: the eight best, and the latest.

    An evaluation that is kept at the end was kept at every step since it was made.
    """
    best = sorted(evaluated, key=lambda e: e.rank, reverse=True)[:_MOST_KEPT]
    return [e for e in evaluated if e in best or e is evaluated[-1]]


def patience_exceeded(evaluated: Sequence[Evaluation], patience: int | None) -> bool:
    """Return whether ``patience`` evaluations have passed without a better one."""
    if patience is None or not evaluated:
        return False
    return len(evaluated) - 1 - evaluated.index(best_evaluation(evaluated)) >= patience


def overfitting(evaluated: Sequence[Evaluation]) -> str | None:
    """Return a warning if the latest dev losses rose while the training loss fell; else None."""
    latest = evaluated[-_RISES - 1 :]
    if len(latest) <= _RISES:
        return None
    trained = [e.train_loss for e in latest if e.train_loss is not None]
    rises = all(b.dev_loss > a.dev_loss for a, b in pairwise(latest))
    falls = len(trained) == len(latest) and all(b < a for a, b in pairwise(trained))
    if not (rises and falls):
        return None
    dev, train = (" → ".join(f"{value:.3f}" for value in each) for each in ([e.dev_loss for e in latest], trained))
    return (
        f"Overfitting: the dev loss has risen for {_RISES} evaluations ({dev}) while the training loss kept falling "
        f"({train}). The best evaluation so far is {place_text(best_evaluation(evaluated))}."
    )


def place_text(evaluation: Evaluation) -> str:
    """Return an evaluation's position in the run, such as ``epoch 2 (step 24)``."""
    return f"epoch {evaluation.epoch:.3g} (step {evaluation.step:,})"


DEV_ANSWERS = "dev_answers.jsonl"
SHOWN = 5
"""Rows whose answers are kept."""


def append_dev_answers(work: Path, step: int, answers: Mapping[str, str]) -> None:
    """Add the answers after a step, by the rows' pair keys."""
    with (work / DEV_ANSWERS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "answers": answers}, ensure_ascii=False) + "\n")


def read_dev_answers(work: Path) -> dict[int, dict[str, str]]:
    """Return the answers by step and pair key; empty before the first evaluation.

    A resumed run repeats evaluations after its checkpoint: the last line of a step counts. A last
    line without its end is still being written.
    """
    file = work / DEV_ANSWERS
    if not file.exists():
        return {}
    found: dict[int, dict[str, str]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            found[int(row["step"])] = {str(key): str(text) for key, text in row["answers"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError("Not a line of answers", where=f"{file}:{number}", fix="Remove the file.") from None
    return found


def require_trackers(trackers: Sequence[Tracker]) -> None:
    """Check that the config's trackers are installed and accessible, before anything is loaded or measured."""
    missing = [tracker for tracker in trackers if importlib.util.find_spec(tracker) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            where="train.report_to",
            fix=f"{install_command(packages=missing)}, or remove {'it' if len(missing) == 1 else 'them'}.",
        )
    if not distributed.is_main_process():  # only the main process reports
        return
    if "wandb" in trackers:
        _log_in_to_wandb()
    if "mlflow" in trackers and "MLFLOW_TRACKING_URI" in os.environ:
        _open_mlflow(os.environ["MLFLOW_TRACKING_URI"])


def _log_in_to_wandb() -> None:
    """Have W&B look for its API key now; without one it would fail at the first step."""
    import wandb

    try:
        if wandb.setup().settings.mode not in ("offline", "disabled"):
            wandb.login()
    except wandb.errors.UsageError as error:
        raise UserError(
            f"W&B login failed: {error}",
            where="train.report_to",
            fix="Run `wandb login`, or set WANDB_API_KEY. With WANDB_MODE=offline it writes local files without a key.",
        ) from None
    finally:
        wandb.teardown()  # forget the environment that it has read: `tracked_in` sets the folder later


def _open_mlflow(uri: str) -> None:
    """Have MLflow open the user's store now: it refuses some stores, and would do so only at the first step."""
    import mlflow

    try:
        mlflow.MlflowClient(uri).search_experiments(max_results=1)
    except mlflow.exceptions.MlflowException as error:
        raise UserError(
            f"MLflow cannot open MLFLOW_TRACKING_URI={uri}: {str(error).splitlines()[0]}",
            where="train.report_to",
            fix="Use another store, such as sqlite:///mlflow.db, or unset it to write to .tunewright/trackers.",
        ) from None


@contextmanager
def tracked_in(folder: Path, project: str, run: str) -> Iterator[None]:
    """Have trackers write below ``folder`` while this is open, unless the user's environment names another place."""
    places = {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard" / run),
        "WANDB_DIR": str(folder),
        "WANDB_PROJECT": project,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "MLFLOW_EXPERIMENT_NAME": project,
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    ours = {name: value for name, value in places.items() if name not in os.environ}
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
