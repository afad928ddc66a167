"""Training steps of 8B shape in NF4 on the processor: their peak memory next to the estimate.

    python benchmarks/layerwise_8b.py [--toy] [--out FILE]

The base has random weights and is quantized layer by layer, so it takes about 6 GB instead of 16. It then trains for
three steps as `tunewright train` does, with LoRA on every linear layer. Measured is the largest resident set over
what the process held before the base was built, when a toy base had taken the same steps; predicted is the sum of all
parts of `tunewright estimate-memory` but the runtime's. Takes about 8 GiB and some minutes on two cores. Writes JSON
to benchmarks/results/layerwise_8b.json (--toy: nowhere without --out).
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_cases.bases import SHAPES, TOY, base_in_memory, build, tokenizer
from gpu_cases.training import RANK, TARGETS, Clock, TimedRun, config_of, same_length_rows

from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.models import quiet_transformers
from tunewright.models.families import Shape
from tunewright.models.memory_estimate import BatchShape, TrainingSetup, estimate

RESULTS = Path(__file__).with_name("results") / "layerwise_8b.json"
STEPS = 3
LOAD = BatchShape(rows=2, shared=32, own=16, trained=8)


@dataclass
class StepClock(Clock):
    """The seconds of each step on the processor; a profile of a step would add to the memory."""

    seconds: list[float] = field(default_factory=list)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start the step's clock."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Note the step's seconds."""
        self.seconds.append(time.perf_counter() - self.began)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size, in seconds")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args()
    _train(TOY)  # the libraries' own memory, before anything is measured
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    measured = _train(TOY if options.toy else SHAPES["8b"])
    peak = _resident("VmHWM") - before
    needed = estimate(TOY if options.toy else SHAPES["8b"], TrainingSetup(TARGETS, RANK, nf4=True), LOAD)
    document = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "shape": "toy" if options.toy else "8b",
        "rows": LOAD.rows,
        "length": LOAD.shared + LOAD.own,
        "steps": STEPS,
        "peak_bytes": peak,
        "predicted_bytes": needed.total - needed.runtime,
        **measured,
    }
    for name, value in document.items():
        print(f"{name:20} {value:,}" if isinstance(value, int) else f"{name:20} {value}")
    if options.out or not options.toy:
        write_json(options.out or RESULTS, document)


def _train(shape: Shape) -> dict[str, Any]:
    """Train a base of this shape; return losses, gradient norms and seconds.

    Raises:
        AssertionError: a loss or gradient norm is not finite, or a gradient is zero.
    """
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        model = build(shape, nf4=True, place="cpu")
        built = time.monotonic() - began
        rows = same_length_rows(shape, LOAD)
        config = config_of(LOAD.rows, STEPS, nf4=True)
        clock = StepClock(STEPS)
        run = TimedRun(config, base_in_memory(shape, Path(folder)), Path(folder), LogReporter(), clock=clock)
        history, _ = run.fit(model, tokenizer(), rows, rows[:1], None)
    steps = [row for row in history if "loss" in row]
    losses, norms = [row["loss"] for row in steps], [row["grad_norm"] for row in steps]
    assert len(steps) == STEPS
    assert all(0 < number < float("inf") for number in (*losses, *norms)), (losses, norms)
    return {"losses": losses, "gradient_norms": norms, "build_s": round(built, 1), "step_s": clock.seconds}


def _resident(field: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def machine() -> str:
    """Return the processor's name, its cores and the machine's memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    name = names[0] if names else platform.processor()
    return f"{name}, {len(names)} cores, {int(total.split()[1]) / 2**20:.0f} GiB"


if __name__ == "__main__":
    main()
