"""Checkpoints that are known to be whole, after each evaluation and on request."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tunewright.adapters.registry import CONFIG, WEIGHTS
from tunewright.training.choosing import adapter_folder
from tunewright.training.stopping import StopRequest

_WHOLE = "whole"
"""An empty file that a checkpoint gets last: without it, one was cut off while being written."""


class KeepCheckpoints(TrainerCallback):
    """Saves after each evaluation and on request, marks each whole checkpoint, keeps the evaluated adapters.

    A step's evaluation comes before its checkpoint: a run that goes on from there has it, and never makes up for it.
    """

    def __init__(self, work: Path, stop: StopRequest) -> None:
        self.work = work
        self.stop = stop
        self.evaluated = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop after this step, if someone asked for it."""
        self.evaluated = False
        if self.stop.after(state.global_step):
            control.should_training_stop = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The dev split has been evaluated after this step."""
        self.evaluated = control.should_save = True
        if self.stop.after(state.global_step):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint of this step is written."""
        checkpoint = self.work / f"checkpoint-{state.global_step}"
        if self.evaluated:
            kept = adapter_folder(self.work, state.global_step)
            kept.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(checkpoint / name, kept / name)
        (checkpoint / _WHOLE).touch()


def complete_checkpoint(work: Path) -> Path | None:
    """The latest checkpoint that was written to its end, if there is one."""
    whole = [p.parent for p in work.glob(f"checkpoint-*/{_WHOLE}")]
    return max(whole, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)
