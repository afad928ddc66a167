"""Loss and LoRA gradients of a packed batch against the same rows one by one, both against float32.

Two layers of 8B shape in bfloat16, or with linear layers in NF4. Row by row is transformers and peft alone: their
attention, their LoRA layers, and cross-entropy over all logits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gpu_cases.bases import build, shape_of
from gpu_cases.reporting import Report, relative_error
from tunewright.config import TrainConfig
from tunewright.models.families import Shape
from tunewright.models.loading import device
from tunewright.training.lora import keep_float32, lora_config
from tunewright.training.packing import attention, pack
from tunewright.training.packing.fused_loss import add_token_losses, batch_token_losses

BAR = 1.25
"""Packed may be this many times as far from float32 as the rows one by one are."""


def run(report: Report, toy: bool, *, nf4: bool) -> None:
    """Compare both at several numbers of rows: rounding of a shared prefix's gradients grows with them."""
    # Tensor cores would round float32 products to TF32, and the reference with them.
    torch.set_float32_matmul_precision("highest")
    shared, own, trained = (12, 6, 3) if toy else (384, 32, 16)
    shape = shape_of("8b", toy, layers=2)
    base, again = (_same_base(shape, nf4=nf4) for _ in range(2))
    in_float32 = _in_float32(base, build(shape, nf4=False))
    adapter: dict[str, Tensor] = {}
    packed = _adapted(base, adapter, ours=True)
    plain = _adapted(again, adapter, ours=False)
    exact = _adapted(in_float32, adapter, ours=False)
    for count in (1, 4, 8) if toy else (1, 8, 64, 256):
        drawn = torch.randint(5, shape.vocabulary, (count, shared + own)).tolist()
        rows = [drawn[0][:shared] + row[shared:] for row in drawn]
        labels = [[-100] * (len(row) - trained) + row[-trained:] for row in rows]
        loss, gradient = _packed(packed, rows, labels)
        plain_loss, plain_gradient = _one_by_one(plain, rows, labels)
        exact_loss, exact_gradient = _one_by_one(exact, rows, labels)
        errors = {
            "loss_error": abs(loss - exact_loss) / exact_loss,
            "gradient_error": relative_error(gradient, exact_gradient),
            "one_by_one_loss_error": abs(plain_loss - exact_loss) / exact_loss,
            "one_by_one_gradient_error": relative_error(plain_gradient, exact_gradient),
        }
        passed = errors["gradient_error"] <= BAR * errors["one_by_one_gradient_error"]
        report(f"{count} rows", passed, rows=count, loss=loss, **errors)


def _same_base(shape: Shape, *, nf4: bool) -> Any:
    """Return a base with the same weights at each call."""
    torch.manual_seed(0)
    return build(shape, nf4=nf4)


def _in_float32(base: Any, model: Any) -> Any:
    """Return ``model`` in float32 with the weights of ``base``, those in NF4 dequantized."""
    weights = {}
    for name, weight in base.named_parameters():
        state = getattr(weight, "quant_state", None)
        if state is None:
            weights[name] = weight
        else:
            from bitsandbytes.functional import dequantize_4bit

            weights[name] = dequantize_4bit(weight.data, state)
    model.load_state_dict(weights)
    return model.float()


def _adapted(base: Any, adapter: dict[str, Tensor], *, ours: bool) -> Any:
    """Return the base with an adapter of the same random weights on it, B not zero; ``adapter`` keeps the first's."""
    from peft import get_peft_model

    quantization: Literal["nf4", "none"] = "nf4" if getattr(base, "is_loaded_in_4bit", False) else "none"
    config = lora_config(TrainConfig(preset="all-linear", quantization=quantization))
    if ours:
        attention.register()
        base.set_attn_implementation(attention.NAME)
        add_token_losses(base)
    else:
        config._custom_modules = None  # peft's own layers
    model = get_peft_model(base, config)
    keep_float32(model)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = adapter.setdefault(name, torch.randn_like(weight) * 0.02).clone()
    return model.train()


def _packed(model: Any, rows: list[list[int]], labels: list[list[int]]) -> tuple[float, Tensor]:
    batch = pack(rows, labels, share=True).to(device())
    with torch.autocast(device().split(":")[0], dtype=torch.bfloat16):
        loss = batch_token_losses(model, batch).sum() / len(batch.targets)
    loss.backward()
    return float(loss), _taken(model)


def _one_by_one(model: Any, rows: list[list[int]], labels: list[list[int]]) -> tuple[float, Tensor]:
    place = device()
    total, count = 0.0, sum(label != -100 for row in labels for label in row)
    in_half = model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    for row, wanted in zip(rows, labels, strict=True):
        with torch.autocast(place.split(":")[0], dtype=torch.bfloat16, enabled=in_half):
            logits = model(input_ids=torch.tensor([row], device=place), use_cache=False).logits[0, :-1].float()
        target = torch.tensor(wanted[1:], device=place)
        loss = cross_entropy(logits, target, reduction="sum") / count
        loss.backward()
        total += float(loss)
    return total, _taken(model)


def _taken(model: Any) -> Tensor:
    """Return all gradients in one vector, and remove them."""
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])
    model.zero_grad(set_to_none=True)
    return gradient
