"""One pass for rows of many adapters, against PEFT's own way to mix them in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from decoding_helpers import llama
from tunewright.models.row_adapters import BASE_ROW, RowAdapters

CONFIGS = {
    "wide": LoraConfig(r=8, lora_alpha=20, target_modules=["q_proj", "v_proj", "down_proj", "o_proj"]),
    "narrow": LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]),
    "scaled": LoraConfig(r=5, lora_alpha=3, use_rslora=True, target_modules=["down_proj", "lm_head"]),
    "words": LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens", "v_proj"]),
}


@pytest.fixture(scope="module")
def model() -> Any:
    """Adapters of unlike rank, scale and layers."""
    names = list(CONFIGS)
    wrapped: Any = get_peft_model(llama(), CONFIGS[names[0]], names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, CONFIGS[name])
    torch.manual_seed(3)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return wrapped.eval()


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.sampled_from([None, *CONFIGS]), min_size=1, max_size=9), tokens=st.integers(1, 5))
def test_rows_are_answered_as_peft_answers_them(model: Any, names: list[str | None], tokens: int) -> None:
    ids = torch.randint(8, 128, (len(names), tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.inference_mode():
        expected = model(input_ids=ids, adapter_names=[name or BASE_ROW for name in names]).logits
        with RowAdapters(model, mixed=True).answering(names):
            found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected)


def test_afterwards_the_model_is_as_it_was_also_after_a_failure(model: Any) -> None:
    ids = torch.tensor([[9, 10, 11]])
    adapters = RowAdapters(model, mixed=True)
    model.set_adapter("wide")
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        with pytest.raises(RuntimeError), adapters.answering(["narrow"]):
            raise RuntimeError
        assert torch.equal(model(input_ids=ids).logits, before)


def test_the_base_s_precision_is_kept_and_the_sum_is_rounded_once() -> None:
    """As PEFT adds one adapter's change, with which it was trained: in float32, rounded to the base's type after."""
    wrapped: Any = get_peft_model(llama().to(torch.bfloat16), CONFIGS["narrow"], "narrow", autocast_adapter_dtype=True)
    torch.nn.init.normal_(wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_B["narrow"].weight)
    wrapped.eval()
    ids = torch.tensor([[9, 10, 11], [12, 13, 14]])
    with torch.inference_mode():
        expected = wrapped(input_ids=ids).logits
        with RowAdapters(wrapped, mixed=True).answering(["narrow", "narrow"]):
            found = wrapped(input_ids=ids).logits
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
