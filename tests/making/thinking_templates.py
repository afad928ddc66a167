"""Published chat templates that write thinking, on byte-level tokenizers with their control tokens."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any, Literal

from making import makers
from making.tiny_bases import byte_tokenizer, tiny_model
from tunewright.chat import ChatFormat, chat_format
from tunewright.config import ReasoningMode

Family = Literal["qwen3", "qwen3_5_think", "gptoss", "magistral"]

# Special tokens, other added tokens, and end tokens.
_TOKENS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "qwen3": (
        ["<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"],
        ["<|im_end|>"],
    ),
    "gptoss": (
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"],
        [],
        ["<|return|>", "<|call|>"],
    ),
}


def tokenizer_of(family: Family, source: str | None = None) -> Any:
    """A tokenizer with a family's template, or with another source in its place."""
    if family == "magistral":
        tokenizer: Any = makers.mistral_tokenizer("v13")
    else:
        from tokenizers import AddedToken

        special, added, _ = _TOKENS["gptoss" if family == "gptoss" else "qwen3"]
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
        tokenizer.chat_template = makers.trl_template(family)
        if family == "gptoss":
            tokenizer.bos_token, tokenizer.eos_token = "<|start|>", "<|return|>"
    if source is not None:
        tokenizer.chat_template = source
    return tokenizer


def thinking_chat(family: Family, reasoning: ReasoningMode = "train", source: str | None = None) -> ChatFormat:
    """The format of a family's conversations."""
    tokenizer = tokenizer_of(family, source)
    ends = ["</s>"] if family == "magistral" else _TOKENS["gptoss" if family == "gptoss" else "qwen3"][2]
    stop_ids = frozenset(tokenizer.convert_tokens_to_ids(ends))
    return chat_format(tokenizer, stop_ids=stop_ids, kind="own", today=date(2024, 7, 26), reasoning=reasoning)


def build_thinking_base(folder: Path) -> Path:
    """Write a tiny Llama with Qwen 3's template into ``folder``."""
    tokenizer = tokenizer_of("qwen3")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model("llama", vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def template_chat(source: str, *ends: str) -> ChatFormat:
    """The format of any template, on a byte-level tokenizer with the control tokens that its source has."""
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer()
    special = sorted(set(re.findall(r"<\|[a-z_]+\|?>|<[a-z_]+\|>|<(?:start|end)_of_turn>", source)))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    added = [text for text in _TOKENS["qwen3"][1] if text in source]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    tokenizer.bos_token = "<|pad|>"  # no template writes it
    tokenizer.chat_template = source
    stop_ids = frozenset([tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(ends))])
    return chat_format(tokenizer, stop_ids=stop_ids, kind="own", today=date(2024, 7, 26))
