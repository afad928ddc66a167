"""Tiny bases with random weights and a real tokenizer: whole enough to train, save, load and serve in a second."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

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


def shrunk_config(kind: str, **values: Any) -> Any:
    """Return the shrunk copy of a configuration that transformers has by default, with the vocabulary of bytes."""
    import transformers

    from tunewright.models.shrunk import shrunk

    small = shrunk(transformers.AutoConfig.for_model(kind, **values))
    text, tokenizer = small.get_text_config(), byte_tokenizer()
    text.vocab_size = text.vocab_size_per_layer_input = len(tokenizer) + 5
    for key in ("bos", "eos", "pad"):
        setattr(text, f"{key}_token_id", getattr(tokenizer, f"{key}_token_id"))
    return small


def build_shrunk(folder: Path, kind: str, architecture: str, **values: Any) -> Path:
    """Write a random model of `shrunk_config`, with a byte-level tokenizer, into ``folder``."""
    from tunewright.models.shrunk import random_model

    random_model(shrunk_config(kind, **values), architecture).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


Kind = Literal["llama", "mistral", "mistral3", "mistral3-ministral3", "ministral3", "mixtral"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def tiny_model(kind: Kind, *, seed: int = 0, **changes: Any) -> Any:
    """Random weights: 2 layers, grouped-query attention; Mistral 3 has a vision tower of one layer besides."""
    import torch
    import transformers

    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        **changes,
    }
    config: Any
    if kind == "llama":
        config = transformers.LlamaConfig(**shape)
    elif kind == "mixtral":
        config = transformers.MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)
    elif kind.endswith("ministral3"):
        # Positions are stretched, and attention is sharpened with the distance, from the 64th token on.
        positions = {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 32.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
        config = transformers.Ministral3Config(**shape, head_dim=16, rope_parameters=positions)
    else:
        config = transformers.MistralConfig(**{"sliding_window": None, **shape})
    if kind.startswith("mistral3"):
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 28,
            "patch_size": 14,
        }
        vision = transformers.PixtralVisionConfig(**sizes)
        config = transformers.Mistral3Config(text_config=config, vision_config=vision, tie_word_embeddings=False)
    torch.manual_seed(seed)
    return getattr(transformers, ARCHITECTURES[kind])(config)


ARCHITECTURES: dict[Kind, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration",
    "mistral3-ministral3": "Mistral3ForConditionalGeneration",
    "ministral3": "Ministral3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def build_base(folder: Path, kind: Kind = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a tiny base of this kind, with a byte-level tokenizer, into ``folder``."""
    tokenizer = byte_tokenizer()
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tiny_model(kind, seed=seed, vocab_size=len(tokenizer), **ids, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
