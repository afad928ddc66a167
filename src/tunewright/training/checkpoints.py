"""Checkpoints, and the stop requests that leave one: Ctrl-C and SIGTERM save within seconds, and runs can pause.

WORK/
  checkpoint-N/     everything that a run needs to resume after step N; the newest two are kept
  evaluated/step-N/ the adapter evaluated after step N, if it is among the best or is the latest of a checkpoint
A manifest of the files' SHA-256 is written last (``core.io.seal``). A folder without one was cut
off while it was written; a manifest that does not match means later damage.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback

from tunewright.adapters.registry import CONFIG, WEIGHTS
from tunewright.core.errors import UserError
from tunewright.core.interrupts import finishing
from tunewright.core.io import MANIFEST, damage, new_folder, seal, write_json
from tunewright.core.locks import locked_folder
from tunewright.core.progress import Reporter
from tunewright.models.bases import Base
from tunewright.training import distributed
from tunewright.training.history import Evaluation, adapter_folder, evaluations, evaluations_to_keep

GRACE_S = 3.0
"""Time for the step in progress to finish; a longer step is abandoned, and the step before it is saved."""


class StopRequest:
    """A request to stop the run, and the step after which it pauses in any case."""

    def __init__(self, pause_after: int | None = None, elsewhere: Callable[[], bool] = lambda: False) -> None:
        self.asked = False
        self._elsewhere = elsewhere
        self.pause_after = pause_after
        self.phase: Literal["free", "step", "closed"] = "free"
        """Effect of a request: "free" interrupts now; "step" after `GRACE_S`; "closed" at the step's end, because
        weights or files are being changed."""

    def after(self, step: int) -> bool:
        """Return whether this step is the last one for now; all processes of the run ask after the same steps."""
        return self.agreed() or step == self.pause_after

    def agreed(self) -> bool:
        """Return whether any process of the run was asked to stop; all of them must call this at the same places."""
        self.asked = distributed.any_process(self.asked or self._elsewhere())
        return self.asked

    def in_step(self) -> None:
        """Enter the passes of a step."""
        self.phase = "step"
        self._raise_if_requested()

    @contextmanager
    def free(self, what: str) -> Iterator[None]:
        """Let a request interrupt this block immediately; ``what`` says what then happens to the run.

        Several processes must agree on a stop, which they do only after steps: there the block is finished.
        """
        before, self.phase = self.phase, "free"
        try:
            with finishing(what):
                self._raise_if_requested()
                yield
        finally:
            self.phase = before

    def _raise_if_requested(self) -> None:
        if self.asked and distributed.world_size() == 1:
            raise KeyboardInterrupt


_asked_elsewhere: ContextVar[Callable[[], bool]] = ContextVar("asked_elsewhere", default=lambda: False)


@contextmanager
def stopped_from(asked: Callable[[], bool]) -> Iterator[None]:
    """Stop the block's runs after the step at which ``asked`` returns True, for a process that gets no signals."""
    before = _asked_elsewhere.set(asked)
    try:
        yield
    finally:
        _asked_elsewhere.reset(before)


@contextmanager
def stop_on_signal(pause_after: int | None = None) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one interrupts immediately.

    Outside the main thread no signal handlers are set: only `stopped_from` makes a request.
    """
    request = StopRequest(pause_after, _asked_elsewhere.get())

    def ask(_number: int, _frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        if distributed.world_size() > 1:
            return
        if request.phase == "free":
            raise KeyboardInterrupt
        if request.phase == "step":
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def abandon(_number: int, _frame: FrameType | None) -> None:
        if request.phase == "step":
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, abandon)
    try:
        yield request
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


_KEPT = 2
"""Complete checkpoints on disk: the newest, and the previous one in case the newest is damaged."""
_STATE = "trainer_state.json"
_ASKED_S = 0.5
"""How long a run waits for a process that only asks whether its folder is locked (`is_locked`)."""


class CheckpointCallback(TrainerCallback):
    """Saves after each evaluation and on request, seals complete checkpoints, and keeps evaluated adapters.

    A step is evaluated before it is saved, so a run that resumes there has the evaluation. Only a
    stop can cut an evaluation off; `evaluation_missing` detects that.
    """

    def __init__(self, work: Path, base: Base, stop: StopRequest) -> None:
        self.work = work
        self.base = base
        self.stop = stop
        self.evaluated = False
        self.random: dict[str, Any] = {}
        """The random state before the step in progress."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the random state before the step's passes."""
        self.random = random_state()
        self.stop.in_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Defer stop requests: the weights are about to change, and the step is finished in any case."""
        self.stop.phase = "closed"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let a stop request interrupt again: everything is saved."""
        self.stop.phase = "free"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop after this step if a stop was requested."""
        self.evaluated = False
        if self.stop.after(state.global_step):
            control.should_training_stop = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save after an evaluation."""
        self.evaluated = control.should_save = True
        if self.stop.after(state.global_step):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the evaluated adapter, seal the checkpoint, and only then remove older ones."""
        distributed.barrier()  # every process writes files into the checkpoint
        if not distributed.is_main_process():
            return
        checkpoint = self.work / f"checkpoint-{state.global_step}"
        if self.evaluated:
            _keep(checkpoint, adapter_folder(self.work, state.global_step), self.base)
        seal(checkpoint)
        for old in _newest_first(self.work)[_KEPT:]:
            _remove(old)
        _remove_unneeded_adapters(self.work)


def random_state() -> dict[str, Any]:
    """Return the state of every random generator that transformers keeps in a checkpoint."""
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state(), "cards": cards}


def restore_random(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state["cards"]:
        torch.cuda.set_rng_state_all(state["cards"])


def evaluation_missing(checkpoint: Path, every: int) -> bool:
    """Return whether a stop cut off the evaluation that belongs to a checkpoint's step."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    step = state["global_step"]
    evaluated = evaluations(state["log_history"])
    due = step % every == 0 or step == state["max_steps"]
    return due and not (evaluated and evaluated[-1].step == step)


def add_evaluation(checkpoint: Path, state: Any, base: Base) -> None:
    """Write ``state``, which has the missing evaluation, keep the evaluated adapter, and seal the checkpoint again."""
    if distributed.is_main_process():
        (checkpoint / MANIFEST).unlink()
        state.save_to_json(str(checkpoint / _STATE))
        _keep(checkpoint, adapter_folder(checkpoint.parent, step_of(checkpoint)), base)
        seal(checkpoint)
    distributed.barrier()


def _remove_unneeded_adapters(work: Path) -> None:
    """Remove evaluated adapters that no checkpoint needs; the older checkpoint counts, as the run may resume there."""
    needed = {adapter_folder(work, e.step) for checkpoint in _newest_first(work) for e in _needed(checkpoint)}
    for folder in set((work / "evaluated").glob("step-*")) - needed:
        _remove(folder)


def _needed(checkpoint: Path) -> list[Evaluation]:
    """Return the evaluations whose adapters a run resumed from this checkpoint may still keep."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return evaluations_to_keep(evaluations(state["log_history"]))


def _keep(checkpoint: Path, kept: Path, base: Base) -> None:
    """Copy a checkpoint's adapter, in the form in which the best adapter is stored."""
    _remove(kept)  # left by a run that got this far and lost the checkpoint
    with new_folder(kept) as folder:
        shutil.copyfile(checkpoint / WEIGHTS, folder / WEIGHTS)
        config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
        # The base as the config names it, instead of a local path. peft keeps targets as a set,
        # whose order changes from run to run: sorted, equal adapters have equal digests.
        settled = {
            "base_model_name_or_path": base.spec,
            "revision": base.commit,
            "target_modules": sorted(config["target_modules"]),
            "target_parameters": sorted(config["target_parameters"]) if config.get("target_parameters") else None,
        }
        write_json(folder / CONFIG, {**config, **settled})
        seal(folder)


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    return (checkpoint / MANIFEST).exists()


def latest_complete_checkpoint(work: Path) -> Path | None:
    """Return the newest undamaged checkpoint, if there is one."""
    return next((checkpoint for checkpoint in _newest_first(work) if not damage(checkpoint)), None)


def resumable_checkpoint(work: Path, base: Base, reporter: Reporter) -> Path | None:
    """Return the newest undamaged checkpoint that has all earlier evaluated adapters; None: start from the beginning.

    Unusable checkpoints are reported and removed, since the run writes them again.
    """
    chosen = None
    passed_over = []
    for checkpoint in _newest_first(work):
        if not (checkpoint / MANIFEST).exists():
            reporter.say(f"Ignoring {checkpoint.name}: it was cut off while it was written")
        elif faults := damage(checkpoint) or _missing_adapters(work, checkpoint, base):
            reporter.warn(f"Ignoring {checkpoint}, which is damaged: {'; '.join(faults)}")
        else:
            chosen = checkpoint
            break
        passed_over.append(checkpoint)
    if chosen is None and passed_over:
        reporter.warn("No complete checkpoint is left. Training starts from the beginning.")
    for checkpoint in passed_over:
        _remove(checkpoint)
    return chosen


def _missing_adapters(work: Path, checkpoint: Path, base: Base) -> list[str]:
    """Return faults of the evaluated adapters that a checkpoint needs, except its own, which is restored."""
    faults = []
    for evaluation in _needed(checkpoint):
        kept = adapter_folder(work, evaluation.step)
        lost = damage(kept)
        if lost and evaluation.step == step_of(checkpoint):
            _keep(checkpoint, kept, base)
        else:
            faults += [f"{kept.relative_to(work)}: {fault}" for fault in lost]
    return faults


def require_intact(folder: Path) -> None:
    """Check that a kept adapter is what training wrote."""
    if faults := damage(folder):
        raise UserError(
            f"The adapter on disk is damaged: {'; '.join(faults)}",
            where=str(folder),
            fix="Run the same command again: it resumes from before the damage.",
        )


@contextmanager
def working_folder(work: Path) -> Iterator[None]:
    """Create and lock a run's working folder; incomplete checkpoints are removed at the end.

    Only the main process does this.
    """
    if not distributed.is_main_process():
        yield
        return
    busy = UserError("Another process is training this adapter", where=str(work), fix="Wait for it, or stop it first.")
    with locked_folder(work, busy, _ASKED_S):
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
    """Remove a checkpoint, its manifest first: interrupted, the rest counts as incomplete, not as damaged."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
