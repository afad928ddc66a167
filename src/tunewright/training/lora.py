"""The LoRA configuration of a run, and linear layers that compute base and LoRA as one autograd step.

The fused layers compute the same numbers as peft's with fewer passes over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, TaskType
from torch import nn

from tunewright.config import Quantization, TrainConfig
from tunewright.core.errors import UserError
from tunewright.models.families import OUTSIDE_TEXT
from tunewright.models.loading import device
from tunewright.training.fused_lora import FusedLinear


def lora_config(settings: TrainConfig, *, vision: bool = False) -> Any:
    """Return peft's ``LoraConfig`` for these settings; ``vision`` means that the base also reads images."""
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
        # The vision tower is dropped here, but present wherever else peft loads the adapter.
        exclude_modules=OUTSIDE_TEXT if vision else None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    use_fused_lora(config, settings.quantization)
    return config


def require_precision(settings: TrainConfig) -> None:
    """Check that the GPU, if there is one, supports the config's precision.

    Raises:
        UserError: bfloat16 on a GPU before Ampere, which only emulates it, and which FlashAttention rejects.
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

    trl 1.16 converts those over a quantized base to bfloat16, where an AdamW update is often too small to change a
    weight. The conversion back loses nothing. A was rounded when peft drew it in the base's precision, B is zero, and
    trl leaves DoRA's magnitudes alone.
    """
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def use_fused_lora(config: LoraConfig, quantization: Quantization = "none") -> None:
    """Have peft build fused LoRA layers over linear layers; the adapter's files stay the same.

    Args:
        config: is changed.
        quantization: how the base is quantized. Over 4-bit layers `lora_4bit.FusedLinear4bit` is built.
    """
    if quantization == "nf4":
        # Imported here because it needs bitsandbytes. Registered first, because peft takes the first match and a 4-bit
        # layer is an nn.Linear too.
        from bitsandbytes.nn import Linear4bit

        from tunewright.training.lora_4bit import FusedLinear4bit

        config._register_custom_module({Linear4bit: FusedLinear4bit})
    config._register_custom_module({nn.Linear: FusedLinear})
