"""Answers to many requests at once, in smaller batches when memory runs out.

It is the loop of evaluation, self-samples and dev scores.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.generation.decoding import PREFILL_TOKENS, Batch, Prefix
from tunewright.generation.kv_cache import PASS_TOKENS, SharedPrefix, shared_prefixes
from tunewright.generation.plain_decoding import new_batch
from tunewright.generation.requests import Completion, Request, Row
from tunewright.generation.text_stream import Decode

# Two prompts share a prefill if their padding is under this many tokens, or under half of the
# longer prompt. Below that a second pass over the weights costs more than the padding.
_CHEAP_PADDING = PASS_TOKENS
# New requests wait until a quarter of the batch is free: prefilling few prompts takes about as long as many.
_MIN_FREE_FRACTION = 4


def generate(
    model: Any,
    requests: Sequence[Request],
    *,
    stop_ids: Collection[int],
    pad_id: int,
    batch_size: int,
    decode: Decode | None = None,
    on_finished: Callable[[int, Completion], None] = lambda _index, _completion: None,
) -> list[Completion]:
    """Answer all requests, ``batch_size`` rows at a time, and return the completions in the requests' order.

    Prefixes that many prompts share are computed once (see :func:`shared_prefixes`). Each row has
    its own copy of their keys and values while it decodes. ``on_finished`` gets a request's index
    and completion as soon as it has finished, in any order.
    """
    mixed = len({request.adapter for request in requests}) > 1
    batch = new_batch(model, stop_ids=stop_ids, pad_id=pad_id, mixed=mixed, decode=decode)
    queue = _Queue(requests, batch)
    completions: dict[int, Completion] = {}
    rows: dict[int, Row] = {}
    with batch.attached():
        while queue or rows:
            room = batch_size - len(rows)
            # Each admission is a prefill pass during which decoding rows wait, so free rows are collected first.
            if room * _MIN_FREE_FRACTION >= batch_size:
                rows |= queue.admit(room)
            if batch.rows:
                for _, error in batch.step():
                    raise error
            for index in [index for index, row in rows.items() if row.finish]:
                completions[index] = rows.pop(index).completion
                on_finished(index, completions[index])
    return [completions[index] for index in range(len(requests))]


class _Queue:
    """Requests waiting to join a batch, grouped by shared prefix; a prefix is kept while one of its requests waits.

    The longest prompts come first. Neighbours then have similar lengths, and a shortage of memory
    shows at once, not after an hour.
    """

    def __init__(self, requests: Sequence[Request], batch: Batch) -> None:
        self._requests = requests
        self._batch = batch
        groups = _sharing(requests) if batch.shares_prefixes else [SharedPrefix(tuple(range(len(requests))), 0)]
        self._group = {index: group for group in groups for index in group.indices}
        waiting: list[int] = []
        for group in sorted(groups, key=lambda group: -max(map(self._length, group.indices))):
            waiting += sorted(group.indices, key=lambda index: -self._length(index))
        self._waiting = deque(waiting)
        self._prefix: tuple[SharedPrefix, Prefix] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def admit(self, room: int) -> dict[int, Row]:
        """Admit up to ``room`` requests; return their rows by index."""
        arrived = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        rows: dict[int, Row] = {}
        for group, members in groupby(arrived, key=self._group.__getitem__):
            indices = list(members)
            prefix = self._computed(group)
            # A prefix is computed already: only what follows it counts for padding.
            lengths = [self._length(index) - group.length for index in indices]
            for places in prefill_groups(lengths, self._batch.prefill_tokens):
                joining = [indices[place] for place in places]  # `places` index into `indices`
                admitted = self._batch.admit([self._requests[index] for index in joining], prefix)
                rows |= zip(joining, admitted, strict=True)
        return rows

    def _computed(self, group: SharedPrefix) -> Prefix | None:
        """Return the group's prefix; the previous group's is freed, since all of its requests have joined."""
        if group.length == 0:
            return None
        if self._prefix is None or self._prefix[0] is not group:
            first = self._requests[group.indices[0]]
            self._prefix = group, self._batch.prefix(first.prompt_ids[: group.length], first.adapter)
        return self._prefix[1]

    def _length(self, index: int) -> int:
        return len(self._requests[index].prompt_ids)


def _sharing(requests: Sequence[Request]) -> list[SharedPrefix]:
    """Group all requests by shared prefix and adapter; requests that share none form a group of length 0."""
    by_adapter: dict[str | None, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        by_adapter[request.adapter].append(index)
    groups = []
    for indices in by_adapter.values():
        for shared in shared_prefixes([requests[index].prompt_ids for index in indices]):
            groups.append(SharedPrefix(tuple(indices[place] for place in shared.indices), shared.length))
    grouped = {index for group in groups for index in group.indices}
    alone = tuple(index for index in range(len(requests)) if index not in grouped)
    return [*groups, SharedPrefix(alone, 0)] if alone else groups


def prefill_groups(lengths: Sequence[int], tokens: int = PREFILL_TOKENS) -> list[list[int]]:
    """Split prompts into groups worth prefilling together; return indices into ``lengths``, longest first.

    A group has at most ``tokens`` tokens, padding included, unless a single prompt is longer.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if groups:
            longest = lengths[groups[-1][0]]
            padding = longest - lengths[place]
            fits = (len(groups[-1]) + 1) * longest <= tokens
            if fits and padding <= max(_CHEAP_PADDING, longest // 2):
                groups[-1].append(place)
                continue
        groups.append([place])
    return groups


_HANDLE = 256 << 20
"""Free bytes below which a failure to create a cuBLAS or cuDNN handle is attributed to memory:
several of torch's workspaces (32 MiB).
"""


@dataclass
class BatchSize:
    """Number of rows that decode at once; halved when memory runs out, also for later lists of requests."""

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
        or "not enough memory" in text  # another name of the CPU's allocator
        # The driver's message, which torch's kernels and Triton pass on: "CUDA error: out of memory".
        or "out of memory" in text
        # cuBLAS, cuDNN and cuSOLVER allocate workspaces past torch's allocator.
        or re.search(r"_STATUS_\w*ALLOC\w*_FAILED", text) is not None
        # Failing to create a handle gives the same error on a full GPU and with a broken driver.
        or ("_STATUS_NOT_INITIALIZED" in text and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < _HANDLE)
    )
