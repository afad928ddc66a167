"""LoRA's linear layers as one step of autograd: the same numbers as peft's, in fewer passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from tunewright.config import Quantize


def use_fused_lora(config: LoraConfig, quantize: Quantize = "none") -> None:
    """Have peft build its LoRA layers over linear layers as ours; the adapter's files are the same.

    Args:
        config: is changed.
        quantize: how the base is held. Over 4-bit layers `lora_4bit.FusedLinear4bit` is built.
    """
    if quantize == "nf4":
        # Imported here because it needs bitsandbytes. The first entry that fits counts, and a layer in 4 bits is an
        # nn.Linear too.
        from bitsandbytes.nn import Linear4bit

        from tunewright.training.lora_4bit import FusedLinear4bit

        config._register_custom_module({Linear4bit: FusedLinear4bit})
    config._register_custom_module({nn.Linear: FusedLinear})


class FusedLinear(Linear):
    """peft's LoRA layer, which computes x W^T + s (x A^T) B^T and its gradient as one step where that is all there is.

    peft's own way copies x to the adapter's float32, and writes the adapter's output to compute it, to scale it and to
    add it; on short rows that shows next to the base's own matrix products. Dropout, DoRA, a bias, several adapters,
    and merged or disabled ones are left to peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output for x [..., in]: [..., out]."""
        base: Any = self.get_base_layer()
        if args or kwargs or base.weight.requires_grad or not adds_one_adapter(self):
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        return fused(self, x, None)


def adds_one_adapter(layer: Any) -> bool:
    """Return whether one adapter is on, and is all that there is to add to a layer of peft without a bias."""
    if layer.disable_adapters or layer.merged or layer.get_base_layer().bias is not None:
        return False
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A.keys():  # noqa: SIM118
        return False
    (name,) = layer.active_adapters
    no_dropout = isinstance(layer.lora_dropout[name], nn.Identity)
    return no_dropout and name not in layer.lora_variant and layer.lora_B[name].bias is None


def fused(layer: Any, x: Tensor, packed: Any) -> Tensor:
    """Return the output [..., out] of a layer of peft that adds one adapter, for x [..., in].

    Args:
        layer: the layer.
        x: its input.
        packed: bitsandbytes' ``QuantState`` of the base's weight; None where that is whole.
    """
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    out: Tensor = _FusedLora.apply(x, layer.get_base_layer().weight, packed, a, b, layer.scaling[name])
    return out


class _FusedLora(torch.autograd.Function):
    """x W^T + s (x A^T) B^T, of which W gets no gradient.

    Shapes: x [..., in], W [out, in], A [rank, in], B [out, rank]. Computed in W's type, or in x's where W is packed in
    4 bits; A's and B's gradients are in their own. A packed W is unpacked in the backward pass again, not kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packed: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        dtype = weight.dtype if packed is None else x.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        low_a, low_b = a.to(dtype), (b * scale).to(dtype)
        inner = rows @ low_a.T
        out = rows @ weight.T if packed is None else _times_packed(rows, weight, packed)
        out.addmm_(inner, low_b.T)
        ctx.save_for_backward(rows, weight, low_a, low_b, inner)
        ctx.packed = packed
        ctx.scale, ctx.shape, ctx.types = scale, x.shape, (x.dtype, a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, low_a, low_b, inner = ctx.saved_tensors
        x_type, a_type, b_type = ctx.types
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = grad @ low_b
        grad_a = (grad_inner.T @ rows).to(a_type)
        grad_b = (grad.T @ inner).to(b_type).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            whole = weight if ctx.packed is None else _unpacked(weight, ctx.packed, grad.dtype)
            grad_x = (grad @ whole).addmm_(grad_inner, low_a).view(ctx.shape).to(x_type)
        return grad_x, None, None, grad_a, grad_b, None


def _times_packed(rows: Tensor, weight: Tensor, packed: Any) -> Tensor:
    """Return rows [tokens, in] times the transpose of a 4-bit weight [out, in]: [tokens, out], a tensor of its own."""
    from bitsandbytes.autograd._functions import matmul_4bit

    out: Tensor = matmul_4bit(rows, weight, quant_state=packed)
    return out


def _unpacked(weight: Tensor, packed: Any, dtype: torch.dtype) -> Tensor:
    """Return a 4-bit weight as [out, in]."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, packed).to(dtype)
