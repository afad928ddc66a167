"""Checkpoints that are known to be whole, at each epoch and on request."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tunewright.adapters.registry import CONFIG, WEIGHTS
from tunewright.training.stopping import StopRequest

_WHOLE = "whole"
"""An empty file that a checkpoint gets last: without it, one was cut off while being written."""


class KeepCheckpoints(TrainerCallback):
    """Saves at each epoch's end and on request, marks each whole checkpoint, keeps the epochs' adapters.

    The checkpoint of an epoch's last step counts only once the dev split has been evaluated too: a run that goes on
    from there starts the next epoch, and would never make up for it.
    """

    def __init__(self, work: Path, stop: StopRequest) -> None:
        self.work = work
        self.stop = stop
        self.evaluated = False

    @staticmethod
    def folder(work: Path, step: int) -> Path:
        """Where the adapter of an epoch that ended at ``step`` is kept."""
        return work / "epochs" / f"step-{step}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop after this step, if someone asked for it."""
        self.evaluated = False
        if self.stop.asked:
            control.should_training_stop = True
            control.should_save = not _ends_epoch(args, state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch's end is a checkpoint; a stop in the middle of one gets here too, and is none."""
        control.should_save = control.should_evaluate = _ends_epoch(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The dev split has been evaluated after this step."""
        self.evaluated = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint of this step is written."""
        checkpoint = self.work / f"checkpoint-{state.global_step}"
        if self.evaluated:
            kept = self.folder(self.work, state.global_step)
            kept.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(checkpoint / name, kept / name)
        if self.evaluated or not _ends_epoch(args, state):
            (checkpoint / _WHOLE).touch()


def _ends_epoch(args: Any, state: Any) -> bool:
    return bool(state.global_step % (state.max_steps // int(args.num_train_epochs)) == 0)


def complete_checkpoint(work: Path) -> Path | None:
    """The latest checkpoint that was written to its end, if there is one."""
    whole = [p.parent for p in work.glob(f"checkpoint-*/{_WHOLE}")]
    return max(whole, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)
