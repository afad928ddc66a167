"""Tiny models whose answers wander, and what transformers' own ``generate`` answers with them.

In double precision: of some thousand tokens that are chosen, two that tie to the last digits of single precision are
to be expected, and which of them a processor's kernels prefer is no matter of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tunewright.generation.requests import Completion, Request

VOCABULARY, STOPS, PAD = 128, frozenset({5, 6, 7}), 0
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough for answers that wander, and end at different places
}
ADAPTERS = ("one", "two", "three")


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).double().eval()


def mistral(window: int | None) -> Any:
    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window)).double().eval()


def with_adapters(model: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped = get_peft_model(model, config, ADAPTERS[0])
    for name in ADAPTERS[1:]:
        wrapped.add_adapter(name, config)
    torch.manual_seed(2)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return wrapped.eval()


@contextmanager
def _answering_alone(model: Any, adapter: str | None) -> Iterator[None]:
    """PEFT's way to answer with one adapter only, or with none."""
    if not isinstance(model, PeftModel):
        yield
    elif adapter is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter, inference_mode=True)
        yield


def reference(model: Any, request: Request) -> Completion:
    prompt = torch.tensor([request.prompt_ids])
    with _answering_alone(model, request.adapter):
        whole = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(STOPS),
            pad_token_id=PAD,
        )
    ids = tuple(whole[0, prompt.shape[1] :].tolist())
    return Completion(ids[:-1], "stop") if ids[-1] in STOPS else Completion(ids, "length")
