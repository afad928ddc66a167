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

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from tunewright.errors import UserError

Finish = Literal["stop", "length"]

_BASE = "__base__"  # PEFT's name for a row without an adapter

# Tokens of one prefill, padding included: it bounds the memory that newcomers need for their activations.
PREFILL_TOKENS = 8192
# Two prompts share a prefill if the padding between them is under this many tokens, or under half of the longer one:
# below that a second pass over the weights costs more than the padding does.
_CHEAP_PADDING = 64


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Args:
        prompt_ids: the prompt, at least one token.
        adapter: the PEFT adapter that answers, or None for the base.
        max_new_tokens: the most tokens that the answer may have, at least 1.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: sample among the likeliest tokens that together hold this probability (Holtzman et al. 2020).
        seed: the same seed samples the same answer, whatever else is in the batch; None draws a fresh one.
    """

    prompt_ids: tuple[int, ...]
    adapter: str | None
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        assert self.prompt_ids, "a prompt has at least one token"
        assert self.max_new_tokens >= 1
        assert self.temperature >= 0
        assert 0 < self.top_p <= 1
        assert self.adapter != _BASE, "the base is asked for with None"


@dataclass(frozen=True)
class Completion:
    """A whole answer: its tokens without the stop token, and why it ended."""

    ids: tuple[int, ...]
    finish: Finish


class Row:
    """A request under way; ``ids`` grows with each step until ``finish`` says why it ended."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._generator: torch.Generator | None = None
        if request.temperature > 0:
            self._generator = torch.Generator()
            if request.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(request.seed)

    @property
    def completion(self) -> Completion:
        """The answer of a row that has finished."""
        assert self.finish is not None
        return Completion(tuple(self.ids), self.finish)

    def sample(self, logits: Tensor) -> int:
        """Draw the next token from logits [vocabulary]; on the CPU, so that a seed means the same on every device."""
        assert self._generator is not None
        logits = logits.double().cpu()
        # Below their maximum, logits stay finite or become -inf (a probability of 0) at any temperature.
        scaled = (logits - logits.max()) / self.request.temperature
        probabilities: Tensor = scaled.softmax(-1)
        if self.request.top_p == 1:  # nothing is cut off, and sorting a vocabulary takes longer than all the rest
            return int(torch.multinomial(probabilities, 1, generator=self._generator))
        probabilities, order = probabilities.sort(descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= self.request.top_p] = 0  # the likeliest always stays: nothing comes before it
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])

    def take(self, token: int, stop_ids: Collection[int]) -> None:
        """Append the next token, or finish on it."""
        if token in stop_ids:
            self.finish = "stop"
            return
        self.ids.append(token)
        if len(self.ids) == self.request.max_new_tokens:
            self.finish = "length"


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

    Raises:
        UserError: rows are mixed, and an adapter is of a kind that cannot share a batch.
    """

    def __init__(self, model: Any, *, stop_ids: Collection[int], pad_id: int, mixed: bool = True) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._adapters = _Adapters(model, mixed=mixed)
        self._stop_ids = frozenset(stop_ids)
        self._pad_id = pad_id
        # Without the model's config every layer keeps the whole past. A sliding window is then applied by the
        # attention mask alone; a cache that dropped what has left the window would count padding as text.
        self._cache = DynamicCache()

    @torch.inference_mode()
    def admit(self, requests: Sequence[Request]) -> list[Row]:
        """Prefill the newcomers in one pass, give each its first token, and let those that go on join.

        Prompts of unlike length waste work on padding: see :func:`prefill_groups`. If this raises (out of memory,
        say), the rows that were here before are untouched.

        Raises:
            ValueError: the model has no such adapter.
        """
        self._adapters.require([request.adapter for request in requests])
        rows = [Row(request) for request in requests]
        longest = max(len(request.prompt_ids) for request in requests)
        ids = torch.full((len(rows), longest), self._pad_id)
        for index, request in enumerate(requests):
            ids[index, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        newcomers = DynamicCache()
        self._advance(rows, ids, newcomers)
        going_on = [index for index, row in enumerate(rows) if row.finish is None]
        if going_on:
            joining = [rows[index] for index in going_on]
            _select(newcomers, going_on, _cached(joining))
            self._cache = _merge(self._cache, newcomers) if self.rows else newcomers
            self.rows += joining
        return rows

    @torch.inference_mode()
    def step(self) -> None:
        """Decode one token for every row, in one forward pass; the batch must not be empty."""
        self._advance(self.rows, torch.tensor([[row.ids[-1]] for row in self.rows]), self._cache)
        self._keep([index for index, row in enumerate(self.rows) if row.finish is None])

    @torch.inference_mode()
    def cancel(self, row: Row) -> None:
        """Take a row out before it has finished; nothing happens if it is not (or no longer) here."""
        self._keep([index for index, other in enumerate(self.rows) if other is not row])

    def _advance(self, rows: list[Row], ids: Tensor, cache: DynamicCache) -> None:
        """Run new columns of tokens [rows, time] through the model and give each row its next token."""
        columns = torch.arange(cache.get_seq_length() + ids.shape[1])
        first = len(columns) - torch.tensor([[_length(row)] for row in rows])  # [rows, 1]: where each row's text begins
        device = self._model.device
        arguments = {
            "input_ids": ids.to(device),
            "attention_mask": (columns >= first).long().to(device),
            "position_ids": (columns - first).clamp(min=0)[:, -ids.shape[1] :].to(device),
            "cache": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        with self._adapters.answering([row.request.adapter for row in rows]):
            logits = self._model(**arguments).logits[:, -1]  # [rows, vocabulary]
        for row, own_logits, likeliest in zip(rows, logits, logits.argmax(-1).tolist(), strict=True):
            row.take(row.sample(own_logits) if row.request.temperature > 0 else likeliest, self._stop_ids)

    def _keep(self, indices: list[int]) -> None:
        if len(indices) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in indices]
        if self.rows:
            _select(self._cache, indices, _cached(self.rows))
        else:
            self._cache = DynamicCache()


def generate(
    model: Any,
    requests: Sequence[Request],
    *,
    stop_ids: Collection[int],
    pad_id: int,
    batch_size: int,
    on_finished: Callable[[int, Completion], None] = lambda _index, _completion: None,
) -> list[Completion]:
    """Answer all requests, ``batch_size`` rows at a time, and give the completions in the requests' order.

    Args:
        model, stop_ids, pad_id: see :class:`Batch`.
        on_finished: told a request's index and its completion as soon as it is there (not in order).

    Raises:
        UserError: the requests are for different adapters, and one is of a kind that cannot share a batch.
    """
    mixed = len({request.adapter for request in requests}) > 1
    batch = Batch(model, stop_ids=stop_ids, pad_id=pad_id, mixed=mixed)
    # The longest prompts first: neighbours in the queue are then of like length, and if memory is short it shows at
    # once, not after an hour.
    waiting = deque(sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids)))
    completions: dict[int, Completion] = {}
    rows: dict[int, Row] = {}
    while waiting or rows:
        arrived = [waiting.popleft() for _ in range(min(batch_size - len(rows), len(waiting)))]
        for group in prefill_groups([len(requests[index].prompt_ids) for index in arrived]):
            indices = [arrived[place] for place in group]
            rows |= zip(indices, batch.admit([requests[index] for index in indices]), strict=True)
        if batch.rows:
            batch.step()
        for index in [index for index, row in rows.items() if row.finish]:
            completions[index] = rows.pop(index).completion
            on_finished(index, completions[index])
    return [completions[index] for index in range(len(requests))]


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


class _Adapters:
    """The LoRA layers of a model, and which adapter answers which row of a pass.

    PEFT's own ``forward(adapter_names=...)`` does the same, but looks for the layers anew in every pass (a quarter of
    the time of a short one) and leaves its hooks behind when a pass fails.

    Rows of one pass cannot be told apart where DoRA is involved (peft refuses). Rows that are not ``mixed`` need not
    be: then the one adapter is switched on for the pass, or all are off.
    """

    def __init__(self, model: Any, *, mixed: bool) -> None:
        assert not model.training, "decoding needs eval mode"
        self._model = model
        self._alone = False
        self._names: set[str] = set()
        self._layers: list[Any] = []
        if not isinstance(model, PeftModel):
            return
        configs: dict[str, Any] = model.peft_config
        for name, config in configs.items():
            if config.peft_type != "LORA" or config.use_dora or config.alora_invocation_tokens:
                self._alone = not mixed
                if not mixed:
                    continue
                raise UserError(
                    f"the adapter {name} is not plain LoRA, so it cannot answer in one batch with others",
                    fix="Train it as plain LoRA: without DoRA or activated LoRA.",
                )
        # Disabled layers would answer with the base, whatever the row asks for.
        status = model.get_model_status()
        assert status.enabled is True and not status.merged_adapters, "adapters must be enabled and unmerged"
        self._names = set(configs)
        self._layers = [part for part in model.modules() if isinstance(part, (LoraLayer, AuxiliaryTrainingWrapper))]

    def require(self, names: Sequence[str | None]) -> None:
        """A layer takes an unknown adapter for one that does not touch it, so the names are checked here."""
        unknown = {name for name in names if name is not None} - self._names
        if unknown:
            raise ValueError(f"the model has no adapter {', '.join(sorted(unknown))}")

    @contextmanager
    def answering(self, names: Sequence[str | None]) -> Iterator[None]:
        """While this is open, row i of a pass is answered by the adapter ``names[i]`` (None: by the base)."""
        if self._alone:
            (only,) = set(names)
            if only is not None:
                self._model.set_adapter(only)
            with nullcontext() if only is not None else self._model.disable_adapter():
                yield
            return
        rows = [_BASE if name is None else name for name in names]

        def name_rows(_layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "adapter_names": rows}

        hooks = [layer.register_forward_pre_hook(name_rows, with_kwargs=True) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _length(row: Row) -> int:
    """Tokens of a row that the model has seen once the pass under way is over."""
    return len(row.request.prompt_ids) + len(row.ids)


def _cached(rows: list[Row]) -> int:
    """Columns of the cache that these rows need: the newest token of each has not been through the model yet."""
    return max(_length(row) for row in rows) - 1


def _select(cache: DynamicCache, indices: list[int], time: int) -> None:
    """Keep these rows and the last ``time`` columns; keys and values are [rows, heads, time, head size]."""
    layers: list[Any] = cache.layers
    for layer in layers:
        chosen = torch.tensor(indices, device=layer.keys.device)
        layer.keys = layer.keys[..., -time:, :].index_select(0, chosen)
        layer.values = layer.values[..., -time:, :].index_select(0, chosen)


def _merge(first: DynamicCache, second: DynamicCache) -> DynamicCache:
    """Both caches' rows, the shorter padded on the left."""
    time = max(first.get_seq_length(), second.get_seq_length())

    def both(pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([pad(states, (0, 0, time - states.shape[-2], 0)) for states in pair])

    merged = DynamicCache()
    pairs: list[tuple[Any, Any]] = list(zip(first.layers, second.layers, strict=True))
    for index, (mine, theirs) in enumerate(pairs):
        merged.update(both((mine.keys, theirs.keys)), both((mine.values, theirs.values)), index)
    return merged
