"""A shrunk copy of a base: the same configuration with small widths, one layer of each kind, and random weights.

Norms, biases and sinks are random, windows are short and caps are low, so that a fault in any of them changes what the
copy computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tunewright.models import quiet_transformers

WINDOW = 16
VOCABULARY = 256
_HIDDEN, _INTERMEDIATE, _CAP = 128, 96, 2.0
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")
_NAMED = ("moe_layers", "mlp_only_layers")
"""Lists of the layers of a kind."""
_SOURCES = "kv_source_layers"
_SIZES = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "index_topk": WINDOW,
    "floor_scale": WINDOW,
    "attn_logit_softcapping": _CAP,
    "final_logit_softcapping": _CAP,
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_CHOSEN, 2),
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Values of the copy, for the keys that the configuration has and that are not null or 0."""


def shrunk(whole: Any) -> Any:
    """Return the copy's configuration, of the same class."""
    values = whole.to_dict()
    nested = "text_config" in values
    text = values["text_config"] if nested else values
    for part in [values[key] for key in ("vision_config", "audio_config") if isinstance(values.get(key), dict)]:
        # Widths stay: towers are built and dropped.
        part.update({key: 1 for key in ("num_hidden_layers", "depth", "num_layers") if key in part})
    _shrink_layers(text)
    _shrink_widths(text)
    for key, value in _SIZES.items():
        if text.get(key):
            text[key] = value
    for key in [key for key in text if "intermediate_size" in key and isinstance(text[key], int) and text[key]]:
        text[key] = _INTERMEDIATE
    if nested:
        values.update({key: value for key, value in _SIZES.items() if key.endswith("token_id") and values.get(key)})
    return type(whole).from_dict(values)


def _shrink_layers(text: dict[str, Any]) -> None:
    """Keep the first layer of each kind, by every list in the configuration that has an entry for each layer."""
    layers = text["num_hidden_layers"]
    lists = {
        key: value
        for key, value in text.items()
        if isinstance(value, list) and len(value) == layers and key not in (*_NAMED, _SOURCES)
    }
    named = {key: [layer in text[key] for layer in range(layers)] for key in _NAMED if text.get(key)}
    # The layer whose keys and values each layer reads: its own, or an earlier one's.
    own = [source == layer for layer, source in enumerate(text.get(_SOURCES) or range(layers))]
    kinds: dict[str, int] = {}
    for layer in range(layers):
        kinds.setdefault(str([each[layer] for each in (*lists.values(), *named.values(), own)]), layer)
    kept = sorted(kinds.values())
    if text.get("num_kv_shared_layers"):
        # Later layers read the keys and values of the last layer of their kind that computes its own.
        text["num_kv_shared_layers"] = len(kept)
        kept += kept
    if len(kept) < 2:
        kept = list(range(max(2, text.get("decoder_sparse_step") or 0)))[:layers]
    text.update({key: [value[layer] for layer in kept] for key, value in lists.items()})
    text.update({key: [new for new, old in enumerate(kept) if each[old]] for key, each in named.items()})
    if text.get(_SOURCES):
        text[_SOURCES] = [new if own[old] else max(0, new - 1) for new, old in enumerate(kept)]
    if differing := text.get("per_layer_config"):
        differing = {int(layer): values for layer, values in differing.items()}
        text["per_layer_config"] = {new: differing[old] for new, old in enumerate(kept) if old in differing}
    text["num_hidden_layers"] = len(kept)


def _shrink_widths(text: dict[str, Any]) -> None:
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    groups = text.get("num_key_value_heads") or heads
    # The size of a head stays: factors of rotary embeddings are given for it.
    head = text.get("head_dim") or hidden // heads
    text["num_attention_heads"] = 2 if groups == heads else 4
    for part in (text, *(text.get("per_layer_config") or {}).values()):
        for key in [key for key in part if key.endswith("key_value_heads") and part[key]]:
            part[key] = 1 if groups == 1 else 2
    text["hidden_size"] = _HIDDEN if text.get("head_dim") else text["num_attention_heads"] * head
    rope = text.get("rope_parameters") or {}
    if "llama_4_scaling_beta" in rope:  # attention sharpens with the distance, from this position on
        rope["original_max_position_embeddings"] = WINDOW
    if text.get("mamba_d_head"):
        text["mamba_n_heads"] = text.get("mamba_expand", 2) * text["hidden_size"] // text["mamba_d_head"]


def random_model(config: Any, architecture: str, seed: int = 0) -> Any:
    """Return a model of this configuration in float32 and eval mode, whose weights are all random."""
    import transformers

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = getattr(transformers, architecture)(config).float().eval()
        with torch.no_grad():
            for name, weight in {**_bias_buffers(model), **dict(model.named_parameters())}.items():
                if weight.dim() < 2:
                    # Added, because norms start at 1 in some models and at 0 in others.
                    spread = 2.0 if "sink" in name else 0.3
                    weight.add_(torch.randn_like(weight) * spread)
                elif "embed" in name:
                    weight.normal_()
                else:
                    weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)
    return model


def _bias_buffers(model: Any) -> Mapping[str, Any]:
    """Return buffers that are learned, such as a router's correction."""
    return {
        name: buffer for name, buffer in model.named_buffers() if name.endswith("bias") and buffer.is_floating_point()
    }
