"""Tiny bases with random weights and a real tokenizer: whole enough to train, save, load and serve in a second."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any, Literal

from tunewright.chat import ChatFormat, chat_format

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> Any:
    """One token for each byte, and ChatML's special tokens: every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHATML
    return fast


def chat_of(tokenizer: Any, kind: Literal["own", "plain"] = "own", today: date = date(2024, 7, 26)) -> ChatFormat:
    """The format of a tokenizer's conversations, which end with its end of text alone."""
    return chat_format(tokenizer, stop_ids=frozenset([tokenizer.eos_token_id]), kind=kind, today=today)


def build_base(folder: Path, architecture: Literal["llama", "mistral"] = "llama", seed: int = 0) -> Path:
    """Write a base of 2 layers and grouped-query attention into ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    tokenizer = byte_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    model: Any
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=None))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
