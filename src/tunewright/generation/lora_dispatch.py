"""Dispatch of batch rows to LoRA adapters: row i of a pass is answered by its own adapter, or by the base.

Shapes: B rows of the batch, T tokens of each row in this pass, S slots of stacked adapters, N rows of a slot.
"""

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
from tunewright.generation.batched_lora import MAX_BYTES, AdapterSlots, BatchedLora, Lora
from tunewright.generation.requests import BASE_ROW

_ADAPTED = (LoraLayer, AuxiliaryTrainingWrapper)
_STACK_FROM_CPU, _STACK_FROM_CUDA = 4, 2
"""Fewest adapters of a pass for which stacking their weights is faster: measured in time on the CPU, and in kernel
launches on CUDA (docs/decisions/0024)."""


class LoraDispatch:
    """The adapters of a model, and the dispatch of a pass's rows to them.

    The adapters come from a PeftModel, or are added to a base without adapters. Then the model
    itself never changes, and one more adapter is a few dictionary entries (:meth:`add`).

    PEFT's own ``forward(adapter_names=...)`` does the same with three drawbacks. It looks up the layers in every pass,
    which is a quarter of a short pass. It leaves its hooks behind when a pass fails. It needs ten operations a layer
    for each adapter. Here the layers' forward methods are replaced once for many passes (:meth:`attached`). The
    grouping of rows is computed once for all passes with the same rows. Where all rows have one adapter, a layer needs
    two or three operations; where rows of several adapters decode, it needs four for all of them together
    (tests/gpu/test_decoding_gpu.py).

    peft refuses to mix DoRA rows in one pass. If the rows are not ``mixed``, any kind of adapter
    works: it is switched on for the pass, or all are off.
    """

    def __init__(self, model: Any, *, mixed: bool) -> None:
        assert not model.training, "decoding needs eval mode"
        self._model = model
        self._single_adapter = False
        """Rows share one adapter that cannot be mixed with others."""
        self._names: set[str] = set()
        self._linear: dict[str, _LoraLinear] = {}
        """Wrapped layers by name."""
        self._other_layers: list[Any] = []
        """Adapted layers that PEFT itself computes."""
        self._attached = False
        self._rows: _RowGroups | None = None
        """The row assignment of the pass in progress."""
        self._last: _RowGroups | None = None
        """The row assignment of the previous pass: the next one usually has the same rows."""
        self._slots = AdapterSlots()
        self._largest_bytes = 0
        """Bytes of the largest adapter's weights."""
        if not isinstance(model, PeftModel):
            return
        configs: dict[str, Any] = model.peft_config
        for name, config in configs.items():
            special = config.use_dora or config.alora_invocation_tokens or config.target_parameters
            if config.peft_type != "LORA" or special:
                self._single_adapter = not mixed
                if not mixed:
                    continue
                raise UserError(
                    f"The adapter {name} is not plain LoRA, so it cannot share a batch with other adapters",
                    fix="Train it as plain LoRA: without DoRA, experts or activated LoRA.",
                )
        # Disabled layers would answer with the base, regardless of the row's adapter.
        status = model.get_model_status()
        assert status.enabled is True and not status.merged_adapters, "adapters must be enabled and unmerged"
        self._names = set(configs)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _ADAPTED)}
        self._linear = {name: _LoraLinear.from_peft(layer) for name, layer in layers.items() if _is_plain(layer)}
        self._other_layers = [layer for layer in layers.values() if not _is_plain(layer)]
        self._largest_bytes = max((self._nbytes(name) for name in self._names), default=0)

    def add(self, name: str, loras: Mapping[str, Lora]) -> None:
        """Add an adapter to a base without built-in ones; ``loras`` maps layer names to weights."""
        assert not isinstance(self._model, PeftModel), "a PeftModel has adapter layers already"
        bare = {layer: self._model.get_submodule(layer) for layer in loras.keys() - self._linear}
        new = {name: _LoraLinear(layer, layer.forward, {}, round_delta=_is_4bit(layer)) for name, layer in bare.items()}
        self._linear |= new
        self._last = None  # its slots may hold this name's earlier weights
        if self._attached:
            for added in new.values():
                added.attach(self._current)
        for layer, lora in loras.items():
            self._linear[layer].add(name, lora)
        self._names.add(name)
        self._largest_bytes = max(self._largest_bytes, self._nbytes(name))

    def remove(self, name: str) -> None:
        """Remove an adapter; an unknown name is ignored."""
        self._names.discard(name)
        self._last = None
        for layer in self._linear.values():
            layer.remove(name)

    def _nbytes(self, name: str) -> int:
        return sum(layer.loras[name].nbytes for layer in self._linear.values() if name in layer.loras)

    def require(self, names: Sequence[str | None]) -> None:
        """Check that all adapters are known: a layer would silently answer an unknown one with the base."""
        unknown = {name for name in names if name is not None} - self._names
        if unknown:
            raise ValueError(f"the model has no adapter {', '.join(sorted(unknown))}")

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Replace the layers' forward methods while this is open.

        A caller with many passes opens it around all of them; otherwise each pass attaches and detaches.
        """
        if self._attached or self._single_adapter:
            yield
            return
        self._attached = True
        for layer in self._linear.values():
            layer.attach(self._current)
        hooks = [layer.register_forward_pre_hook(self._name_rows, with_kwargs=True) for layer in self._other_layers]
        try:
            yield
        finally:
            self._attached = False
            for hook in hooks:
                hook.remove()
            for layer in self._linear.values():
                layer.detach()

    @contextmanager
    def use_adapters(self, names: Sequence[str | None]) -> Iterator[None]:
        """Answer row i of each pass with the adapter ``names[i]`` while this is open (None: with the base)."""
        if self._single_adapter:
            (only,) = set(names)
            if only is not None:
                self._model.set_adapter(only)
            with nullcontext() if only is not None else self._model.disable_adapter():
                yield
            return
        with self.attached():
            if self._last is None or self._last.adapter_of_row != tuple(names):
                rows = self._last = _RowGroups(names, self._model.device)
                if len(rows.adapters) >= (_STACK_FROM_CPU if self._model.device.type == "cpu" else _STACK_FROM_CUDA):
                    rows.assign_slots(self._slots.assign(rows.adapters, MAX_BYTES // max(1, self._largest_bytes)))
            self._rows = self._last
            try:
                yield
            finally:
                self._rows = None
                self._last.clear_inputs()

    def _current(self) -> _RowGroups:
        assert self._rows is not None, "a pass outside of use_adapters"
        return self._rows

    def _name_rows(self, _layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Have PEFT dispatch the rows of a layer that is not plain."""
        names = [BASE_ROW if name is None else name for name in self._current().adapter_of_row]
        return args, {**kwargs, "adapter_names": names}


class _RowGroups:
    """The rows of a pass grouped by adapter; rows of the base come last."""

    def __init__(self, names: Sequence[str | None], device: torch.device) -> None:
        self.adapter_of_row = tuple(names)
        order = sorted(range(len(names)), key=adapter_sort_keys(names).__getitem__)
        counts = Counter(names[row] for row in order)
        self.names, self.sizes = list(counts), list(counts.values())
        """The groups' adapters in that order, and the number of rows of each."""
        self.adapters = [name for name in self.names if name is not None]
        self.only = self.names[0] if len(self.names) == 1 else None
        """The adapter of all rows, if they share one."""
        self.slots: tuple[str | None, ...] | None = None
        """Each slot's adapter in a :class:`BatchedLora`, where the weights are stacked."""
        self.reordered = order != sorted(order)
        self._device = device
        if self.reordered:
            self._order = torch.tensor(order, device=device)  # [B]: batch row of each grouped row
            self._inverse = self._order.argsort()  # [B]: grouped row of each batch row
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}
        """Slot inputs [S * N, in] by width and dtype."""
        self._last: tuple[Tensor, Tensor] | None = None
        self._last_scattered: tuple[Tensor, Tensor] | None = None

    def assign_slots(self, slots: tuple[str | None, ...] | None) -> None:
        """Lay the rows out for stacked weights; None leaves them to be multiplied group by group."""
        self.slots = slots
        if slots is None:
            return
        # N is the largest number of rows of any adapter. Rows of the base read one more place of slot 0, which stays 0.
        self._depth = max(self.adapter_of_row.count(name) for name in self.adapters) + (None in self.names)
        used: Counter[str | None] = Counter()
        places = []
        for name in self.adapter_of_row:
            places.append(self._depth - 1 if name is None else slots.index(name) * self._depth + used[name])
            used[name] += 1
        self._places = torch.tensor(places, device=self._device)  # [B], into [S * N]
        adapted = [row for row, name in enumerate(self.adapter_of_row) if name is not None]
        self._adapted = torch.tensor(adapted, device=self._device) if None in self.names else None
        self._adapted_places = self._places if self._adapted is None else self._places[self._adapted]

    def to_batch_order(self, states: Tensor) -> Tensor:
        """Return grouped rows [B, ...] in the batch's order."""
        return states.index_select(0, self._inverse) if self.reordered else states

    def inputs(self, x: Tensor, dtype: torch.dtype, *, grouped: bool) -> Tensor:
        """Return a layer's input [B, ..., in] in the adapters' dtype [B * T, in], rows in group order if ``grouped``.

        Layers with the same input follow one another (q, k and v; gate and up), so it is converted once for them.
        """
        if self._last is None or self._last[0] is not x or self._last[1].dtype != dtype:
            ordered = x.index_select(0, self._order) if grouped and self.reordered else x
            self._last = x, ordered.to(dtype).reshape(-1, x.shape[-1])
        return self._last[1]

    def clear_inputs(self) -> None:
        """Free the inputs that the layers of a pass shared."""
        self._last = self._last_scattered = None

    def scatter(self, inputs: Tensor) -> Tensor:
        """Copy one token of each row [B, in] to its adapter's slot [S, N, in]; layers with equal input share it."""
        assert self.slots is not None
        if self._last_scattered is None or self._last_scattered[0] is not inputs:
            kind = inputs.shape[-1], inputs.dtype
            buffer = self._buffers.get(kind)
            if buffer is None:
                # Unused places stay 0 for as long as these rows are together, so they are cleared only once.
                buffer = self._buffers[kind] = inputs.new_zeros(len(self.slots) * self._depth, inputs.shape[-1])
            own = inputs if self._adapted is None else inputs.index_select(0, self._adapted)
            buffer.index_copy_(0, self._adapted_places, own)
            self._last_scattered = inputs, buffer.view(len(self.slots), self._depth, -1)
        return self._last_scattered[1]

    def gather(self, deltas: Tensor) -> Tensor:
        """Return slot outputs [S, N, out] by batch row [B, out]; rows of the base get 0."""
        return deltas.view(-1, deltas.shape[-1]).index_select(0, self._places)


def adapter_sort_keys(names: Sequence[str | None]) -> list[tuple[bool, str]]:
    """Return sort keys that put rows of one adapter next to each other, and rows of the base last."""
    return [(name is None, name or "") for name in names]


class _LoraLinear:
    """A linear layer and the LoRA weights of its adapters.

    ``inner`` computes the base's output, a new tensor that the delta is added to in place.
    ``round_delta`` rounds a delta to the base's dtype before adding it, as peft does over 4-bit
    layers; otherwise the sum is rounded once.
    """

    def __init__(
        self, layer: Any, inner: Callable[..., Tensor], loras: dict[str | None, Lora], *, round_delta: bool
    ) -> None:
        assert "forward" not in vars(layer), "the layer's forward is replaced already"
        self._layer = layer
        self._inner = inner
        self._round_delta = round_delta
        self._stacked = BatchedLora()
        self.loras = loras

    @classmethod
    def from_peft(cls, layer: Any) -> _LoraLinear:
        """Wrap peft's layer around a base layer, with all of its adapters."""
        loras: dict[str | None, Lora] = {
            name: Lora(down.weight.detach().t(), layer.lora_B[name].weight.detach().t(), layer.scaling[name])
            for name, down in layer.lora_A.items()
        }
        return cls(layer, layer.base_layer, loras, round_delta=_is_4bit(layer.base_layer))

    def add(self, name: str, lora: Lora) -> None:
        """Add an adapter, or replace its weights."""
        self._stacked.invalidate(name)
        self.loras[name] = lora

    def remove(self, name: str) -> None:
        """Remove an adapter; an unknown name is ignored."""
        self._stacked.invalidate(name)
        self.loras.pop(name, None)

    def attach(self, current: Callable[[], _RowGroups]) -> None:
        """Replace the layer's forward until :meth:`detach`; ``current`` returns the rows of the pass in progress."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = self._inner(x, *args, **kwargs)
            rows = current()
            if any(name in self.loras for name in rows.adapters):
                # transformers' trainer runs evaluation under autocast, which would round the adapter's inputs.
                if torch.is_autocast_enabled(x.device.type):
                    with torch.autocast(x.device.type, enabled=False):
                        self._add_lora(result, x, rows)
                else:
                    self._add_lora(result, x, rows)
            return result

        self._layer.forward = forward

    def detach(self) -> None:
        """Restore the layer's own forward."""
        vars(self._layer).pop("forward", None)

    def _add_lora(self, result: Tensor, x: Tensor, rows: _RowGroups) -> None:
        """Add each row's delta to the base's output in place: x is [B, ..., in], result [B, ..., out]."""
        dtype = next(iter(self.loras.values())).down.dtype
        flat = result.view(-1, result.shape[-1])  # [B * T, out]
        tokens = len(flat) // len(result)  # T
        if rows.only is not None:
            self._add_one(flat, rows.inputs(x, dtype, grouped=False), self.loras[rows.only])
        elif rows.slots is not None and tokens == 1:
            self._stacked.load(rows.slots, self.loras)
            deltas = rows.gather(self._stacked.delta(rows.scatter(rows.inputs(x, dtype, grouped=False))))
            self._add_deltas(flat, deltas)
        else:
            inputs = rows.inputs(x, dtype, grouped=True)
            grouped = inputs.new_zeros(flat.shape) if rows.reordered else flat  # [B * T, out] in group order
            sizes = [size * tokens for size in rows.sizes]
            for name, part, own in zip(rows.names, grouped.split(sizes), inputs.split(sizes), strict=True):
                lora = self.loras.get(name)
                if lora is not None:
                    self._add_one(part, own, lora)
            if rows.reordered:
                self._add_deltas(flat, rows.to_batch_order(grouped.view(len(result), -1)).view(flat.shape))

    def _add_one(self, part: Tensor, own: Tensor, lora: Lora) -> None:
        """Add one adapter's delta of its inputs [tokens, in] to ``part`` [tokens, out]."""
        low = own.mm(lora.down)  # [tokens, rank]
        if part.dtype == low.dtype:
            part.addmm_(low, lora.up, alpha=lora.scale)
        elif self._round_delta:
            delta = torch.addmm(low[0, 0], low, lora.up, beta=0, alpha=lora.scale)  # beta=0: the first is not read
            part.add_(delta.to(part.dtype))
        elif _adds_elementwise(part):
            part.copy_(torch.addmm(part.to(low.dtype), low, lora.up, alpha=lora.scale))
        else:
            # torch adds in the wider of the two dtypes, and rounds once.
            part.add_(low.mm(lora.up), alpha=lora.scale)

    def _add_deltas(self, flat: Tensor, deltas: Tensor) -> None:
        """Add deltas to the base's output of the same tokens, both [tokens, out]; ``deltas`` may be overwritten."""
        if self._round_delta:
            flat.add_(deltas.to(flat.dtype))
        elif flat.dtype != deltas.dtype and _adds_elementwise(flat):
            flat.copy_(deltas.add_(flat.to(deltas.dtype)))
        else:
            flat.add_(deltas)


def _adds_elementwise(sums: Tensor) -> bool:
    """Return whether adding two dtypes is a slow scalar loop, as on the CPU; on CUDA it is one launch."""
    return sums.device.type == "cpu"


def _is_4bit(layer: Any) -> bool:
    """Return whether a linear layer's weights are packed integers.

    peft rounds the delta before it adds it to such a layer's output (peft/tuners/lora/bnb.py).
    """
    return isinstance(layer, nn.Linear) and not layer.weight.is_floating_point()


def _is_plain(layer: Any) -> bool:
    """Return whether this is a linear layer, 16-bit or 4-bit, with only two matrices for each adapter."""
    return (
        (isinstance(layer, Linear) or _is_4bit(getattr(layer, "base_layer", None)))
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and not layer.merged
        # Under FSDP a weight is gathered only while peft's own layers compute.
        and not any(isinstance(weight, DTensor) for weight in layer.parameters())
        and len({weight.dtype for loras in (layer.lora_A, layer.lora_B) for weight in loras.parameters()}) == 1
    )
