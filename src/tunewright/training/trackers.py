"""Trackers: transformers' own integrations, and where they write."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tunewright.config import Tracker
from tunewright.core.errors import UserError
from tunewright.training import distributed


def require_trackers(trackers: Sequence[Tracker]) -> None:
    """Check that the config's trackers are installed and accessible, before anything is loaded or measured."""
    missing = [tracker for tracker in trackers if importlib.util.find_spec(tracker) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            where="train.report_to",
            fix=f"pip install {' '.join(missing)}, or remove {'it' if len(missing) == 1 else 'them'}.",
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
