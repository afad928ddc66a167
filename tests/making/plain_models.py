"""Tiny models that packed rows cannot train: linear attention, state spaces, convolutions, chunked attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from making.tiny_bases import byte_tokenizer

Hybrid = Literal["qwen3.5", "granite-hybrid", "mamba2", "falcon-mamba", "lfm2", "llama4"]
HYBRIDS: tuple[Hybrid, ...] = get_args(Hybrid)

VOCABULARY = 61

TARGETS: dict[Hybrid, list[str]] = {
    "qwen3.5": ["in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "v_proj", "o_proj", "down_proj"],
    "granite-hybrid": ["in_proj", "q_proj", "v_proj", "o_proj", "input_linear", "output_linear"],
    "mamba2": ["in_proj"],
    "falcon-mamba": ["in_proj", "x_proj"],
    "lfm2": ["in_proj", "q_proj", "v_proj", "w2"],
    "llama4": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
"""Linear layers to adapt."""


def hybrid_model(kind: Hybrid, seed: int = 0, **changes: Any) -> Any:
    """Return a random model in float32, in eval mode, whose norms and biases are random too."""
    import torch
    import transformers

    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    shape |= {"max_position_embeddings": 2048}
    shape |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **changes}
    config: Any
    match kind:
        case "qwen3.5":
            config = transformers.Qwen3_5TextConfig(
                **shape,
                head_dim=8,
                layer_types=["linear_attention", "full_attention"],
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
            )
            name = "Qwen3_5ForCausalLM"
        case "granite-hybrid":
            config = transformers.GraniteMoeHybridConfig(
                **shape,
                layer_types=["linear_attention", "full_attention"],
                num_local_experts=0,
                num_experts_per_tok=0,
                shared_intermediate_size=48,
                mamba_n_heads=8,
                mamba_d_head=8,
                mamba_d_state=16,
                mamba_chunk_size=8,
                mamba_proj_bias=True,
                embedding_multiplier=3.0,
                logits_scaling=2.0,
                residual_multiplier=0.7,
            )
            name = "GraniteMoeHybridForCausalLM"
        case "mamba2":
            config = transformers.Mamba2Config(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=2,
                num_heads=8,
                head_dim=8,
                state_size=16,
                n_groups=2,
                chunk_size=8,
                use_bias=True,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
            name = "Mamba2ForCausalLM"
        case "falcon-mamba":
            config = transformers.FalconMambaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=2,
                state_size=8,
                time_step_rank=4,
                use_bias=True,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
            name = "FalconMambaForCausalLM"
        case "lfm2":
            config = transformers.Lfm2Config(
                **shape, layer_types=["conv", "full_attention"], conv_bias=True, block_auto_adjust_ff_dim=False
            )
            name = "Lfm2ForCausalLM"
        case "llama4":
            config = transformers.Llama4TextConfig(
                **shape | {"num_hidden_layers": 4},
                head_dim=8,
                intermediate_size_mlp=48,
                num_local_experts=4,
                num_experts_per_tok=1,
                interleave_moe_layer_step=2,
                attention_chunk_size=8,
                no_rope_layers=[1, 1, 1, 0],
            )
            name = "Llama4ForCausalLM"
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).float()
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data.add_(0.2 * torch.randn_like(weight))
        else:
            weight.data.normal_(std=0.15)
    return model.eval()


def build_hybrid(folder: Path, kind: Hybrid) -> Path:
    """Write a tiny base of this kind, with a byte-level tokenizer, into ``folder``."""
    tokenizer = byte_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = hybrid_model(kind, vocab_size=len(tokenizer), max_position_embeddings=2048, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
