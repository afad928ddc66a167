"""Trackers that a run reports to through transformers' own integrations, and where they write."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tunewright.errors import UserError
from tunewright.recipe import Tracker


def require_trackers(trackers: Sequence[Tracker]) -> None:
    """Check that the recipe's trackers are installed, before anything is loaded or measured.

    Raises:
        UserError: one is not.
    """
    missing = [tracker for tracker in trackers if importlib.util.find_spec(tracker) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            where="train.report_to",
            fix=f"pip install {' '.join(missing)}, or leave {'it' if len(missing) == 1 else 'them'} out.",
        )


@contextmanager
def tracked_in(folder: Path, project: str, run: str) -> Iterator[None]:
    """Have trackers write below ``folder`` while this is open, unless the user's environment says where.

    Args:
        folder: theirs; the run's own folder is removed at its end.
        project: what trackers group runs by.
        run: the run's name.
    """
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
