"""What torch.compile costs and saves in training the bundled base on this machine.

    python benchmarks/compile_speed.py [--steps 12]

Trains on the demo's rows, compiled from the first step (train.torch_compile: on) and not at all, each in a process of
its own. Prints seconds a step (the median after the fourth), what compiling cost, the gain, and after how many minutes
of training it pays; training/compiling.py has its figures from here. Prints one line for people and one of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from train_speed import BATCH, TARGETS, Clock, build, settings, write_rows


def main() -> None:
    """Run both sides."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--side", choices=("on", "off"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(step_times(options.side, options.steps)))
        return
    times = {}
    for side in ("off", "on"):
        command = [sys.executable, __file__, "--steps", str(options.steps), "--side", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        times[side] = json.loads(done.stdout.splitlines()[-1])
    plain, compiled = (median(times[side][4:]) for side in ("off", "on"))
    cost = sum(times["on"]) - sum(times["off"]) + len(times["on"]) * (plain - compiled)
    gain = 1 - compiled / plain
    pays = f"pays after {cost / gain / 60:.0f} min of training" if gain > 0 else "never pays"
    print(
        f"plain {plain:.2f} s a step, compiled {compiled:.2f} s ({gain:+.1%}); compiling took {cost:.0f} s and {pays}"
    )
    print(json.dumps({"plain_s": plain, "compiled_s": compiled, "cost_s": cost, "gain": gain}))


def step_times(side: str, steps: int) -> list[float]:
    """Return the seconds of each step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback

    from tunewright.core.progress import LogReporter
    from tunewright.models.bases import resolve_base
    from tunewright.models.loading import load_model, load_tokenizer
    from tunewright.training.compiling import Compile

    base = resolve_base("bundled:smollm2-135m-instruct", None, Path(), LogReporter())
    model = load_model(base, "bfloat16", "none")
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=TARGETS)
    set_seed(0)
    with tempfile.TemporaryDirectory() as out:
        file = Path(out) / "rows.json"
        write_rows(file, "demo", steps * BATCH, 1)
        rows = Dataset.from_dict(json.loads(file.read_text())["train"])
        arguments = settings("tunewright", out, 0, 1, steps, "bfloat16")
        trainer = build("tunewright", model, load_tokenizer(base), rows, lora, arguments)
        trainer.remove_callback(PrinterCallback)
        clock = Clock(dict, 1)
        trainer.add_callback(Compile("on" if side == "on" else "off", Path(out), LogReporter()))
        trainer.add_callback(clock.callback())
        trainer.train()
    return clock.step_s


if __name__ == "__main__":
    main()
