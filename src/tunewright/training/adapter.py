"""The LoRA configuration that a config describes, and the precision of its weights."""

from __future__ import annotations

from typing import Any

from tunewright.config import TrainConfig
from tunewright.core.errors import UserError
from tunewright.models.families import OUTSIDE_TEXT
from tunewright.models.loading import device


def lora_config(settings: TrainConfig, *, vision: bool = False) -> Any:
    """Return peft's ``LoraConfig`` for these settings; ``vision`` says that the base reads images too."""
    from peft import LoraConfig, TaskType

    from tunewright.training.lora import use_fused_lora

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
        # Dropped from the model here, but there wherever else peft loads the adapter.
        exclude_modules=OUTSIDE_TEXT if vision else None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    use_fused_lora(config, settings.quantization)
    return config


def require_precision(settings: TrainConfig) -> None:
    """Check that the card, where there is one, computes in the config's precision.

    Raises:
        UserError: bfloat16 on a card before Ampere, which only emulates it; FlashAttention refuses such a card.
    """
    import torch

    if settings.dtype != "bfloat16" or not torch.cuda.is_available():
        return
    place = device()
    major, minor = torch.cuda.get_device_capability(place)
    if (major, minor) < (8, 0):
        name = torch.cuda.get_device_name(place)
        raise UserError(
            f"bfloat16 needs a card of compute capability 8.0 (Ampere) or later, and {name} has {major}.{minor}",
            where="train.dtype",
            fix="Set train.dtype: float32; with train.quantization: nf4 the base still takes half a byte a weight.",
        )


def keep_float32(model: Any) -> None:
    """Hold the trained weights in float32, before an optimizer is made.

    trl 1.16 turns those over a quantized base into bfloat16 as it takes the model, and an update of AdamW is often less
    than half of what a bfloat16 can tell apart. No value is lost by it: A was rounded when it was drawn (peft draws it
    in the base's precision, over a 16-bit base too), B is zero, and DoRA's magnitudes trl leaves alone.
    """
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
