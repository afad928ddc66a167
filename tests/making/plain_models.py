"""Shrunk models that packed rows cannot train: linear attention, state spaces, convolutions, chunked attention."""

from __future__ import annotations

from typing import Any, Literal, get_args

from making.tiny_bases import shrunk_config
from tunewright.models.families import shape_of
from tunewright.models.shrunk import random_model

Hybrid = Literal["qwen3_5_text", "granitemoehybrid", "lfm2", "llama4_text"]
HYBRIDS: tuple[Hybrid, ...] = get_args(Hybrid)
PUBLISHED: dict[Hybrid, tuple[str, dict[str, Any]]] = {
    "qwen3_5_text": ("Qwen3_5ForCausalLM", {}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", {"layer_types": ["mamba", "attention"] * 16}),
    "lfm2": (
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"] * 16, "conv_bias": True, "block_auto_adjust_ff_dim": False},
    ),
    "llama4_text": ("Llama4ForCausalLM", {}),
}
"""Their classes, and the keys of their configurations that are not transformers' defaults."""


def hybrid_model(kind: Hybrid) -> Any:
    """Return a random model in float32, in eval mode, whose norms and biases are random too."""
    architecture, values = PUBLISHED[kind]
    return random_model(shrunk_config(kind, **values), architecture)


def targets(model: Any) -> tuple[str, ...]:
    """Return the linear layers that LoRA adapts."""
    return shape_of(model.config, type(model).__name__).names
