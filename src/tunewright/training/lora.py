"""LoRA's linear layer as one step of autograd: the same numbers as peft's, in fewer passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def use_fused_lora(config: LoraConfig) -> None:
    """Have peft build its LoRA layers over plain linear layers as `FusedLinear`; the adapter's files are the same."""
    config._register_custom_module({nn.Linear: FusedLinear})


class FusedLinear(Linear):
    """peft's LoRA layer, which computes x W^T + s (x A^T) B^T and its gradient as one step where that is all there is.

    peft's own way copies x to the adapter's float32, and writes the adapter's output to compute it, to scale it and to
    add it; on short rows that shows beside the base's own matrix products. Whatever asks for more (dropout, DoRA,
    a bias, several adapters, merged or disabled ones) goes peft's way.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for x [..., in]: [..., out]."""
        if args or kwargs or not self._is_plain():
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        (name,) = self.active_adapters
        base = self.get_base_layer()
        a, b = self.lora_A[name], self.lora_B[name]
        fused: Tensor = _FusedLora.apply(x, base.weight, a.weight, b.weight, self.scaling[name])
        return fused

    def _is_plain(self) -> bool:
        """Whether one adapter is on, and is all that there is to add to a frozen layer without a bias."""
        base: Any = self.get_base_layer()
        if self.disable_adapters or self.merged or base.bias is not None or base.weight.requires_grad:
            return False
        if len(self.active_adapters) != 1 or self.active_adapters[0] not in self.lora_A.keys():  # noqa: SIM118
            return False
        (name,) = self.active_adapters
        no_dropout = isinstance(self.lora_dropout[name], nn.Identity)
        return no_dropout and name not in self.lora_variant and self.lora_B[name].bias is None


class _FusedLora(torch.autograd.Function):
    """x W^T + s (x A^T) B^T, of which W gets no gradient.

    Shapes: x [..., in], W [out, in], A [rank, in], B [out, rank]. Computed in W's type; A's and B's gradients are in
    their own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        low_a, low_b = a.to(weight.dtype), (b * scale).to(weight.dtype)
        inner = rows @ low_a.T
        out = (rows @ weight.T).addmm_(inner, low_b.T)
        ctx.save_for_backward(rows, weight, low_a, low_b, inner)
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
            grad_x = (grad @ weight).addmm_(grad_inner, low_a).view(ctx.shape).to(x_type)
        return grad_x, None, grad_a, grad_b, None
