"""torch.compile where a run is long enough to pay for it: estimated from its first steps, tried, and said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter

FIRST_STEPS = 8
"""Steps that are timed before the decision, and again after it; the very first of either is left out."""

EXPECTED_GAIN = 0.04
"""Share of a step's time that compiling is taken to save on the processor, LoRA being fused already: cautious, since on
two cores benchmarks/compile_speed.py gave figures on both sides of it. What it really saves is measured once it is
tried. On a card nothing has been measured, and `auto` does not compile there."""

EXPECTED_COST_S = 90.0
"""What compiling is taken to cost on the processor, in seconds, where nothing of it is cached yet."""

_FILE = "compiled.json"

_NEVER: dict[str, int | None] = {"from_step": None, "until_step": None}


class Compile(TrainerCallback):
    """Compiles the feed-forward blocks and norms of every layer; attention, with a new layout each batch, stays.

    The decision depends on the clock, and compiled kernels round otherwise: so it is kept in the run's working folder
    before its first step, and a run that goes on from a checkpoint repeats it at the same step.

    Args:
        setting: the config's train.torch_compile.
        work: the run's working folder.
        reporter: hears what was decided and why.
    """

    def __init__(self, setting: Literal["auto", "on", "off"], work: Path, reporter: Reporter) -> None:
        self.setting = setting
        self.file = work / _FILE
        self.reporter = reporter
        self.ends: list[float] = []
        self.plain_s: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what was decided before a stop.

        Raises:
            UserError: train.torch_compile is on, and compiling is not possible here.
        """
        model = kwargs["model"]
        if self.setting == "on" and (lacking := missing(model.device.type)):
            raise UserError(
                f"torch.compile needs {' and '.join(lacking)}, which this machine does not have",
                where="train.torch_compile",
                fix="Install it, or leave train.torch_compile at auto.",
            )
        if self.setting == "on" and self.decided is None:
            write_json(self.file, {"from_step": 0, "until_step": None})
            self.reporter.say(
                "The feed-forward blocks are compiled (train.torch_compile: on); the first steps take longer."
            )
        if self.setting == "auto" and self.decided is None and model.device.type == "cuda":
            write_json(self.file, _NEVER)
            self.reporter.say(
                "Not compiled: what compiling saves on a card has not been measured. "
                "train.torch_compile: 'on' compiles."
            )
        self._apply(state.global_step, model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time the step; decide after the first ones, and look again after the first compiled ones."""
        self.ends.append(time.monotonic())
        if self.setting == "auto" and len(self.ends) == FIRST_STEPS + 1:
            if self.decided is None:
                self._decide(state, kwargs["model"].device.type)
            elif self.plain_s is not None:
                self._look_again(state)
        self._apply(state.global_step, kwargs["model"])

    @property
    def decided(self) -> dict[str, int | None] | None:
        """From which step on the run is compiled, and until which; None before the decision."""
        return decided_in(self.file.parent)

    def _seconds_a_step(self) -> float:
        times = [after - before for before, after in zip(self.ends[1:], self.ends[2:], strict=False)]
        return median(times)

    def _decide(self, state: Any, device: str) -> None:
        step_s = self._seconds_a_step()
        left_s = (state.max_steps - state.global_step) * step_s
        pays = EXPECTED_GAIN * left_s > EXPECTED_COST_S
        write_json(self.file, {"from_step": state.global_step if pays else None, "until_step": None})
        told = f"{left_s / 60:.0f} min of training are left, of which compiling would save about {EXPECTED_GAIN:.0%}"
        if pays and (lacking := missing(device)):
            write_json(self.file, _NEVER)
            self.reporter.warn(f"Not compiled, for want of {' and '.join(lacking)}: {told}.")
        elif pays:
            self.reporter.say(f"The feed-forward blocks are compiled from here on: {told}.")
            self.plain_s, self.ends = step_s, []
        else:
            self.reporter.say(f"Not compiled: {told}, less than the {EXPECTED_COST_S:.0f} s that it costs.")

    def _look_again(self, state: Any) -> None:
        assert self.plain_s is not None
        step_s, plain_s = self._seconds_a_step(), self.plain_s
        self.plain_s = None
        told = f"{plain_s:.2f} s a step before, {step_s:.2f} s now"
        if step_s < plain_s:
            self.reporter.say(f"Compiled: {told}.")
            return
        self.reporter.say(f"Compiling did not pay ({told}): it is off again.")
        write_json(self.file, {**(self.decided or {}), "until_step": state.global_step})

    def _apply(self, step: int, model: Any) -> None:
        """Compile, or stop using what was compiled, as decided for the step after ``step``.

        Raises:
            UserError: train.torch_compile is on, and compiling fails.
        """
        decided = self.decided or _NEVER
        first, last = decided["from_step"], decided["until_step"]
        wanted = first is not None and first <= step and (last is None or step < last)
        parts = list(_parts(model))
        if wanted and all(part._compiled_call_impl is None for part in parts):
            why = failure(model)
            if why is not None and self.setting == "on":
                raise UserError(
                    f"torch.compile fails here: {why}",
                    where="train.torch_compile",
                    fix="Leave train.torch_compile at auto.",
                )
            if why is not None:
                write_json(self.file, _NEVER)
                self.plain_s = None
                self.reporter.warn(f"Not compiled, since torch.compile fails here: {why}. Training continues without.")
                return
        for part in parts:
            is_compiled = part._compiled_call_impl is not None
            if wanted and not is_compiled:
                part.compile(dynamic=True)
            elif is_compiled and not wanted:
                part._compiled_call_impl = None


def decided_in(work: Path) -> dict[str, int | None] | None:
    """From which step on the run in ``work`` is compiled, and until which; None where nothing has been decided."""
    file = work / _FILE
    if not file.exists():
        return None
    decided: dict[str, int | None] = json.loads(file.read_text(encoding="utf-8"))
    return decided


def missing(device: str) -> list[str]:
    """Return what torch.compile needs on ``device`` ("cpu" or "cuda") and this machine does not have, in words."""
    if device == "cuda":
        names, compiler = (os.environ.get("CC") or "gcc", "clang"), "a C compiler (gcc)"
    else:
        names, compiler = (os.environ.get("CXX") or "g++", "clang++"), "a C++ compiler (g++)"
    found = {
        "Triton": device == "cpu" or find_spec("triton") is not None,
        compiler: any(shutil.which(name) for name in names),
        "Python's header files (Python.h)": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    }
    return [what for what, is_there in found.items() if not is_there]


def failure(model: Any) -> str | None:
    """Return why compiling fails here; None where the first layer's parts go forward and backward compiled.

    What is missing or does not work shows only in the first pass, and the backward pass is compiled in the middle of a
    step. So it is tried before a step, on a few tokens.
    """
    decoder = model.get_decoder()
    hidden = decoder.config.hidden_size
    devices = [model.device] if model.device.type == "cuda" else []
    parts = list(_parts(model))[:3]
    try:
        # As training runs them: what autocast does is compiled with them.
        bfloat16 = torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)
        with torch.random.fork_rng(devices), bfloat16:
            for part in parts:
                part.compile(dynamic=True)
                states = torch.ones(1, 8, hidden, device=model.device, dtype=model.dtype, requires_grad=True)
                torch.autograd.grad(part(states).sum(), states)  # [1, 8, hidden]
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        return str(error).strip().split("\n")[0]
    finally:
        for part in parts:
            part._compiled_call_impl = None
    return None


def _parts(model: Any) -> Iterator[torch.nn.Module]:
    """What is compiled of each layer."""
    for layer in model.get_decoder().layers:
        yield from (layer.input_layernorm, layer.post_attention_layernorm)
        # Which tokens an expert computes is known at run time only, and each size would be compiled.
        if not hasattr(layer.mlp, "experts"):
            yield layer.mlp
