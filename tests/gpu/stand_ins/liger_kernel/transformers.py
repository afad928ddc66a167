"""One operation for each kernel of Liger 0.8.5 that training uses, with the tensors that the kernel reads and writes.

They are counted by the source of ops/rms_norm.py, ops/rope.py and ops/swiglu.py: weights are frozen, so the norm's
backward pass computes no gradient for them; the other backward passes write over their inputs, as Liger's do.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("liger_stand_in", "DEF")
_OPERATIONS: dict[str, Any] = {
    "rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)": lambda x, _: (
        torch.empty_like(x),
        x.new_empty(x.shape[:-1].numel(), dtype=torch.float32),
    ),
    "rms_norm_backward(Tensor(a!) grad, Tensor x, Tensor weight, Tensor scale) -> ()": lambda *_: None,
    "rope(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()": lambda *_: None,
    "swiglu(Tensor gate, Tensor up) -> Tensor": lambda gate, _: torch.empty_like(gate),
    "swiglu_backward(Tensor grad, Tensor(a!) gate, Tensor(b!) up) -> ()": lambda *_: None,
}
for _schema, _made in _OPERATIONS.items():
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.partition("(")[0], _made, "Meta")
_ops: Any = torch.ops.liger_stand_in


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out, scale = _ops.rms_norm(x, weight)
        ctx.save_for_backward(x, weight, scale)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        _ops.rms_norm_backward(grad, *ctx.saved_tensors)
        return grad, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor | None, ...]:
        return (*_rotated(q, k, *ctx.saved_tensors), None, None)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k [batch, heads, tokens, head] where they are, by the first half of each row of cos and sin."""
    q, k = (each.transpose(1, 2).contiguous() for each in (q, k))
    half = cos.shape[-1] // 2
    _ops.rope(q, k, cos[..., :half], sin[..., :half])
    return q.transpose(1, 2), k.transpose(1, 2)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out: Tensor = _ops.swiglu(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        _ops.swiglu_backward(grad.contiguous(), gate, up)
        return gate, up


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> Any:
    return _Rope.apply(q, k, cos, sin)


def _apply_liger_kernel_to_instance(
    model: Any, rope: bool, rms_norm: bool, swiglu: bool, cross_entropy: bool, fused_linear_cross_entropy: bool
) -> None:
    assert (rope, rms_norm, swiglu, cross_entropy, fused_linear_cross_entropy) == (True, True, True, False, False)
    modeling = vars(sys.modules[type(model).__module__])
    modeling["apply_rotary_pos_emb"] = _rope
    for layer in model.modules():
        kind = type(layer).__name__
        if kind.endswith("RMSNorm"):
            layer.forward = partial(lambda norm, x: _Norm.apply(x, norm.weight), layer)
            modeling[kind] = None  # Liger's own class, which models loaded later would get
        elif kind.endswith("MLP"):
            layer.forward = partial(
                lambda mlp, x: mlp.down_proj(_SwiGLU.apply(mlp.gate_proj(x), mlp.up_proj(x))), layer
            )
            modeling[kind] = None
