"""Models with a random adapter, and the reference for batches: each row alone through transformers' own code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from tunewright.config import Quantization
from tunewright.training.lora import use_fused_lora
from tunewright.training.rows import IGNORED

Rows = list[list[int]]


def with_lora(
    base: Any,
    targets: Sequence[str],
    *,
    fused: bool = False,
    quantization: Quantization = "none",
    name: str = "default",
) -> Any:
    """Return the model with an adapter whose B matrices are not zero, so that A's gradients are not zero either."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=list(targets))
    if fused:
        use_fused_lora(lora, quantization)
    model: Any = get_peft_model(base, lora, name)
    torch.manual_seed(1)
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.2)
    return model.train()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the adapter's weights by name."""
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def separate_losses(model: Any, rows: Rows, labels: Rows) -> Tensor:
    """Return the losses of the trained tokens, row after row, each row alone in transformers' own forward."""
    losses = []
    for row, label in zip(rows, labels, strict=True):
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1].float()
        wanted = torch.tensor(label[1:])
        losses.append(cross_entropy(logits, wanted, reduction="none")[wanted != IGNORED])
    return torch.cat(losses)


def assert_equal_gradients(ours: dict[str, Tensor], reference: dict[str, Tensor], within: float = 1e-5) -> None:
    """Within float32 rounding: relative 1e-5 for each LoRA matrix's gradient as a whole.

    A gradient that cancels out (of the query's weights, where there is but one key) is compared with the whole:
    a tenth of it times 1e-5 is eight times float32's own step.
    """
    assert ours.keys() == reference.keys()
    whole = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
    for name, gradient in ours.items():
        difference = (gradient - reference[name]).norm()
        assert difference <= within * max(reference[name].norm(), whole / 10), name
