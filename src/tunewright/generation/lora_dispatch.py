"""Which adapter answers which row of a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunewright.core.errors import UserError
from tunewright.generation.batched_lora import MOST_BYTES, BatchedLora, Lora, Places

BASE_ROW = "__base__"
"""PEFT's name for a row without an adapter."""
_TOUCHED = (LoraLayer, AuxiliaryTrainingWrapper)
_MANY, _MANY_ON_A_CARD = 4, 2
"""Adapters from which on it takes less time to have their matrices next to each other: on a processor by the clock, on
a card by the launches (docs/decisions/0030)."""


class LoraDispatch:
    """The adapters of a model, and which of them answers which row of a pass.

    They are those of a PeftModel, or are put beside a base that has none: then the model itself is never changed, and
    one more is a few entries in a dictionary (:meth:`put`).

    PEFT's own ``forward(adapter_names=...)`` does the same, but looks for the layers in every pass (a quarter of the
    time of a short one), leaves its hooks behind when a pass fails, and needs ten operations a layer for each adapter.
    Here the layers compute in their own way from the first pass to the last (:meth:`attached`), and which rows are
    whose is worked out once for all passes with the same rows. Where all rows have one adapter a layer needs two or
    three operations; where rows of several decode, four for all of them together (tests/gpu/test_decoding_gpu.py).

    Rows of one pass cannot be told apart where DoRA is involved (peft refuses). Rows that are not ``mixed`` need not
    be: then the one adapter is switched on for the pass, or all are off.
    """

    def __init__(self, model: Any, *, mixed: bool) -> None:
        assert not model.training, "decoding needs eval mode"
        self._model = model
        self._alone = False
        self._names: set[str] = set()
        self._linear: dict[str, _LinearLoras] = {}
        """By the layer's name."""
        self._layers: list[Any] = []
        self._attached = False
        self._rows: _Rows | None = None
        """Of the pass under way."""
        self._last: _Rows | None = None
        """Of the pass before: the next one mostly has the same rows."""
        self._places = Places()
        self._bytes = 0  # that the largest adapter's matrices take
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
        parts = {name: part for name, part in model.named_modules() if isinstance(part, _TOUCHED)}
        self._linear = {name: _LinearLoras.of_peft(part) for name, part in parts.items() if _is_plain(part)}
        self._layers = [part for part in parts.values() if not _is_plain(part)]
        self._bytes = max((self._size(name) for name in self._names), default=0)

    def put(self, name: str, loras: Mapping[str, Lora]) -> None:
        """Have one more adapter of a base that has none of its own, by the names of the layers that it touches."""
        assert not isinstance(self._model, PeftModel), "peft has its own layers there"
        new = {layer: _LinearLoras.of_base(self._model.get_submodule(layer)) for layer in loras.keys() - self._linear}
        self._linear |= new
        self._last = None  # it may have been arranged for other matrices
        if self._attached:
            for added in new.values():
                added.attach(self._current)
        for layer, lora in loras.items():
            self._linear[layer].put(name, lora)
        self._names.add(name)
        self._bytes = max(self._bytes, self._size(name))

    def drop(self, name: str) -> None:
        """Forget an adapter; nothing happens if it is not (or no longer) here."""
        self._names.discard(name)
        self._last = None
        for layer in self._linear.values():
            layer.drop(name)

    def _size(self, name: str) -> int:
        return sum(layer.loras[name].bytes for layer in self._linear.values() if name in layer.loras)

    def require(self, names: Sequence[str | None]) -> None:
        """A layer takes an unknown adapter for one that does not touch it, so the names are checked here."""
        unknown = {name for name in names if name is not None} - self._names
        if unknown:
            raise ValueError(f"the model has no adapter {', '.join(sorted(unknown))}")

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While this is open, the layers compute for :meth:`answering` in their own way, from pass to pass.

        A caller that makes many passes opens it around all of them; without it each pass attaches and detaches.
        """
        if self._attached or self._alone:
            yield
            return
        self._attached = True
        for layer in self._linear.values():
            layer.attach(self._current)
        hooks = [layer.register_forward_pre_hook(self._name_rows, with_kwargs=True) for layer in self._layers]
        try:
            yield
        finally:
            self._attached = False
            for hook in hooks:
                hook.remove()
            for layer in self._linear.values():
                layer.detach()

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
        with self.attached():
            if self._last is None or self._last.of != tuple(names):
                self._last = self._arranged(names)
            self._rows = self._last
            try:
                yield
            finally:
                self._rows = None
                self._last.forget_inputs()

    def _arranged(self, names: Sequence[str | None]) -> _Rows:
        rows = _Rows(names, self._model.device)
        if len(rows.adapters) >= (_MANY if self._model.device.type == "cpu" else _MANY_ON_A_CARD):
            rows.place(self._places.take(rows.adapters, MOST_BYTES // max(1, self._bytes)))
        return rows

    def _current(self) -> _Rows:
        assert self._rows is not None, "a pass of whose rows nobody has said whose they are"
        return self._rows

    def _name_rows(self, _layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return a layer that is not plain has PEFT tell its rows apart."""
        names = [BASE_ROW if name is None else name for name in self._current().of]
        return args, {**kwargs, "adapter_names": names}


class _Rows:
    """The rows of a pass by their adapters; those of the base come last.

    Args:
        names: each row's adapter.
    """

    def __init__(self, names: Sequence[str | None], device: torch.device) -> None:
        self.of = tuple(names)
        order = sorted(range(len(names)), key=adapters_first(names).__getitem__)
        counts = Counter(names[row] for row in order)
        self.names, self.sizes = list(counts), list(counts.values())
        """The adapters in that order, and how many rows each has."""
        self.adapters = [name for name in self.names if name is not None]
        self.only = self.names[0] if len(self.names) == 1 else None
        """The adapter of all rows, if they have one and the same."""
        self.placed: tuple[str | None, ...] | None = None
        """Which adapter lies where in a :class:`BatchedLora`, if they are to lie in one."""
        self.moved = order != sorted(order)
        self._device = device
        if self.moved:
            self._order = torch.tensor(order, device=device)
            self._back = self._order.argsort()
        self._spread: dict[tuple[int, torch.dtype], Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        self._last_spread: tuple[Tensor, Tensor] | None = None

    def place(self, placed: tuple[str | None, ...] | None) -> None:
        """Have the adapters lie so."""
        self.placed = placed
        if placed is None:
            return
        # Each place has as many slots as any adapter has rows. Rows of the base read an empty one, where there is 0.
        self._deep = max(self.of.count(name) for name in self.adapters) + (None in self.names)
        taken: Counter[str | None] = Counter()
        slots = []
        for name in self.of:
            slots.append(self._deep - 1 if name is None else placed.index(name) * self._deep + taken[name])
            taken[name] += 1
        self._slots = torch.tensor(slots, device=self._device)
        filled = [row for row, name in enumerate(self.of) if name is not None]
        self._filled = torch.tensor(filled, device=self._device) if None in self.names else None
        self._filled_slots = self._slots if self._filled is None else self._slots[self._filled]

    def apart(self, states: Tensor) -> Tensor:
        """From the adapters' order [rows, ...] to the batch's."""
        return states.index_select(0, self._back) if self.moved else states

    def inputs(self, x: Tensor, dtype: torch.dtype, *, together: bool) -> Tensor:
        """A layer's input [rows, ..., in] as its adapters take it [tokens, in], in the adapters' order if ``together``.

        Layers that are given the same one (queries, keys and values; gate and up) follow each other, so it is made
        once for all of them.
        """
        if self._last is None or self._last[0] is not x or self._last[1].dtype != dtype:
            ordered = x.index_select(0, self._order) if together and self.moved else x
            self._last = x, ordered.to(dtype).reshape(-1, x.shape[-1])
        return self._last[1]

    def forget_inputs(self) -> None:
        """Let go of what the layers of a pass were given."""
        self._last = self._last_spread = None

    def spread(self, inputs: Tensor) -> Tensor:
        """Return one token a row [rows, in] to where its adapter lies [places, slots, in]; made once, as they are."""
        assert self.placed is not None
        if self._last_spread is None or self._last_spread[0] is not inputs:
            kind = inputs.shape[-1], inputs.dtype
            spread = self._spread.get(kind)
            if spread is None:
                # The other slots stay 0 for as long as these rows are together.
                spread = self._spread[kind] = inputs.new_zeros(len(self.placed) * self._deep, inputs.shape[-1])
            own = inputs if self._filled is None else inputs.index_select(0, self._filled)
            spread.index_copy_(0, self._filled_slots, own)
            self._last_spread = inputs, spread.view(len(self.placed), self._deep, -1)
        return self._last_spread[1]

    def gathered(self, changes: Tensor) -> Tensor:
        """Return what came of it [places, slots, out] by row [rows, out]; of the base's rows 0."""
        return changes.view(-1, changes.shape[-1]).index_select(0, self._slots)


def adapters_first(names: Sequence[str | None]) -> list[tuple[bool, str]]:
    """By what rows are sorted so that those of an adapter lie together, those of the base last."""
    return [(name is None, name or "") for name in names]


class _LinearLoras:
    """A linear layer and the adapters that touch it.

    Args:
        layer: whose output it is.
        inner: what the base makes of the layer's input: a tensor of its own, to which the change is added.
        loras: by their adapters; all of one type.
        rounded: a change is rounded to the base's type before it is added, and not their sum.
    """

    def __init__(
        self, layer: Any, inner: Callable[..., Tensor], loras: dict[str | None, Lora], *, rounded: bool
    ) -> None:
        assert "forward" not in vars(layer), "somebody else's way to compute it"
        self._layer = layer
        self._inner = inner
        self._rounded = rounded
        self._stack = BatchedLora()
        self.loras = loras

    @classmethod
    def of_peft(cls, layer: Any) -> _LinearLoras:
        """Of peft's layer around the base's, and all adapters on it."""
        loras: dict[str | None, Lora] = {
            name: Lora(down.weight.detach().t(), layer.lora_B[name].weight.detach().t(), layer.scaling[name])
            for name, down in layer.lora_A.items()
        }
        return cls(layer, layer.base_layer, loras, rounded=_in_4_bits(layer.base_layer))

    @classmethod
    def of_base(cls, layer: nn.Module) -> _LinearLoras:
        """Of the base's own layer, without adapters yet."""
        return cls(layer, layer.forward, {}, rounded=_in_4_bits(layer))

    def put(self, name: str, lora: Lora) -> None:
        """Have an adapter, or have it otherwise from now on."""
        self._stack.forget(name)
        self.loras[name] = lora

    def drop(self, name: str) -> None:
        """Forget an adapter; nothing happens if it is not (or no longer) here."""
        self._stack.forget(name)
        self.loras.pop(name, None)

    def attach(self, current: Callable[[], _Rows]) -> None:
        """Have the layer answer each row of a pass by its adapter, until :meth:`detach`."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = self._inner(x, *args, **kwargs)
            rows = current()
            if any(name in self.loras for name in rows.adapters):
                # While a model trains, transformers' trainer has its passes under autocast, which would round inputs.
                if torch.is_autocast_enabled(x.device.type):
                    with torch.autocast(x.device.type, enabled=False):
                        self._change(result, x, rows)
                else:
                    self._change(result, x, rows)
            return result

        self._layer.forward = forward

    def detach(self) -> None:
        """Have the layer as it was."""
        vars(self._layer).pop("forward", None)

    def _change(self, result: Tensor, x: Tensor, rows: _Rows) -> None:
        """Add each row's adapter's change to what the base made of x [rows, ..., in]."""
        dtype = next(iter(self.loras.values())).down.dtype
        flat = result.view(-1, result.shape[-1])
        tokens = len(flat) // len(result)
        if rows.only is not None:
            self._add(flat, rows.inputs(x, dtype, together=False), self.loras[rows.only])
        elif rows.placed is not None and tokens == 1:
            self._stack.hold(rows.placed, self.loras)
            changes = rows.gathered(self._stack.changes(rows.spread(rows.inputs(x, dtype, together=False))))
            self._add_changes(flat, changes)
        else:
            inputs = rows.inputs(x, dtype, together=True)
            # [tokens, out] in the adapters' order
            ordered = inputs.new_zeros(flat.shape) if rows.moved else flat
            sizes = [size * tokens for size in rows.sizes]
            for name, part, own in zip(rows.names, ordered.split(sizes), inputs.split(sizes), strict=True):
                lora = self.loras.get(name)
                if lora is not None:
                    self._add(part, own, lora)
            if rows.moved:
                self._add_changes(flat, rows.apart(ordered.view(len(result), -1)).view(flat.shape))

    def _add(self, part: Tensor, own: Tensor, lora: Lora) -> None:
        """Add one adapter's change of its tokens [tokens, in] to them [tokens, out]."""
        low = own.mm(lora.down)
        if part.dtype == low.dtype:
            part.addmm_(low, lora.up, alpha=lora.scale)
        elif self._rounded:
            change = torch.addmm(low[0, 0], low, lora.up, beta=0, alpha=lora.scale)  # beta=0: the first is not read
            part.add_(change.to(part.dtype))
        elif _by_the_number(part):
            part.copy_(torch.addmm(part.to(low.dtype), low, lora.up, alpha=lora.scale))
        else:
            # Added in the wider of the two types, and rounded once.
            part.add_(low.mm(lora.up), alpha=lora.scale)

    def _add_changes(self, flat: Tensor, changes: Tensor) -> None:
        """Add changes that are nobody else's to what the base made of the same tokens: both [tokens, out]."""
        if self._rounded:
            flat.add_(changes.to(flat.dtype))
        elif flat.dtype != changes.dtype and _by_the_number(flat):
            flat.copy_(changes.add_(flat.to(changes.dtype)))
        else:
            flat.add_(changes)


def _by_the_number(sums: Tensor) -> bool:
    """Whether torch adds tensors of two types number by number, as on a processor; on a card it is one launch."""
    return sums.device.type == "cpu"


def _in_4_bits(layer: Any) -> bool:
    """Return whether it is a linear layer whose weights are whole numbers.

    To what that makes of an input, peft adds a change only after rounding it (peft/tuners/lora/bnb.py).
    """
    return isinstance(layer, nn.Linear) and not layer.weight.is_floating_point()


def _is_plain(layer: Any) -> bool:
    """Return whether it is a linear layer, whole or in 4 bits, with nothing but two matrices for each adapter."""
    return (
        (isinstance(layer, Linear) or _in_4_bits(getattr(layer, "base_layer", None)))
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and not layer.merged
        # In pieces (FSDP) a weight is whole only while peft's own layers compute.
        and not any(isinstance(weight, DTensor) for weight in layer.parameters())
        and len({weight.dtype for loras in (layer.lora_A, layer.lora_B) for weight in loras.parameters()}) == 1
    )
