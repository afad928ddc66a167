"""Checkpoints that are known to be whole, after each evaluation and on request, and the one that a run goes on from.

WORK/
  checkpoint-N/     everything that a run needs to go on after step N; the newest two are kept
  evaluated/step-N/ the adapter that was evaluated after step N, if it is among the best or the latest of a checkpoint
Each gets a manifest of its files' SHA-256 last (``disk.seal``): without one it was cut off while being written, and
with one that does not hold it was damaged since.
"""

from __future__ import annotations

import fcntl
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from tunewright.adapters.registry import CONFIG, WEIGHTS
from tunewright.core.errors import UserError
from tunewright.core.io import MANIFEST, damage, new_folder, seal, write_json, writing
from tunewright.core.progress import Reporter
from tunewright.models.bases import Base
from tunewright.training import distributed
from tunewright.training.checkpoint_selection import Evaluation, adapter_folder, evaluations, worth_keeping
from tunewright.training.stopping import StopRequest

_KEPT = 2
"""Whole checkpoints: the newest, and the one before in case that is damaged."""
_STATE = "trainer_state.json"


class KeepCheckpoints(TrainerCallback):
    """Saves after each evaluation and on request, seals each whole checkpoint, keeps the evaluated adapters.

    A step's evaluation comes before its checkpoint, so that a run that resumes there has it. Only a stop cuts one off;
    `owes_evaluation` then says so.
    """

    def __init__(self, work: Path, base: Base, stop: StopRequest) -> None:
        self.work = work
        self.base = base
        self.stop = stop
        self.evaluated = False
        self.random: dict[str, Any] = {}
        """The random state before the step in progress."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The passes of a step begin."""
        self.random = random_state()
        self.stop.in_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights are about to change: what follows, until the next step begins, is finished in any case."""
        self.stop.phase = "closed"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All is saved."""
        self.stop.phase = "free"

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
        """This step's checkpoint is written: keep the evaluated adapter, seal it, and only then let go of others."""
        distributed.wait()  # each has files of its own in a checkpoint
        if not distributed.is_main():
            return
        checkpoint = self.work / f"checkpoint-{state.global_step}"
        if self.evaluated:
            _keep(checkpoint, adapter_folder(self.work, state.global_step), self.base)
        seal(checkpoint)
        for old in _newest_first(self.work)[_KEPT:]:
            _remove(old)
        _let_go_of_others(self.work)


def random_state() -> dict[str, Any]:
    """Return the state of every generator that transformers keeps in a checkpoint."""
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state(), "cards": cards}


def restore_random(state: dict[str, Any]) -> None:
    """Go back to what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state["cards"]:
        torch.cuda.set_rng_state_all(state["cards"])


def owes_evaluation(checkpoint: Path, every: int) -> bool:
    """Return whether a stop cut off the evaluation that belongs to a checkpoint's step."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    step = state["global_step"]
    evaluated = evaluations(state["log_history"])
    due = step % every == 0 or step == state["max_steps"]
    return due and not (evaluated and evaluated[-1].step == step)


def add_evaluation(checkpoint: Path, state: Any, base: Base) -> None:
    """Write ``state``, which has the evaluation that was owed, and keep the evaluated adapter; seal all of it again."""
    if distributed.is_main():
        (checkpoint / MANIFEST).unlink()
        state.save_to_json(str(checkpoint / _STATE))
        _keep(checkpoint, adapter_folder(checkpoint.parent, step_of(checkpoint)), base)
        seal(checkpoint)
    distributed.wait()


def _let_go_of_others(work: Path) -> None:
    """Remove the evaluated adapters that no checkpoint needs: the run may have to go on from the older one."""
    needed = {e.folder(work) for checkpoint in _newest_first(work) for e in _needed(checkpoint)}
    for folder in set((work / "evaluated").glob("step-*")) - needed:
        _remove(folder)


def _needed(checkpoint: Path) -> list[Evaluation]:
    """Return the evaluations whose adapters a run that goes on from this checkpoint may still keep."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return worth_keeping(evaluations(state["log_history"]))


def _keep(checkpoint: Path, kept: Path, base: Base) -> None:
    """Copy a checkpoint's adapter, as it will be stored if it is the best."""
    _remove(kept)  # from a run that got this far before, and lost the checkpoint
    with new_folder(kept) as folder:
        shutil.copyfile(checkpoint / WEIGHTS, folder / WEIGHTS)
        config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
        # The base as the config names it, in place of a path that only this machine has. And peft keeps targets as a
        # set, written in an order that changes from run to run: sorted, equal adapters have equal digests.
        settled = {
            "base_model_name_or_path": base.spec,
            "revision": base.commit,
            "target_modules": sorted(config["target_modules"]),
        }
        write_json(folder / CONFIG, {**config, **settled})
        seal(folder)


def whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    return (checkpoint / MANIFEST).exists()


def whole_checkpoint(work: Path) -> Path | None:
    """Return the newest checkpoint that is whole, if there is one."""
    return next((checkpoint for checkpoint in _newest_first(work) if not damage(checkpoint)), None)


def usable_checkpoint(work: Path, base: Base, reporter: Reporter) -> Path | None:
    """The newest checkpoint that is whole, with all evaluated adapters before it; None: start from the beginning.

    What is passed over is named. It is removed too, since the run will write it again.
    """
    chosen = None
    passed_over = []
    for checkpoint in _newest_first(work):
        if not (checkpoint / MANIFEST).exists():
            reporter.say(f"{checkpoint.name} was cut off while being written, and is not used")
        elif faults := damage(checkpoint) or _lost_adapters(work, checkpoint, base):
            reporter.warn(f"{checkpoint} is damaged, and is not used: {'; '.join(faults)}")
        else:
            chosen = checkpoint
            break
        passed_over.append(checkpoint)
    if chosen is None and passed_over:
        reporter.warn("No whole checkpoint is left: training starts from the beginning.")
    for checkpoint in passed_over:
        _remove(checkpoint)
    return chosen


def _lost_adapters(work: Path, checkpoint: Path, base: Base) -> list[str]:
    """Return what is wrong with the evaluated adapters that a checkpoint has behind it; its own is made good."""
    faults = []
    for evaluation in _needed(checkpoint):
        kept = evaluation.folder(work)
        lost = damage(kept)
        if lost and evaluation.step == step_of(checkpoint):
            _keep(checkpoint, kept, base)
        else:
            faults += [f"{kept.relative_to(work)}: {fault}" for fault in lost]
    return faults


def require_whole(folder: Path) -> None:
    """Check that a kept adapter is the one that training wrote.

    Raises:
        UserError: it is not.
    """
    if faults := damage(folder):
        raise UserError(
            f"this adapter was damaged on the disk: {'; '.join(faults)}",
            where=str(folder),
            fix="Run the same command again: it goes on from before the damage.",
        )


@contextmanager
def working_folder(work: Path) -> Iterator[None]:
    """Make a run's folder and hold it alone; a checkpoint that is cut off, as by a full disk, gives its room back.

    Of several processes the main one does.

    Raises:
        UserError: another process trains there, or the folder cannot be made.
    """
    if not distributed.is_main():
        yield
        return
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")  # the system lets go of it, however this process ends
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                "another process is training this adapter", where=str(work), fix="Wait for it, or stop it first."
            ) from error
        try:
            yield
        finally:
            for checkpoint in _newest_first(work):
                if not (checkpoint / MANIFEST).exists():
                    _remove(checkpoint)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _newest_first(work: Path) -> list[Path]:
    return sorted(work.glob("checkpoint-*"), key=step_of, reverse=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first: cut off halfway, it is an unfinished one and no damaged one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
