"""The largest micro-batch that `tunewright estimate-memory` says fits, and 10% more rows."""

from __future__ import annotations

import math

import torch

from gpu_cases.bases import shape_of
from gpu_cases.reporting import Report
from gpu_cases.training import RANK, same_length_rows, train_ours
from tunewright.config import TrainConfig
from tunewright.models.memory_estimate import PROCESS_RUNTIME, BatchShape
from tunewright.models.memory_plan import Memory, available_memory, plan

LENGTH, TRAINED = 2048, 32
TOY_LENGTH, TOY_TRAINED = 256, 8
TOY_MEMORY = Memory(PROCESS_RUNTIME + (48 << 20), card=False, source="a limit that nothing enforces")


def run(report: Report, toy: bool, *, beyond: bool) -> None:
    """Train two steps with that many rows; `beyond` has no bar, it shows the reserve of the estimate."""
    length, trained = (TOY_LENGTH, TOY_TRAINED) if toy else (LENGTH, TRAINED)
    shape = shape_of("8b", toy)
    memory = TOY_MEMORY if toy else available_memory(None)
    settings = TrainConfig(preset="all-linear", lora_r=RANK)
    planned = plan("8b", shape, settings, memory, rows=1, length=length, shared=0, answer=trained)
    fits = planned.used[False].largest[length]
    assert fits, f"no row of {length} tokens fits into {memory.source}"
    rows = math.ceil(1.1 * fits) if beyond else fits
    asked = same_length_rows(shape, BatchShape(rows, 0, length, trained))
    trained_run = train_ours(shape, asked, rows, 2, nf4=False)
    at_once = trained_run.micro_batch
    report(
        "one micro-batch",
        None if beyond else at_once == rows,
        memory_bytes=memory.bytes,
        largest_predicted=fits,
        rows=rows,
        length=length,
        rows_at_once=at_once,
        allocated_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        reserved_bytes=torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
    )
