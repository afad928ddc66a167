"""Which evaluation's adapter is kept, when training stops early, and when it is learning by heart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

DEV_LOSS = "eval_loss"
DEV_METRIC = "eval_metric"
"""Their names in the history, as transformers' trackers want them."""

PAIR_LOSS = "pair_loss"
REPLAY_KL = "replay_kl"
REPLAY_LOSS = "replay_loss"
"""The parts of ``loss`` in a run with replay: the pairs', and the replayed rows' divergence (learnt: their loss)."""

_KEPT = (
    "step",
    "epoch",
    "loss",
    PAIR_LOSS,
    REPLAY_KL,
    REPLAY_LOSS,
    DEV_LOSS,
    DEV_METRIC,
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
)
"""What the history keeps of transformers' ``log_history``: gradient norms are before clipping."""

_MOST_KEPT = 8
"""Evaluations whose adapters are kept for being good: however often a run is evaluated, the disk does not fill."""

_RISES = 2
"""Rises of the dev loss in a row that are called overfitting: a single one is often noise."""


@dataclass(frozen=True)
class Evaluation:
    """What the dev split said after one step, and the training loss since the evaluation before."""

    step: int
    epoch: float
    dev_loss: float
    dev_metric: float | None
    """The task's metric over the answered dev rows, as a share; None where none are answered."""
    train_loss: float | None
    """Of the pairs alone, where there is replay too; None where no pair was trained on since the evaluation before."""

    @property
    def rank(self) -> tuple[float, float, int]:
        """The larger, the better: the metric, then the dev loss; of equal ones the earlier."""
        return (0.0 if self.dev_metric is None else self.dev_metric, -self.dev_loss, -self.step)

    def folder(self, work: Path) -> Path:
        """Where the run keeps this evaluation's adapter."""
        return adapter_folder(work, self.step)


def adapter_folder(work: Path, step: int) -> Path:
    """Where a run keeps the adapter that was evaluated after ``step``."""
    return work / "evaluated" / f"step-{step}"


def history_rows(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the history that is kept of a run: a row for each step and each evaluation, in order."""
    kept = [entry for entry in log_history if "loss" in entry or DEV_LOSS in entry]
    return [{key: entry[key] for key in _KEPT if key in entry} for entry in kept]


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """The evaluations of a run, in order; ``history`` is transformers' ``log_history`` or an adapter's history."""
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
    """The training loss of a step's pairs; None where the row is of no step, or of one of replayed rows alone."""
    if PAIR_LOSS in row:
        return float(row[PAIR_LOSS])
    whole = "loss" in row and not {REPLAY_KL, REPLAY_LOSS} & row.keys()
    return float(row["loss"]) if whole else None


def best_of(evaluated: Sequence[Evaluation]) -> Evaluation:
    """Return the best by the metric; the dev loss breaks ties, then the earlier."""
    return max(evaluated, key=lambda e: e.rank)


def worth_keeping(evaluated: Sequence[Evaluation]) -> list[Evaluation]:
    """Return those whose adapters stay on the disk, in order: the eight best, and the latest.

    What is among them at the end has been among them ever since it was evaluated.
    """
    best = sorted(evaluated, key=lambda e: e.rank, reverse=True)[:_MOST_KEPT]
    return [e for e in evaluated if e in best or e is evaluated[-1]]


def runs_out_of_patience(evaluated: Sequence[Evaluation], patience: int | None) -> bool:
    """Return whether so many evaluations have passed without a better one."""
    if patience is None or not evaluated:
        return False
    return len(evaluated) - 1 - evaluated.index(best_of(evaluated)) >= patience


def overfitting(evaluated: Sequence[Evaluation]) -> str | None:
    """In plain words, that the latest evaluations rose while the training loss fell; None where they did not."""
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
        f"Overfitting: the dev loss has risen for {_RISES} evaluations ({dev}) while the training loss went on falling "
        f"({train}): the model learns its rows by heart. The best so far is {place_text(best_of(evaluated))}."
    )


def place_text(evaluation: Evaluation) -> str:
    """Where in the run an evaluation was: ``epoch 2 (step 24)``."""
    return f"epoch {evaluation.epoch:.3g} (step {evaluation.step:,})"
