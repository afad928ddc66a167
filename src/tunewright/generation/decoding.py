"""Decoding in a batch that requests join and leave at any time; evaluation and serving share it.

Batching is *continuous*: requests join while other rows are half way through (Yu et al. 2022, Orca), and each row has
its own adapter, or none. Rows are padded on the left, so the newest token of every row is in the last column and one
forward pass advances all of them::

    row 0  base     . . . a b c d|e
    row 1  courts   . f g h i j k|l      time runs to the right; '.' is padding that no row attends to
    row 2  courts   m n o p q r s|t

Positions count from each row's first real token, and attention depends on them only. So padding
changes nothing but the order of floating-point sums. In float32 answers are equal except where two
tokens tie to the last digits; in bfloat16 a near tie can go the other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import sdpa_mask

from tunewright.generation.attention import attention_forward
from tunewright.generation.batched_lora import Lora
from tunewright.generation.kv_cache import (
    copy_rows,
    from_prefix,
    merge,
    new_cache,
    select,
    truncate,
)
from tunewright.generation.lora_dispatch import LoraDispatch
from tunewright.generation.requests import Request, Row
from tunewright.generation.sampling import adjust_logits, mask_logits, next_tokens, token_logprobs
from tunewright.generation.text_stream import Decode

# Tokens of one prefill, padding included: it bounds the memory that new rows need for their activations.
PREFILL_TOKENS = 8192
# On a processor the activations of fewer tokens stay in its caches (docs/benchmarks/evaluation.md).
_PREFILL_TOKENS_CPU = 2048

# Tokens of a long prompt in one pass. Decoding rows wait for their next token meanwhile, longer with larger chunks.
# A GPU's time for 256 tokens is mostly that of its launches, so a larger chunk there costs little more.
PREFILL_CHUNK = 1024
PREFILL_CHUNK_CPU = 256


@dataclass(frozen=True)
class Prefix:
    """A common beginning of several prompts with its keys and values, computed once."""

    ids: tuple[int, ...]
    adapter: str | None
    cache: Cache
    """Keys and values of one row."""

    def begins(self, request: Request) -> bool:
        """Return whether the request's prompt starts with this prefix and is longer."""
        length = len(self.ids)
        return (request.adapter, request.prompt_ids[:length]) == (self.adapter, self.ids) and len(
            request.prompt_ids
        ) > length


class PrefillState:
    """New rows whose prompts are partly prefilled: see :meth:`Batch.start_prefill`.

    ``pending`` [rows, columns] are the prompts, padded on the left, without the part in the cache.
    """

    def __init__(self, rows: list[Row], pending: Tensor, cache: Cache) -> None:
        self.rows = rows
        self.pending = pending
        self.cache = cache

    @property
    def remaining_tokens(self) -> int:
        """The tokens still to prefill, padding included."""
        return self.pending.numel()


class Batch:
    """The rows that decode together, and their key/value cache.

    The caller keeps the :class:`Row` objects and reads new tokens from them; a finished row leaves
    by itself. Not thread-safe: one thread owns a batch and its model. The model is in eval mode,
    its adapters enabled and none merged. If rows are not ``mixed``, all have one adapter, of any
    kind of LoRA. ``decode`` is needed where requests have stop strings.
    """

    shares_prefixes = True
    """True if :meth:`prefix` can compute a common beginning of prompts for :meth:`admit`."""

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

    @property
    def prefill_tokens(self) -> int:
        """Tokens to prefill in one pass, padding included, where the caller may choose."""
        return _PREFILL_TOKENS_CPU if self._model.device.type == "cpu" else PREFILL_TOKENS

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a long prompt to prefill between two steps of the decoding rows."""
        return PREFILL_CHUNK_CPU if self._model.device.type == "cpu" else PREFILL_CHUNK

    def attached(self) -> AbstractContextManager[None]:
        """Keep adapters attached over many passes: see :meth:`LoraDispatch.attached`."""
        return self._adapters.attached()

    def add_adapter(self, adapter: str, loras: Mapping[str, Lora]) -> None:
        """Add an adapter by its layers' names and weights; the model must not be a PeftModel."""
        self._adapters.add(adapter, loras)

    def remove_adapter(self, adapter: str) -> None:
        """Remove an adapter that no active row needs; an unknown name is ignored."""
        assert all(row.request.adapter != adapter for row in self.rows)
        self._adapters.remove(adapter)

    @torch.inference_mode()
    def prefix(self, ids: Sequence[int], adapter: str | None) -> Prefix:
        """Compute a common beginning of prompts once, for :meth:`admit` to start from."""
        self._adapters.require([adapter])
        cache = new_cache()
        self._forward(torch.tensor([ids]), [0], cache, [adapter])
        return Prefix(tuple(ids), adapter, cache)

    def admit(self, requests: Sequence[Request], prefix: Prefix | None = None) -> list[Row]:
        """Prefill new requests in one pass, give each its first token, and let unfinished rows join the batch.

        If this raises (out of memory, say), the rows that were in the batch before are untouched.
        """
        state = self.start_prefill(requests, prefix)
        self.prefill(state)
        return state.rows

    def start_prefill(self, requests: Sequence[Request], prefix: Prefix | None = None) -> PrefillState:
        """Return the state of a prefill that :meth:`prefill` advances in chunks.

        Prompts of different lengths waste work on padding: see :func:`prefill_groups`. With a ``prefix``, which every
        prompt must begin with and be longer than, only the columns after it are computed::

            prefix a b c          . a b|c f g        left of the bar: copied from the prefix, each row shifted right
            prompts a b c f g     a b c|h i j        by its padding; right of the bar: computed
                    a b c h i j
        """
        rows = [Row(request, self._decode) for request in requests]
        ids, cache = self._texts(rows), new_cache()
        if prefix is not None:
            longest = ids.shape[1]
            assert all(prefix.begins(request) for request in requests)
            cache = from_prefix(prefix.cache, [longest - len(request.prompt_ids) for request in requests])
            ids = ids[:, len(prefix.ids) :]
        return PrefillState(rows, ids, cache)

    def _texts(self, rows: Sequence[Row]) -> Tensor:
        """Return the rows' prompts and answers so far, padded on the left [rows, longest]."""
        texts = [(*row.request.prompt_ids, *row.ids) for row in rows]
        ids = torch.full((len(rows), max(map(len, texts))), self._pad_id)
        for index, text in enumerate(texts):
            ids[index, ids.shape[1] - len(text) :] = torch.tensor(text)
        return ids

    @torch.inference_mode()
    def prefill(self, state: PrefillState, tokens: int | None = None) -> bool:
        """Prefill about ``tokens`` more tokens in one pass (None: all remaining ones).

        If this raises (out of memory, say), the decoding rows are untouched, and this prefill
        cannot be continued. Return whether it is complete: then each row has its first token, and
        the unfinished rows have joined.
        """
        adapters = [row.request.adapter for row in state.rows]
        self._adapters.require(adapters)
        # A pass costs rows times columns, so the token budget is divided by the rows.
        columns = state.pending.shape[1] if tokens is None else max(1, tokens // len(state.rows))
        chunk, state.pending = state.pending[:, :columns], state.pending[:, columns:]
        if state.remaining_tokens:
            # Text ends at the last column of the whole prompt, so padding depends on its length, not on this chunk's.
            longest = state.cache.get_seq_length() + chunk.shape[1] + state.pending.shape[1]
            self._forward(chunk, [longest - row_length(row) for row in state.rows], state.cache, adapters)
            return False
        for error in self._take(state.rows, self._next_logits(state.rows, chunk, state.cache)).values():
            raise error
        unfinished = [index for index, row in enumerate(state.rows) if row.finish is None]
        if unfinished:
            joining = [state.rows[index] for index in unfinished]
            select(state.cache, unfinished, cached_columns(joining))
            # merge() makes a new cache, so running out of memory there leaves the batch as it was.
            self._cache = merge(self._cache, state.cache) if self.rows else state.cache
            self.rows += joining
        return True

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, Exception]]:
        """Decode one token for every row in one forward pass; the batch must not be empty.

        Return the rows that cannot be computed, each with its error: they have left the batch, and
        every other row has its token. It raises if the model cannot compute anything.
        """
        failures: list[tuple[Row, Exception]] = []
        while self.rows:
            columns = self._cache.get_seq_length()
            try:
                # All rows end at the same column of the cache, regardless of their lengths: padding is on the left.
                logits = self._next_logits(self.rows, newest(self.rows), self._cache)
            except Exception as error:  # noqa: BLE001 - any failure is narrowed down to its rows
                truncate(self._cache, columns)
                failing = self._isolate_failures(
                    self.rows,
                    error,
                    lambda rows, kept: self._next_logits(rows, newest(rows), copy_rows(self._cache, kept)),
                )
                failures += [(self.rows[index], each) for index, each in failing.items()]
                self._keep([index for index in range(len(self.rows)) if index not in failing])
                continue
            failing = self._take(self.rows, logits)
            failures += [(self.rows[index], each) for index, each in failing.items()]
            self._keep([i for i, row in enumerate(self.rows) if row.finish is None and i not in failing])
            break
        return failures

    def _new_cache(self) -> Cache:
        return new_cache()

    def _isolate_failures(
        self, failed: list[Row], error: Exception, compute: Callable[[list[Row], list[int]], object]
    ) -> dict[int, Exception]:
        """Return the indices of the rows that make a pass fail, with their errors.

        ``compute`` gets some of the failed rows with their indices, and must not change the batch. Halves are tried
        until single rows are left. If each half can be computed and all rows together cannot (out of memory, say),
        the newest row leaves. It raises if no row can be computed, and neither can a single token of the base.
        """
        failing: dict[int, Exception] = {}
        untried = [list(range(len(failed)))]
        while untried:
            indices = untried.pop()
            try:
                if len(indices) < len(failed):
                    compute([failed[index] for index in indices], indices)
                    continue
            except Exception as own:  # noqa: BLE001 - returned
                error = own
            if len(indices) == 1:
                failing[indices[0]] = error
            else:
                untried += [indices[: len(indices) // 2], indices[len(indices) // 2 :]]
        if len(failing) == len(failed):
            self._forward(torch.tensor([[self._pad_id]]), [0], self._new_cache(), [None])
        return failing or {min(range(len(failed)), key=lambda index: len(failed[index].ids)): error}

    @torch.inference_mode()
    def cancel(self, row: Row) -> None:
        """Remove a row before it has finished; a row that is not in the batch is ignored."""
        self._keep([index for index, other in enumerate(self.rows) if other is not row])

    def _next_logits(self, rows: list[Row], ids: Tensor, cache: Cache) -> Tensor:
        """Return the logits [rows, vocabulary] after new columns of the rows' tokens [rows, time]."""
        total = cache.get_seq_length() + ids.shape[1]
        first = [total - row_length(row) for row in rows]  # padding columns of each row
        return self._forward(ids, first, cache, [row.request.adapter for row in rows])

    def _take(self, rows: list[Row], logits: Tensor) -> dict[int, Exception]:
        """Give each row its next token, and return the rows that cannot get one, with their errors."""
        failing: dict[int, Exception] = {}
        masks: list[bytes | None] = [None] * len(rows)
        for index, row in enumerate(rows):
            try:
                masks[index] = row.guide.allowed() if row.guide else None
            except Exception as error:  # noqa: BLE001 - returned
                failing[index] = error
        tokens = next_tokens(mask_logits(adjust_logits(logits, rows), masks), rows)
        logprobs = token_logprobs(logits, rows, tokens)
        for index, token in enumerate(tokens):
            if index in failing:
                continue
            try:
                if token >= logits.shape[-1]:
                    raise ValueError("The model's logits are not finite, so there is no next token.")
                rows[index].take(token, self._stop_ids, logprobs[index])
            except Exception as error:  # noqa: BLE001 - returned
                failing[index] = error
        return failing

    def _forward(self, ids: Tensor, first: list[int], cache: Cache, adapters: Sequence[str | None]) -> Tensor:
        """Return the next token's logits [rows, vocabulary] after new columns of tokens [rows, time].

        The cache gets the new columns. ``first`` is the column where each row's text begins. Ids
        and ``first`` go to the device in one copy; everything else is computed on the device.
        """
        device = self._model.device
        new = ids.shape[1]
        packed = torch.cat([torch.tensor(first)[:, None], ids], dim=1).to(device, non_blocking=True)  # [rows, 1 + time]
        begins, columns = packed[:, :1], torch.arange(cache.get_seq_length() + new, device=device)  # [rows, 1], [total]
        arguments = {
            "input_ids": packed[:, 1:],
            "attention_mask": (columns >= begins).long() if any(first) else None,  # [rows, total]
            # Positions count from each row's first token; padding gets 0 and is masked.
            "position_ids": (columns[-new:] - begins).clamp(min=0),  # [rows, time]
            "cache": cache,
            "use_cache": True,
            # The number 1 would give a strided view of all columns, for which torch copies the head once per row.
            "logits_to_keep": 0 if new == 1 else torch.arange(new - 1, new, device=device),
        }
        with self._adapters.use_adapters(adapters), self._masking():
            logits: Tensor = self._model(**arguments).logits[:, -1]
        return logits

    @contextmanager
    def _masking(self) -> Iterator[None]:
        """Use SDPA with the masks of :func:`_mask` in a pass."""
        before = self._config._attn_implementation
        self._config._attn_implementation = _ATTENTION
        try:
            yield
        finally:
            self._config._attn_implementation = before

    def _keep(self, indices: list[int]) -> None:
        if len(indices) == len(self.rows):
            return
        # The last rows fill the gaps, so that no other row is copied.
        last = iter([index for index in indices if index >= len(indices)])
        staying = set(indices)
        indices = [place if place in staying else next(last) for place in range(len(indices))]
        self.rows = [self.rows[index] for index in indices]
        if self.rows:
            select(self._cache, indices, cached_columns(self.rows))
        else:
            self._cache = new_cache()


def _mask(*, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
    """Return SDPA's mask as transformers makes it, without inspecting the padding, as numbers to add to the scores.

    transformers drops a mask that hides nothing, and for that copies the padding to the host, which waits for the
    device. Here a missing ``attention_mask`` means that there is no padding, so only then the mask is dropped.
    From a boolean mask SDPA would make the same numbers again in each layer. CUDA's kernel would also copy a mask
    whose rows do not begin at multiples of 8 elements.
    """
    skip = allow_is_causal_skip and attention_mask is None
    seen = sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=skip, **kwargs)
    if seen is None:
        return None
    columns = seen.shape[-1]
    added = torch.full((*seen.shape[:-1], -(-columns // 8) * 8), -math.inf, dtype=kwargs["dtype"], device=seen.device)
    return added[..., :columns].masked_fill_(seen, 0)


_ATTENTION = "tunewright_decoding"
"""SDPA with masks that are never copied to the host."""
AttentionInterface.register(_ATTENTION, attention_forward)
AttentionMaskInterface.register(_ATTENTION, _mask)


def newest(rows: Sequence[Row]) -> Tensor:
    """Return the newest token of each row [rows, 1]."""
    return torch.tensor([[row.ids[-1]] for row in rows])


def row_length(row: Row) -> int:
    """Return the tokens of a row that the model has seen once the pass in progress is done."""
    return len(row.request.prompt_ids) + len(row.ids)


def cached_columns(rows: list[Row]) -> int:
    """Return the cache columns that these rows need: the newest token of each has not been through the model yet."""
    return max(row_length(row) for row in rows) - 1
