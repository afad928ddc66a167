"""Decoding with transformers' own cache, for bases whose state tunewright's key/value cache cannot hold.

Linear-attention and state-space layers keep a state of fixed size instead of keys and values. A state cannot go back
to an earlier token, and padding before a text can change it: where a layer has a bias before its convolution, padding
is not zero. So this path is slower. A pass has prompts of one length and rows of one adapter, no prefix is shared, and
a long prompt is prefilled in one pass. The answers are those of the model's forward over the whole text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from tunewright.generation.decoding import Batch, PrefillState, Prefix, cached_columns, newest, row_length
from tunewright.generation.requests import Row
from tunewright.generation.text_stream import Decode

_MERGEABLE = (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


def new_batch(
    model: Any, *, stop_ids: Collection[int], pad_id: int, mixed: bool = True, decode: Decode | None = None
) -> Batch:
    """Return an empty batch that decodes with the cache that `load_model` chose for this model."""
    kind = Batch if getattr(model, "own_cache", True) else PlainBatch
    return kind(model, stop_ids=stop_ids, pad_id=pad_id, mixed=mixed, decode=decode)


class PlainCache(DynamicCache):
    """transformers' cache for a model, with the number of its columns, which state-space layers do not know."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  (all layers have seen the same columns)
        """Return the columns of the passes before this one."""
        return self.columns

    @property
    def mergeable(self) -> bool:
        """True if all of its layers are of kinds that `merged` knows."""
        return all(type(layer) in _MERGEABLE for layer in self.layers)

    def resize(self, columns: int) -> None:
        """Pad or cut keys and values on the left."""
        self.columns = columns
        for layer in self.layers:
            _resize(layer, columns)


class _Group:
    """Rows of one adapter, which decode in one pass."""

    def __init__(self, rows: list[Row], cache: PlainCache) -> None:
        self.rows = rows
        self.cache = cache
        self.adapter = rows[0].request.adapter

    def keep(self, indices: list[int]) -> None:
        """Keep the rows with these indices, and the columns that they need."""
        if len(indices) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in indices]
        if self.rows:
            self.cache.reorder_cache(torch.tensor(indices))  # type: ignore[arg-type]
            if self.cache.mergeable:
                self.cache.resize(cached_columns(self.rows))


class PlainBatch(Batch):
    """The rows that decode together with transformers' cache; see :class:`Batch`."""

    shares_prefixes = False

    def __init__(self, model: Any, **options: Any) -> None:
        # A pass has one adapter, of any kind of LoRA.
        super().__init__(model, **options | {"mixed": False})
        self._groups: dict[str | None, _Group] = {}
        self._empty = PlainCache(self._config)

    def _new_cache(self) -> PlainCache:
        # Much faster than a new one, for which transformers copies the configuration for each layer.
        return deepcopy(self._empty)

    def prefix(self, ids: Sequence[int], adapter: str | None) -> Prefix:
        """Refuse: see ``shares_prefixes``."""
        raise NotImplementedError("transformers' cache shares no prefix")

    @torch.inference_mode()
    def prefill(self, state: PrefillState, tokens: int | None = None) -> bool:  # noqa: ARG002
        """Prefill all prompts, in one pass for each adapter, whatever ``tokens`` says.

        If this raises, the decoding rows are untouched.
        """
        self._adapters.require([row.request.adapter for row in state.rows])
        by_adapter: defaultdict[str | None, list[Row]] = defaultdict(list)
        for row in state.rows:
            by_adapter[row.request.adapter].append(row)
        joining = []
        for rows in by_adapter.values():
            group, logits = self._computed(rows)
            for error in self._take(group.rows, logits).values():
                raise error
            group.keep([index for index, row in enumerate(group.rows) if row.finish is None])
            joining.append(group)
        # Any of these may run out of memory, so none is kept before all are made.
        groups = {group.adapter: self._joined(group) for group in joining if group.rows}
        self._update(self._groups | groups)
        return True

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, Exception]]:
        """Decode one token for every row, in one pass for each adapter: see :meth:`Batch.step`."""
        failures = [failure for group in self._groups.values() for failure in self._step(group)]
        self._update(self._groups)
        return failures

    @torch.inference_mode()
    def cancel(self, row: Row) -> None:
        """Remove a row before it has finished; a row that is not in the batch is ignored."""
        for group in self._groups.values():
            group.keep([index for index, other in enumerate(group.rows) if other is not row])
        self._update(self._groups)

    def _step(self, group: _Group) -> list[tuple[Row, Exception]]:
        failures: list[tuple[Row, Exception]] = []
        while group.rows:
            try:
                if failures:
                    # The failed pass may have changed the states: they are computed again from the whole text.
                    again, logits = self._computed(group.rows)
                    group.rows, group.cache = again.rows, again.cache
                else:
                    logits = self._next_logits(group.rows, newest(group.rows), group.cache)
            except Exception as error:  # noqa: BLE001 - any failure is narrowed down to its rows
                failing = self._isolate_failures(group.rows, error, lambda rows, _: self._computed(rows))
                failures += [(group.rows[index], each) for index, each in failing.items()]
                group.rows = [row for index, row in enumerate(group.rows) if index not in failing]
                continue
            failing = self._take(group.rows, logits)
            failures += [(group.rows[index], each) for index, each in failing.items()]
            group.keep([i for i, row in enumerate(group.rows) if row.finish is None and i not in failing])
            break
        return failures

    def _computed(self, rows: Sequence[Row]) -> tuple[_Group, Tensor]:
        """Compute whole texts; return their rows as a group, and the logits after them [rows, vocabulary]."""
        by_length: defaultdict[int, list[Row]] = defaultdict(list)
        for row in rows:
            # Layers that cannot be merged are kinds of attention, whose masks hide padding.
            by_length[row_length(row) if self._empty.mergeable else 0].append(row)
        caches = [self._new_cache() for _ in by_length]
        logits = [
            self._next_logits(own, self._texts(own), cache)
            for own, cache in zip(by_length.values(), caches, strict=True)
        ]
        return _Group([row for own in by_length.values() for row in own], merged(caches)), torch.cat(logits)

    def _joined(self, joining: _Group) -> _Group:
        """Return the adapter's group with more rows. If caches cannot be merged, the whole text is computed again."""
        group = self._groups.get(joining.adapter)
        if group is None:
            return joining
        rows = [*group.rows, *joining.rows]
        if group.cache.mergeable:
            return _Group(rows, merged([group.cache, joining.cache]))
        cache, ids = self._new_cache(), self._texts(rows)
        first = [ids.shape[1] - row_length(row) for row in rows]
        # The newest token of each row goes through the model in the next step.
        self._forward(ids[:, :-1], first, cache, [joining.adapter] * len(rows))
        return _Group(rows, cache)

    def _update(self, groups: Mapping[str | None, _Group]) -> None:
        self._groups = {adapter: group for adapter, group in groups.items() if group.rows}
        self.rows = [row for group in self._groups.values() for row in group.rows]

    def _forward(self, ids: Tensor, first: list[int], cache: Cache, adapters: Sequence[str | None]) -> Tensor:
        logits = super()._forward(ids, first, cache, adapters)
        assert isinstance(cache, PlainCache)
        cache.columns += ids.shape[1]
        return logits

    @contextmanager
    def _masking(self) -> Iterator[None]:
        """Use the model's own attention and masks."""
        yield


def merged(caches: Sequence[PlainCache]) -> PlainCache:
    """Return the rows of all caches, the shorter ones padded on the left; the caches are not changed."""
    if len(caches) == 1:
        return caches[0]
    whole = copy(caches[0])
    whole.columns = max(cache.columns for cache in caches)
    layers = zip(*(cache.layers for cache in caches), strict=True)
    whole.layers = [_merged_layer([copy(part) for part in parts], whole.columns) for parts in layers]
    return whole


def _merged_layer(parts: list[Any], columns: int) -> Any:
    """Return the first of these layers with the rows of all; they may be changed."""
    whole = parts[0]
    if isinstance(whole, DynamicLayer) and whole.is_initialized:
        for part in parts:
            _resize(part, columns)
        whole.keys, whole.values = (torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "values"))
    if isinstance(whole, LinearAttentionCacheLayerMixin):
        for name in ("conv_states", "recurrent_states"):
            states = [getattr(part, name) for part in parts]
            setattr(whole, name, {index: _concatenated([own[index] for own in states]) for index in states[0]})
    return whole


def _resize(layer: Any, columns: int) -> None:
    """Pad or cut a layer's keys and values on the left; states have no columns."""
    if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
        return
    width = columns
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length, width = columns, min(columns, layer.sliding_window - 1)
    own: list[Any] = [layer.keys, layer.values]
    layer.keys, layer.values = (pad(states, (0, 0, width - states.shape[-2], 0)) for states in own)


def _concatenated(states: Sequence[Tensor | None]) -> Tensor | None:
    """Return the rows of all states; None if this model keeps no such state."""
    present = [state for state in states if state is not None]
    return torch.cat(present) if present else None
