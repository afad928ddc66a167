"""Work that may run out of memory: answers of evaluation, dev rows and self-samples, in smaller batches then."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.generation.generate import generate
from tunewright.generation.requests import Completion, Request

_HANDLE = 256 << 20
"""Free bytes below which a failure to create a cuBLAS or cuDNN handle is put down to memory: several of torch's
workspaces (32 MiB).
"""


@dataclass
class BatchSize:
    """Number of rows that decode at once; halved when memory runs out, for later lists of requests too."""

    rows: int


def generate_halving(
    model: Any,
    requests: Sequence[Request],
    size: BatchSize,
    reporter: Reporter,
    *,
    on_finished: Callable[[int, Completion], None] = lambda _index, _completion: None,
    repeatable: bool = True,
    **options: Any,
) -> list[Completion]:
    """Answer all requests by :func:`generate`; when memory runs out, halve the batch for the remaining ones.

    ``repeatable`` is False if other processes take part in each pass, so that none can be repeated.

    Raises:
        UserError: memory does not suffice for a single answer, or passes cannot be repeated.
    """
    done: dict[int, Completion] = {}
    while True:
        left = [index for index in range(len(requests)) if index not in done]

        def keep(place: int, completion: Completion, left: list[int] = left) -> None:
            done[left[place]] = completion
            on_finished(left[place], completion)

        asked = [requests[index] for index in left]
        if in_memory(partial(generate, model, asked, batch_size=size.rows, on_finished=keep, **options))[0]:
            return [done[index] for index in range(len(requests))]
        if size.rows == 1 or not repeatable:
            answers = "a single answer" if size.rows == 1 else f"{size.rows} answers at once"
            raise UserError(
                f"Not enough memory to decode {answers}",
                where="evaluate.batch_size",
                fix="Free memory, lower evaluate.batch_size or evaluate.max_new_tokens, shorten the prompt, or set "
                "train.quantization: nf4.",
            )
        size.rows //= 2
        reporter.warn(f"Memory ran out with {2 * size.rows} rows at once. Decoding continues with {size.rows}.")


def in_memory(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Run ``work``; return whether memory sufficed, and its result.

    The exception is dropped before this returns, because its traceback would keep the tensors that filled the memory.
    """
    try:
        return True, work()
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
    clear_device_cache(garbage_collection=True)
    return False, None


def _out_of_memory(error: Exception) -> bool:
    """Return whether an error reports a failed allocation, in any form of torch's backends."""
    text = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or should_reduce_batch_size(error)
        or "not enough memory" in text  # the CPU's allocator, by its other name
        # The driver's message, which torch's kernels and Triton pass on: "CUDA error: out of memory".
        or "out of memory" in text
        # cuBLAS, cuDNN and cuSOLVER allocate workspaces past torch's allocator.
        or re.search(r"_STATUS_\w*ALLOC\w*_FAILED", text) is not None
        # Failing to create a handle gives the same error on a full GPU and with a broken driver.
        or ("_STATUS_NOT_INITIALIZED" in text and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < _HANDLE)
    )
