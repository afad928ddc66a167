"""Which adapter answers which row of a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tunewright.errors import UserError
from tunewright.models.lora_stack import MOST_BYTES, Lora, LoraStack, Places

BASE_ROW = "__base__"
"""PEFT's name for a row without an adapter."""
_TOUCHED = (LoraLayer, AuxiliaryTrainingWrapper)
_MANY = 4
"""Adapters from which on it takes less time to have their matrices beside each other."""


class RowAdapters:
    """The adapters of a model, and which of them answers which row of a pass.

    They are those of a PeftModel, or are put beside a base that has none: then the model itself is never changed, and
    one more is a few entries in a dictionary (:meth:`put`).

    PEFT's own ``forward(adapter_names=...)`` does the same, but looks for the layers anew in every pass (a quarter of
    the time of a short one), leaves its hooks behind when a pass fails, and needs ten operations a layer for each
    adapter. Here it is two for each where prompts are read, and six for all of them together where rows decode.

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
        for layer, lora in loras.items():
            self._linear[layer].put(name, lora)
        self._names.add(name)
        self._bytes = max(self._bytes, self._size(name))

    def drop(self, name: str) -> None:
        """Forget an adapter; nothing happens if it is not (or no longer) here."""
        self._names.discard(name)
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
    def answering(self, names: Sequence[str | None]) -> Iterator[None]:
        """While this is open, row i of a pass is answered by the adapter ``names[i]`` (None: by the base)."""
        if self._alone:
            (only,) = set(names)
            if only is not None:
                self._model.set_adapter(only)
            with nullcontext() if only is not None else self._model.disable_adapter():
                yield
            return
        with ExitStack() as stack:
            rows = _Rows(names, self._model.device)
            if len(rows.adapters) >= _MANY:
                rows.place(self._places.take(rows.adapters, MOST_BYTES // max(1, self._bytes)))
            for layer in self._linear.values():
                stack.enter_context(layer.answering(rows))
            for other in self._layers:
                stack.enter_context(_by_peft(other, [BASE_ROW if name is None else name for name in names]))
            yield


class _Rows:
    """The rows of a pass in the order of their adapters, those of the base last.

    Args:
        names: each row's adapter.
    """

    def __init__(self, names: Sequence[str | None], device: torch.device) -> None:
        order = sorted(range(len(names)), key=adapters_first(names).__getitem__)
        counts = Counter(names[row] for row in order)
        self.names, self.sizes = list(counts), list(counts.values())
        """The adapters in that order, and how many rows each has."""
        self.adapters = [name for name in self.names if name is not None]
        self.placed: tuple[str | None, ...] | None = None
        """Which adapter lies where in a :class:`LoraStack`, if they are to lie in one."""
        self._moved = order != sorted(order)
        if self._moved:
            self._order = torch.tensor(order, device=device)
            self._back = self._order.argsort()
        self._device = device
        self._last: tuple[Tensor, Tensor] | None = None
        self._last_spread: tuple[Tensor, Tensor] | None = None

    def place(self, placed: tuple[str | None, ...] | None) -> None:
        """Have the adapters lie so."""
        self.placed = placed
        if placed is not None:
            sizes = dict(zip(self.names, self.sizes, strict=True))
            self._deep = max(sizes[name] for name in self.adapters)
            places = [placed.index(name) * self._deep + row for name in self.adapters for row in range(sizes[name])]
            self._where = torch.tensor(places, device=self._device)

    def together(self, states: Tensor) -> Tensor:
        """From the batch's order [rows, ...] to the adapters'."""
        return states.index_select(0, self._order) if self._moved else states

    def apart(self, states: Tensor) -> Tensor:
        """From the adapters' order [rows, ...] to the batch's."""
        return states.index_select(0, self._back) if self._moved else states

    def inputs(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A layer's input [rows, ..., in] as its adapters take it [tokens, in].

        Layers that are given the same one (queries, keys and values; gate and up) follow each other, so it is made
        once for all of them.
        """
        if self._last is None or self._last[0] is not x or self._last[1].dtype != dtype:
            self._last = x, self.together(x).to(dtype).reshape(-1, x.shape[-1])
        return self._last[1]

    def spread(self, inputs: Tensor) -> Tensor:
        """One token a row [rows, in] to where its adapter lies [places, rows of one, in]; made once, as they are."""
        assert self.placed is not None
        if self._last_spread is None or self._last_spread[0] is not inputs:
            spread = inputs.new_zeros(len(self.placed) * self._deep, inputs.shape[-1])
            spread.index_copy_(0, self._where, inputs[: len(self._where)])
            self._last_spread = inputs, spread.view(len(self.placed), self._deep, -1)
        return self._last_spread[1]

    def add_gathered(self, sums: Tensor, changes: Tensor) -> None:
        """Add what came of it [places, rows of one, out] to the rows' own [rows, out]."""
        gathered = changes.view(-1, changes.shape[-1]).index_select(0, self._where)
        sums[: len(gathered)] += gathered


def adapters_first(names: Sequence[str | None]) -> list[tuple[bool, str]]:
    """By what rows are sorted so that those of an adapter lie together, those of the base last."""
    return [(name is None, name or "") for name in names]


class _LinearLoras:
    """A linear layer and the adapters that touch it.

    Args:
        layer: whose output it is.
        inner: what the base makes of the layer's input.
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
        self._stack = LoraStack()
        self.loras = loras

    @classmethod
    def of_peft(cls, layer: Any) -> _LinearLoras:
        """Of peft's layer around the base's, and all adapters on it."""
        loras: dict[str | None, Lora] = {
            name: Lora(down.weight.detach().t(), layer.lora_B[name].weight.detach().t(), layer.scaling[name])
            for name, down in layer.lora_A.items()
        }
        return cls(layer, layer.base_layer, loras, rounded=False)

    @classmethod
    def of_base(cls, layer: nn.Module) -> _LinearLoras:
        """Of the base's own layer, without adapters yet."""
        # In 4 bits, whose weights are whole numbers, peft rounds so (peft/tuners/lora/bnb.py).
        return cls(layer, layer.forward, {}, rounded=not layer.get_parameter("weight").is_floating_point())

    def put(self, name: str, lora: Lora) -> None:
        """Have an adapter, or have it otherwise from now on."""
        self._stack.forget(name)
        self.loras[name] = lora

    def drop(self, name: str) -> None:
        """Forget an adapter; nothing happens if it is not (or no longer) here."""
        self._stack.forget(name)
        self.loras.pop(name, None)

    @contextmanager
    def answering(self, rows: _Rows) -> Iterator[None]:
        """While this is open, the layer answers so."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = self._inner(x, *args, **kwargs)
            touched = any(name in self.loras for name in rows.names)
            return self._changed(result, x, rows) if touched else result

        self._layer.forward = forward
        try:
            yield
        finally:
            del self._layer.forward

    def _changed(self, result: Tensor, x: Tensor, rows: _Rows) -> Tensor:
        """What the base made of x [rows, ..., in], plus each row's adapter's change."""
        inputs = rows.inputs(x, next(iter(self.loras.values())).down.dtype)
        base = rows.together(result)
        sums = torch.zeros_like(base, dtype=inputs.dtype) if self._rounded else base.to(inputs.dtype)
        flat, tokens = sums.view(-1, sums.shape[-1]), len(inputs) // len(result)
        if rows.placed is not None and tokens == 1:
            self._stack.hold(rows.placed, self.loras)
            rows.add_gathered(flat, self._stack.changes(rows.spread(inputs)))
        else:
            sizes = [size * tokens for size in rows.sizes]
            for name, part, own in zip(rows.names, flat.split(sizes), inputs.split(sizes), strict=True):
                lora = self.loras.get(name)
                if lora is not None:
                    part.addmm_(own.mm(lora.down), lora.up, alpha=lora.scale)
        changed = sums.to(result.dtype)
        return rows.apart(base + changed if self._rounded else changed)


@contextmanager
def _by_peft(layer: Any, names: list[str]) -> Iterator[None]:
    """While this is open, PEFT tells the layer's rows apart."""

    def name_rows(_layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    hook = layer.register_forward_pre_hook(name_rows, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _is_plain(layer: Any) -> bool:
    """Whether it is a linear layer with nothing but two matrices for each adapter."""
    return (
        type(layer) is Linear
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and len({weight.dtype for loras in (layer.lora_A, layer.lora_B) for weight in loras.parameters()}) == 1
    )
