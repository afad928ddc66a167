"""FSDP in two processes on one card, against one process: `tunewright train` on a small base on disk."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_cases.bases import TOY, shape_of, write_folder
from gpu_cases.command_line import make_project, run_command
from gpu_cases.reporting import Report
from tunewright.adapters.registry import Adapter, find_adapter

LAYERS = 4
BAR = 0.01
"""The losses may differ by this share at each step."""
HELD = 0.55
"""A process may hold this share of the weights: half, and the rows that pad a matrix to an even number."""
PROCESSES = 2
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES))
SCRIPT = str(Path(__file__).with_name("one_card.py"))


def run(report: Report, toy: bool) -> None:
    """Train the same rows in one process, then in two that hold half of the base each."""
    # Every gather goes over the processor: few layers of 2B width, and no large vocabulary.
    size = replace(shape_of("2b", toy, layers=2 if toy else LAYERS), vocabulary=TOY.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        base = write_folder(size, Path(folder) / "base")
        alone, alone_s = _trained(make_project(Path(folder) / "alone", base))
        together, together_s = _trained(
            make_project(Path(folder) / "together", base),
            program=(*TORCHRUN, SCRIPT),
            ACCELERATE_USE_FSDP="true",
            FSDP_VERSION="2",
        )
        files = [*base.glob("*.safetensors"), *together.folder.glob("*.safetensors")]
        whole = sum(file.stat().st_size for file in files)
        held = together.lineage["training"]["bytes_held"]
        one, two = ([row["loss"] for row in adapter.history if "loss" in row] for adapter in (alone, together))
    apart = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
    report(
        "two processes",
        apart <= BAR and len(held) == PROCESSES and max(held) <= HELD * whole,
        steps=len(one),
        largest_relative_difference=apart,
        whole_bytes=whole,
        most_held_bytes=max(held),
        alone_s=alone_s,
        together_s=together_s,
    )


def _trained(project: Path, **how: Any) -> tuple[Adapter, float]:
    """Return a project's adapter once it is trained, and the seconds."""
    began = time.monotonic()
    run_command(project, "train", **how)
    return find_adapter(project / "adapters"), time.monotonic() - began
