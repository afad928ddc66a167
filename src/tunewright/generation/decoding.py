"""The one decoding loop: evaluation and serving both answer with it.

A batch is *continuous*: requests join it while others are half way through (Yu et al. 2022, Orca), and each row has
an adapter of its own, or none. Rows are padded on the left, so that the newest token of every row stands in the last
column and one forward pass moves all of them on::

    row 0  base     . . . a b c d|e
    row 1  courts   . f g h i j k|l      time runs to the right; '.' is padding that no row attends to
    row 2  courts   m n o p q r s|t

Positions count from each row's first real token, and attention depends on them only, so padding changes nothing but
the order in which numbers are added up: equal in float32 except where two tokens tie to the last digits; in bfloat16
a near tie can fall the other way.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunewright.generation.batched_lora import Lora
from tunewright.generation.constraints import only_allowed
from tunewright.generation.kv_cache import begun, merge, new_cache, select
from tunewright.generation.lora_dispatch import LoraDispatch
from tunewright.generation.prefixes import PASS_TOKENS, Shared, shared_prefixes
from tunewright.generation.requests import Completion, Finish, Request, Row
from tunewright.generation.sampling import next_tokens
from tunewright.generation.text_stream import Decode

__all__ = ["Batch", "Completion", "Finish", "PrefillState", "Prefix", "Request", "Row", "generate", "prefill_groups"]

# Tokens of one prefill, padding included: it bounds the memory that newcomers need for their activations.
PREFILL_TOKENS = 8192
# Two prompts share a prefill if the padding between them is under this many tokens, or under half of the longer one:
# below that a second pass over the weights costs more than the padding does.
_CHEAP_PADDING = PASS_TOKENS
# Newcomers wait until a quarter of the batch is free: reading few prompts takes about as long as reading many.
_ENOUGH_ROOM = 4


@dataclass(frozen=True)
class Prefix:
    """What several prompts begin with, and its keys and values, computed once."""

    ids: tuple[int, ...]
    adapter: str | None
    cache: Cache
    """Of one row."""

    def begins(self, request: Request) -> bool:
        """Return whether the request's prompt begins so, and goes on."""
        length = len(self.ids)
        return (request.adapter, request.prompt_ids[:length]) == (self.adapter, self.ids) and len(
            request.prompt_ids
        ) > length


class PrefillState:
    """Newcomers to a batch whose prompts are being read: see :meth:`Batch.begin`.

    Args:
        rows: they have no token yet.
        unread: their prompts, padded on the left, without what the cache holds [rows, columns].
        cache: what has been read.
    """

    def __init__(self, rows: list[Row], unread: Tensor, cache: Cache) -> None:
        self.rows = rows
        self.unread = unread
        self.cache = cache

    @property
    def left(self) -> int:
        """Tokens that are to be read yet, padding included."""
        return self.unread.numel()


class Batch:
    """The rows that decode together, and their key/value cache.

    The caller holds the :class:`Row` objects and reads new tokens off them; a row that finishes leaves by itself.
    Not thread-safe: one thread owns a batch and its model.

    Args:
        model: a causal language model of transformers, or a PeftModel over one with any number of LoRA adapters;
            in eval mode, adapters enabled, none merged.
        stop_ids: tokens that end an answer; they are not part of it.
        pad_id: any token id; padding is never attended to.
        mixed: rows may ask for different adapters. If not, any kind of LoRA will do.
        decode: tokens to text, needed where requests have stop strings.

    Raises:
        UserError: rows are mixed, and an adapter is of a kind that cannot share a batch.
    """

    def __init__(
        self, model: Any, *, stop_ids: Collection[int], pad_id: int, mixed: bool = True, decode: Decode | None = None
    ) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._adapters = LoraDispatch(model, mixed=mixed)
        self._stop_ids = frozenset(stop_ids)
        self._pad_id = pad_id
        self._decode = decode
        self._config = model.config.get_text_config()
        self._cache = new_cache()

    def attached(self) -> AbstractContextManager[None]:
        """Open around many passes, so that adapters are attached once: see :class:`LoraDispatch`."""
        return self._adapters.attached()

    def put(self, adapter: str, loras: Mapping[str, Lora]) -> None:
        """Have one more adapter, by the names of the layers that it touches; the model has to have none itself."""
        self._adapters.put(adapter, loras)

    def drop(self, adapter: str) -> None:
        """Forget an adapter that no row under way needs; nothing happens if it is not (or no longer) here."""
        assert all(row.request.adapter != adapter for row in self.rows)
        self._adapters.drop(adapter)

    @torch.inference_mode()
    def prefix(self, ids: Sequence[int], adapter: str | None) -> Prefix:
        """Compute what prompts begin with, for :meth:`admit` to begin them from.

        Raises:
            ValueError: the model has no such adapter.
        """
        self._adapters.require([adapter])
        cache = new_cache()
        self._forward(torch.tensor([ids]), [0], cache, [adapter])
        return Prefix(tuple(ids), adapter, cache)

    def admit(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Row]:
        """Read the newcomers' prompts in one pass, give each its first token, and let those that go on join.

        If this raises (out of memory, say), the rows that were here before are untouched.

        Raises:
            ValueError: the model has no such adapter.
        """
        reading = self.begin(requests, prefix)
        self.read(reading)
        return reading.rows

    def begin(self, requests: Sequence[Request], prefix: Prefix | None = None) -> PrefillState:
        """Newcomers together, of whose prompts nothing is read before :meth:`read`.

        Prompts of unlike length waste work on padding: see :func:`prefill_groups`. With a ``prefix``, which each of
        them has to begin with and go beyond, only the columns after it are run::

            prefix a b c          . a b|c f g        what is left of the bar is copied from the prefix, each row
            prompts a b c f g     a b c|h i j        moved to the right by its padding; the right is run
                    a b c h i j
        """
        longest = max(len(request.prompt_ids) for request in requests)
        ids = torch.full((len(requests), longest), self._pad_id)
        for index, request in enumerate(requests):
            ids[index, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        cache = new_cache()
        if prefix is not None:
            assert all(prefix.begins(request) for request in requests)
            cache = begun(prefix.cache, [longest - len(request.prompt_ids) for request in requests])
            ids = ids[:, len(prefix.ids) :]
        return PrefillState([Row(request, self._decode) for request in requests], ids, cache)

    @torch.inference_mode()
    def read(self, reading: PrefillState, tokens: int | None = None) -> bool:
        """Read on in one pass, about so many tokens (None: all that is left).

        If this raises (out of memory, say), the rows that decode are untouched, and the reading cannot go on.

        Returns:
            Whether all is read. Then each row has its first token, and those that have not finished on it have joined.

        Raises:
            ValueError: the model has no such adapter.
        """
        adapters = [row.request.adapter for row in reading.rows]
        self._adapters.require(adapters)
        columns = reading.unread.shape[1] if tokens is None else max(1, tokens // len(reading.rows))
        piece, reading.unread = reading.unread[:, :columns], reading.unread[:, columns:]
        if reading.left:
            longest = reading.cache.get_seq_length() + piece.shape[1] + reading.unread.shape[1]
            self._forward(piece, [longest - _length(row) for row in reading.rows], reading.cache, adapters)
            return False
        self._advance(reading.rows, piece, reading.cache)
        going_on = [index for index, row in enumerate(reading.rows) if row.finish is None]
        if going_on:
            joining = [reading.rows[index] for index in going_on]
            select(reading.cache, going_on, _cached(joining))
            self._cache = merge(self._cache, reading.cache) if self.rows else reading.cache
            self.rows += joining
        return True

    @torch.inference_mode()
    def step(self) -> None:
        """Decode one token for every row, in one forward pass; the batch must not be empty."""
        self._advance(self.rows, torch.tensor([[row.ids[-1]] for row in self.rows]), self._cache)
        self._keep([index for index, row in enumerate(self.rows) if row.finish is None])

    @torch.inference_mode()
    def cancel(self, row: Row) -> None:
        """Take a row out before it has finished; nothing happens if it is not (or no longer) here."""
        self._keep([index for index, other in enumerate(self.rows) if other is not row])

    def _advance(self, rows: list[Row], ids: Tensor, cache: Cache) -> None:
        """Run new columns of tokens [rows, time] through the model and give each row its next token."""
        total = cache.get_seq_length() + ids.shape[1]
        first = [total - _length(row) for row in rows]
        logits = self._forward(ids, first, cache, [row.request.adapter for row in rows])
        logits = only_allowed(logits, [row.guide for row in rows])
        for row, token in zip(rows, next_tokens(logits, rows), strict=True):
            row.take(token, self._stop_ids)

    def _forward(self, ids: Tensor, first: list[int], cache: Cache, adapters: Sequence[str | None]) -> Tensor:
        """The next token's logits [rows, vocabulary] after new columns of tokens [rows, time], which go into the cache.

        ``first`` is the column where each row's text begins. Both go to the device in one copy; all else is made there.
        """
        device = self._model.device
        new = ids.shape[1]
        told = torch.cat([torch.tensor(first)[:, None], ids], dim=1).to(device, non_blocking=True)
        begins, columns = told[:, :1], torch.arange(cache.get_seq_length() + new, device=device)
        arguments = {
            "input_ids": told[:, 1:],
            "attention_mask": (columns >= begins).long() if any(first) else None,
            "position_ids": (columns[-new:] - begins).clamp(min=0),
            "cache": cache,
            "use_cache": True,
            # Not the number 1, a view into all columns: torch would multiply it by a copy of the head for each row.
            "logits_to_keep": 0 if new == 1 else torch.arange(new - 1, new, device=device),
        }
        with self._adapters.answering(adapters), self._masking():
            logits: Tensor = self._model(**arguments).logits[:, -1]
        return logits

    @contextmanager
    def _masking(self) -> Iterator[None]:
        """Have masks made by :func:`_mask` for a pass."""
        before = self._config._attn_implementation
        self._config._attn_implementation = _ATTENTION
        try:
            yield
        finally:
            self._config._attn_implementation = before

    def _keep(self, indices: list[int]) -> None:
        if len(indices) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in indices]
        if self.rows:
            select(self._cache, indices, _cached(self.rows))
        else:
            self._cache = new_cache()


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
    """Answer all requests, ``batch_size`` rows at a time, and give the completions in the requests' order.

    What many prompts begin with is computed once for all of them (see :func:`shared_prefixes`); each row has a copy of
    its keys and values while it decodes.

    Args:
        model, stop_ids, pad_id, decode: see :class:`Batch`.
        on_finished: told a request's index and its completion as soon as it is there (not in order).

    Raises:
        UserError: the requests are for different adapters, and one is of a kind that cannot share a batch.
    """
    mixed = len({request.adapter for request in requests}) > 1
    batch = Batch(model, stop_ids=stop_ids, pad_id=pad_id, mixed=mixed, decode=decode)
    queue = _Queue(requests, batch)
    completions: dict[int, Completion] = {}
    rows: dict[int, Row] = {}
    with batch.attached():
        while queue or rows:
            room = batch_size - len(rows)
            if room * _ENOUGH_ROOM >= batch_size:
                rows |= queue.admit(room)
            if batch.rows:
                batch.step()
            for index in [index for index, row in rows.items() if row.finish]:
                completions[index] = rows.pop(index).completion
                on_finished(index, completions[index])
    return [completions[index] for index in range(len(requests))]


class _Queue:
    """Requests that wait to join a batch, those with a prefix in common together: it is held while one of them waits.

    The longest prompts first: neighbours are then of like length, and if memory is short it shows at once, not after
    an hour.
    """

    def __init__(self, requests: Sequence[Request], batch: Batch) -> None:
        self._requests = requests
        self._batch = batch
        groups = _sharing(requests)
        self._group = {index: group for group in groups for index in group.places}
        waiting: list[int] = []
        for group in sorted(groups, key=lambda group: -max(map(self._length, group.places))):
            waiting += sorted(group.places, key=lambda index: -self._length(index))
        self._waiting = deque(waiting)
        self._prefix: tuple[Shared, Prefix] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def admit(self, room: int) -> dict[int, Row]:
        """Let as many join as there is room for: each one's index, and its row."""
        arrived = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        rows: dict[int, Row] = {}
        for group, members in groupby(arrived, key=self._group.__getitem__):
            indices = list(members)
            prefix = self._computed(group)
            for places in prefill_groups([self._length(index) - group.length for index in indices]):
                joining = [indices[place] for place in places]
                admitted = self._batch.admit([self._requests[index] for index in joining], prefix)
                rows |= zip(joining, admitted, strict=True)
        return rows

    def _computed(self, group: Shared) -> Prefix | None:
        """Return the group's prefix; the one before it is let go, as its requests have all joined."""
        if group.length == 0:
            return None
        if self._prefix is None or self._prefix[0] is not group:
            first = self._requests[group.places[0]]
            self._prefix = group, self._batch.prefix(first.prompt_ids[: group.length], first.adapter)
        return self._prefix[1]

    def _length(self, index: int) -> int:
        return len(self._requests[index].prompt_ids)


def _sharing(requests: Sequence[Request]) -> list[Shared]:
    """All requests in groups that share a prefix and an adapter, those that share none in a group of length 0."""
    by_adapter: dict[str | None, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        by_adapter[request.adapter].append(index)
    groups = []
    for indices in by_adapter.values():
        for shared in shared_prefixes([requests[index].prompt_ids for index in indices]):
            groups.append(Shared(tuple(indices[place] for place in shared.places), shared.length))
    grouped = {index for group in groups for index in group.places}
    alone = tuple(index for index in range(len(requests)) if index not in grouped)
    return [*groups, Shared(alone, 0)] if alone else groups


def prefill_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Split prompts of these lengths into groups worth prefilling together: places in ``lengths``, longest first."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if groups:
            longest = lengths[groups[-1][0]]
            padding = longest - lengths[place]
            fits = (len(groups[-1]) + 1) * longest <= PREFILL_TOKENS
            if fits and padding <= max(_CHEAP_PADDING, longest // 2):
                groups[-1].append(place)
                continue
        groups.append([place])
    return groups


def _mask(*, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
    """SDPA's mask as transformers makes it, without looking at where the padding is.

    To leave out a mask that hides nothing, transformers reads the padding back from the device, and the host waits.
    Here no ``attention_mask`` says that there is no padding, so only then a mask is left out.
    """
    skip = allow_is_causal_skip and attention_mask is None
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=skip, **kwargs)


_ATTENTION = "tunewright_decoding"
"""SDPA, with masks that nobody reads back."""
AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(_ATTENTION, _mask)


def _length(row: Row) -> int:
    """Tokens of a row that the model has seen once the pass under way is over."""
    return len(row.request.prompt_ids) + len(row.ids)


def _cached(rows: list[Row]) -> int:
    """Columns of the cache that these rows need: the newest token of each has not been through the model yet."""
    return max(_length(row) for row in rows) - 1
