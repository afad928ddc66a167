"""Reading and writing speed of this machine, which gives the cost of a call without a price list."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from tunewright.advisor.signals import Speed
from tunewright.chat import ChatFormat

_MOST_PREFILLED = 8192
"""Number of prompt tokens to time: a few seconds on a CPU."""
_WRITTEN = 16


def measured_speed(
    model: Any, chat: ChatFormat, prompts: Sequence[tuple[int, ...]], adapter: str | None, batch_size: int
) -> Speed:
    """Return tokens per second of one batch, decoded as in evaluation and serving, after a short warm-up.

    Args:
        model: the base, or a PeftModel with the adapter, in evaluation mode.
        chat: its chat format.
        prompts: prompts of the kind to be timed, at least one; the first ones that fill a batch are used.
        adapter: the adapter that answers; None: the base.
        batch_size: maximum number of rows.
    """
    from tunewright.generation.decoding import Batch, Request

    lengths = accumulate(map(len, prompts[:batch_size]))
    rows = max(sum(length <= _MOST_PREFILLED for length in lengths), 1)

    def batch() -> Batch:
        # Without stop ids, each row writes for as long as it is timed.
        return Batch(model, stop_ids=(), pad_id=chat.tokenizer.pad_token_id, mixed=False)

    batch().admit([Request(prompts[0], adapter, 2)])
    timed = batch()
    began = time.perf_counter()
    timed.admit([Request(prompt, adapter, _WRITTEN + 2) for prompt in prompts[:rows]])
    read = time.perf_counter()
    for _ in range(_WRITTEN):
        timed.step()
    written = time.perf_counter()
    return Speed(
        prefill=sum(map(len, prompts[:rows])) / (read - began),
        decode=rows * _WRITTEN / (written - read),
        rows=rows,
    )
