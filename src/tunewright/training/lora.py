"""The LoRA configuration of a run, and linear layers that compute base and LoRA as one autograd step.

The fused layers compute the same numbers as peft's with fewer passes over memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft import LoraConfig, TaskType
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from tunewright.adapters.lora_weights import EXPERT_PARAMETERS
from tunewright.config import Quantization, TrainConfig
from tunewright.config.train import EXPERTS
from tunewright.core.errors import UserError
from tunewright.models.loading import device


def lora_config(settings: TrainConfig, *, outside: str | None = None) -> Any:
    """Return peft's ``LoraConfig`` for these settings; ``outside`` matches the modules outside the text model."""
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=[name for name in settings.target_modules if name != EXPERTS],
        target_parameters=list(EXPERT_PARAMETERS) if EXPERTS in settings.target_modules else None,
        # A vision tower is dropped here, but present wherever else peft loads the adapter.
        exclude_modules=outside,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    use_fused_lora(config, settings.quantization)
    return config


def require_precision(settings: TrainConfig) -> None:
    """Check that the GPU, if there is one, supports the config's precision.

    Before Ampere GPUs only emulate bfloat16, and FlashAttention rejects it.
    """
    if settings.dtype != "bfloat16" or not torch.cuda.is_available():
        return
    place = device()
    major, minor = torch.cuda.get_device_capability(place)
    if (major, minor) < (8, 0):
        name = torch.cuda.get_device_name(place)
        raise UserError(
            f"bfloat16 needs a GPU of compute capability 8.0 (Ampere) or later; {name} has {major}.{minor}",
            where="train.dtype",
            fix="Set train.dtype: float32; with train.quantization: nf4 the base still takes half a byte per weight.",
        )


def keep_float32(model: Any) -> None:
    """Convert the trained weights to float32 before an optimizer is made.

    trl 1.16 converts trained weights over a quantized base to bfloat16, where an AdamW update is
    often too small to change a weight. The conversion back loses nothing. A was rounded when peft
    drew it in the base's precision, B is zero, and trl does not change DoRA's magnitudes.
    """
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def use_fused_lora(config: LoraConfig, quantization: Quantization = "none") -> None:
    """Change ``config`` to have peft build fused LoRA layers over linear layers; the adapter's files stay the same."""
    if quantization == "nf4":
        # Imported here because it needs bitsandbytes. Registered first, because peft takes the
        # first match and a 4-bit layer is also an nn.Linear.
        from bitsandbytes.nn import Linear4bit

        config._register_custom_module({Linear4bit: fused_linear_4bit()})
    config._register_custom_module({nn.Linear: FusedLinear})


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


@cache
def fused_linear_4bit() -> type[Any]:
    """Return `FusedLinear` over a 4-bit base; a class made on demand, because it needs bitsandbytes."""
    from peft.tuners.lora.bnb import Linear4bit

    class FusedLinear4bit(Linear4bit):
        """peft's LoRA layer over bitsandbytes' 4-bit layer, as one autograd step for a single plain adapter.

        peft's own layer clones the base's output, since autograd may refuse to add to what bitsandbytes returns, and
        writes the adapter's output to compute, scale and add it: four more tensors of the output's size. Dropout, DoRA,
        a bias, several adapters, and merged or disabled adapters are left to peft.
        """

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Return the layer's output [..., out] for x [..., in]."""
            base: Any = self.get_base_layer()
            # FSDP replaces the weight parameter in each pass, and bitsandbytes then sets its state again.
            packed = None if base.weight.is_floating_point() else base.weight.quant_state
            # bitsandbytes casts an input of another dtype, and a weight repacked for the CPU cannot be unpacked here.
            usual = x.dtype == base.compute_dtype and not getattr(packed, "packing_format_for_cpu", False)
            if args or kwargs or not usual or packed is None or not adds_one_adapter(self):
                plain: Tensor = super().forward(x, *args, **kwargs)
                return plain
            return fused(self, x, packed)

    return FusedLinear4bit


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

    ``packed`` is bitsandbytes' ``QuantState`` of the base's weight; None for an unquantized
    weight.
    """
    (name,) = layer.active_adapters
    weight, a, b = layer.get_base_layer().weight, layer.lora_A[name].weight, layer.lora_B[name].weight
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype if packed is None else x.dtype)  # [tokens, in]
    stand_in, inner, low_b = _FusedLora.apply(rows, weight, packed, a, b, layer.scaling[name])
    out: Tensor = _Output.apply(stand_in, rows.detach(), weight, packed, inner, low_b)
    return out.view(*x.shape[:-1], -1)


class _FusedLora(torch.autograd.Function):
    """The LoRA part of y = x W^T + s (x A^T) B^T, where W gets no gradient, and the gradient of all of y.

    Shapes: x [tokens, in], W [out, in], A [rank, in], B [out, rank]. It computes in x's dtype; the gradients of A and B
    have their own dtype. A packed W is not kept unpacked: the backward pass unpacks it again.

    It returns a stand-in for y without memory, x A^T and s B. `_Output` computes y from them and saves nothing. So
    where a recomputed layer ends with this one, recomputation stops before the product with W.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, packed: Any, a: Tensor, b: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Multiplied in b's dtype and rounded as it is stored: one kernel on a card.
        low_a, low_b = a.to(rows.dtype), torch.mul(b, scale, out=rows.new_empty(b.shape))
        inner = rows @ low_a.T  # [tokens, rank]
        ctx.save_for_backward(rows, weight, low_a, low_b, inner)
        ctx.packed, ctx.scale, ctx.types = packed, scale, (a.dtype, b.dtype)
        ctx.mark_non_differentiable(inner, low_b)
        ctx.set_materialize_grads(False)  # no zeros as the gradients of these two
        return rows.new_empty(1, 1).expand(len(rows), len(b)), inner, low_b

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rows, weight, low_a, low_b, inner = ctx.saved_tensors
        a_type, b_type = ctx.types
        # With g = dL/dy [tokens, out]: dA = (g sB)^T x, dB = s g^T (x A^T), dx = g W + (g sB) A.
        grad_inner = grad @ low_b  # [tokens, rank]; low_b includes s
        grad_a = (grad_inner.T @ rows).to(a_type)
        grad_b = (grad.T @ inner).to(b_type).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            unpacked = weight
            if ctx.packed is not None:
                from bitsandbytes.functional import dequantize_4bit

                unpacked = dequantize_4bit(weight, ctx.packed).to(grad.dtype)  # [out, in]
            grad_x = (grad @ unpacked).addmm_(grad_inner, low_a)
        return grad_x, None, None, grad_a, grad_b, None


class _Output(torch.autograd.Function):
    """x W^T + (x A^T) (s B)^T; its gradient goes to `_FusedLora`'s stand-in."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ARG004  (nothing is saved)
        stand_in: Tensor,  # noqa: ARG004
        rows: Tensor,
        weight: Tensor,
        packed: Any,
        inner: Tensor,
        low_b: Tensor,
    ) -> Tensor:
        if packed is None:
            out = rows @ weight.T  # [tokens, out]
        else:
            from bitsandbytes.autograd._functions import matmul_4bit

            out = matmul_4bit(rows, weight, quant_state=packed)
        return out.addmm_(inner, low_b.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        return grad, None, None, None, None, None
