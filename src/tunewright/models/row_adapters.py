"""Which adapter answers which row of a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from tunewright.errors import UserError

BASE_ROW = "__base__"
"""PEFT's name for a row without an adapter."""


class RowAdapters:
    """The LoRA layers of a model, and which adapter answers which row of a pass.

    PEFT's own ``forward(adapter_names=...)`` does the same, but looks for the layers anew in every pass (a quarter of
    the time of a short one), leaves its hooks behind when a pass fails, and needs ten operations a layer for each
    adapter. Here it is two (:class:`_Rows`), so that a batch of many adapters is nearly as fast as one of one.

    Rows of one pass cannot be told apart where DoRA is involved (peft refuses). Rows that are not ``mixed`` need not
    be: then the one adapter is switched on for the pass, or all are off.
    """

    def __init__(self, model: Any, *, mixed: bool) -> None:
        assert not model.training, "decoding needs eval mode"
        self._model = model
        self._alone = False
        self._names: set[str] = set()
        self._linear: list[_LinearLoras] = []
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
        layers = [part for part in model.modules() if isinstance(part, (LoraLayer, AuxiliaryTrainingWrapper))]
        self._linear = [_LinearLoras(layer) for layer in layers if _is_plain(layer)]
        self._layers = [layer for layer in layers if not _is_plain(layer)]

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
            for loras in self._linear:
                stack.enter_context(loras.answering(rows))
            for layer in self._layers:
                stack.enter_context(_by_peft(layer, [BASE_ROW if name is None else name for name in names]))
            yield


class _Rows:
    """The rows of a pass in the order of their adapters, those of the base last.

    Args:
        names: each row's adapter.
    """

    def __init__(self, names: Sequence[str | None], device: torch.device) -> None:
        order = sorted(range(len(names)), key=lambda row: (names[row] is None, names[row] or ""))
        counts = Counter(names[row] for row in order)
        self.names, self.sizes = list(counts), list(counts.values())
        """The adapters in that order, and how many rows each has."""
        self.any = self.names != [None]
        self._moved = order != sorted(order)
        if self._moved:
            self._order = torch.tensor(order, device=device)
            self._back = self._order.argsort()

    def together(self, states: Tensor) -> Tensor:
        """From the batch's order [rows, ...] to the adapters'."""
        return states.index_select(0, self._order) if self._moved else states

    def apart(self, states: Tensor) -> Tensor:
        """From the adapters' order [rows, ...] to the batch's."""
        return states.index_select(0, self._back) if self._moved else states


@dataclass(frozen=True)
class _Lora:
    """One adapter's matrices of a layer, as they are multiplied with: [in, rank] and [rank, out]."""

    down: Tensor
    up: Tensor
    scale: float


class _LinearLoras:
    """A linear layer and the adapters that touch it."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._loras: dict[str | None, _Lora] = {
            name: _Lora(down.weight.detach().t(), layer.lora_B[name].weight.detach().t(), layer.scaling[name])
            for name, down in layer.lora_A.items()
        }
        self._dtype = next(iter(self._loras.values())).down.dtype

    @contextmanager
    def answering(self, rows: _Rows) -> Iterator[None]:
        """While this is open, the layer answers so."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = self._layer.base_layer(x, *args, **kwargs)
            return self._changed(result, x, rows) if rows.any else result

        self._layer.forward = forward
        try:
            yield
        finally:
            del self._layer.forward

    def _changed(self, result: Tensor, x: Tensor, rows: _Rows) -> Tensor:
        """What the base made of x [rows, ..., in], plus each row's adapter's change."""
        tokens = x[0].numel() // x.shape[-1]
        own = rows.together(x).to(self._dtype).reshape(-1, x.shape[-1])
        change = own.new_empty(len(own), result.shape[-1])
        sizes = [size * tokens for size in rows.sizes]
        for name, part, inputs in zip(rows.names, change.split(sizes), own.split(sizes), strict=True):
            lora = self._loras.get(name)
            if lora is None:
                part.zero_()
            else:
                # With beta 0, what is in ``part`` before does not count.
                torch.addmm(part, inputs.mm(lora.down), lora.up, beta=0, alpha=lora.scale, out=part)
        return (result + rows.apart(change.view(result.shape))).to(result.dtype)


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
