"""How fast this machine reads and writes tokens: what a call costs where no price list says so."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from tunewright.advisor.signals import Speed
from tunewright.chat import ChatFormat

_MOST_PREFILLED = 8192
"""Prompt tokens that are timed: some seconds on a processor."""
_WRITTEN = 16


def measured_speed(
    model: Any, chat: ChatFormat, prompts: Sequence[tuple[int, ...]], adapter: str | None, batch_size: int
) -> Speed:
    """Tokens per second of one batch as evaluation and serving decode it, after a short pass that warms it up.

    Args:
        model: the base, or a PeftModel with the adapter on it, in evaluation mode.
        chat: its format.
        prompts: of the kind to be timed, at least one; of many, the first that make a batch.
        adapter: answers; None: the base.
        batch_size: the most rows.
    """
    from tunewright.generation.decoding import Batch, Request

    lengths = accumulate(map(len, prompts[:batch_size]))
    rows = max(sum(length <= _MOST_PREFILLED for length in lengths), 1)

    def batch() -> Batch:
        # No token ends an answer: each row writes as long as it is timed.
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
