"""peft's LoRA layer as one autograd step, over linear layers and packed 4-bit weights."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class FusedLinear(Linear):
    """peft's LoRA layer with x W^T + s (x A^T) B^T and its gradient as one autograd step.

    peft's own layer copies x to the adapter's float32, and writes the adapter's output three times: to compute, scale
    and add it. On short rows that is noticeable next to the base's matrix products. Dropout, DoRA, a bias, several
    adapters, and merged or disabled adapters are left to peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output [..., out] for x [..., in]."""
        base: Any = self.get_base_layer()
        if args or kwargs or base.weight.requires_grad or not adds_one_adapter(self):
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        return fused(self, x, None)


def adds_one_adapter(layer: Any) -> bool:
    """Return whether exactly one plain adapter is active on a peft layer whose base has no bias."""
    if layer.disable_adapters or layer.merged or layer.get_base_layer().bias is not None:
        return False
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A.keys():  # noqa: SIM118
        return False
    (name,) = layer.active_adapters
    no_dropout = isinstance(layer.lora_dropout[name], nn.Identity)
    return no_dropout and name not in layer.lora_variant and layer.lora_B[name].bias is None


def fused(layer: Any, x: Tensor, packed: Any) -> Tensor:
    """Return the output [..., out] of a peft layer with one active adapter, for x [..., in].

    Args:
        layer: the layer.
        x: its input.
        packed: bitsandbytes' ``QuantState`` of the base's weight; None for an unquantized weight.
    """
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    out: Tensor = _FusedLora.apply(x, layer.get_base_layer().weight, packed, a, b, layer.scaling[name])
    return out


class _FusedLora(torch.autograd.Function):
    """x W^T + s (x A^T) B^T, where W gets no gradient.

    Shapes: x [..., in], W [out, in], A [rank, in], B [out, rank]. It computes in W's dtype, or in x's if W is packed in
    4 bits; the gradients of A and B have their own dtype. A packed W is not kept unpacked: the backward pass unpacks it
    again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packed: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        dtype = weight.dtype if packed is None else x.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)  # [tokens, in]
        low_a, low_b = a.to(dtype), (b * scale).to(dtype)
        inner = rows @ low_a.T  # [tokens, rank]
        out = rows @ weight.T if packed is None else _times_packed(rows, weight, packed)  # [tokens, out]
        out.addmm_(inner, low_b.T)
        ctx.save_for_backward(rows, weight, low_a, low_b, inner)
        ctx.packed = packed
        ctx.scale, ctx.shape, ctx.types = scale, x.shape, (x.dtype, a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, low_a, low_b, inner = ctx.saved_tensors
        x_type, a_type, b_type = ctx.types
        # With y = x W^T + s (x A^T) B^T and g = dL/dy: dA = (g sB)^T x, dB = s g^T (x A^T), dx = g W + (g sB) A.
        grad = grad.reshape(-1, grad.shape[-1])  # [tokens, out]
        grad_inner = grad @ low_b  # [tokens, rank]; low_b includes s
        grad_a = (grad_inner.T @ rows).to(a_type)
        grad_b = (grad.T @ inner).to(b_type).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            unpacked = weight if ctx.packed is None else _unpacked(weight, ctx.packed, grad.dtype)
            grad_x = (grad @ unpacked).addmm_(grad_inner, low_a).view(ctx.shape).to(x_type)
        return grad_x, None, None, grad_a, grad_b, None


def _times_packed(rows: Tensor, weight: Tensor, packed: Any) -> Tensor:
    """Return rows [tokens, in] times the transpose of a 4-bit weight [out, in] as a new tensor [tokens, out]."""
    from bitsandbytes.autograd._functions import matmul_4bit

    out: Tensor = matmul_4bit(rows, weight, quant_state=packed)
    return out


def _unpacked(weight: Tensor, packed: Any, dtype: torch.dtype) -> Tensor:
    """Return a 4-bit weight as [out, in]."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, packed).to(dtype)
