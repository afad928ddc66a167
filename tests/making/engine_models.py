"""A tiny base and adapters on disk, as every engine takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from making.tiny_bases import byte_tokenizer
from tunewright.adapters.registry import adapter_digest

CONTEXT = 512
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_base(folder: Path) -> Path:
    """Random weights that have opinions; heads of 32, the least that vLLM has kernels for."""
    tokenizer = byte_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, *, seed: int, rank: int = 4) -> tuple[str, Path]:
    """An adapter that changes every answer: its digest and folder."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM.from_pretrained(base)
    wrapped: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    wrapped.save_pretrained(folder)
    return adapter_digest(folder), folder
