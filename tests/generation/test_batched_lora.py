"""Stacked weights of many adapters, compared with peft's own mixed batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from decoding_helpers import llama
from hypothesis_settings import examples
from tunewright.generation import lora_dispatch
from tunewright.generation.batched_lora import AdapterSlots, Lora
from tunewright.generation.lora_dispatch import LoraDispatch
from tunewright.generation.requests import BASE_ROW

LAYERS = [["q_proj", "v_proj"], ["q_proj"], ["down_proj", "o_proj"], ["q_proj", "down_proj"]]
CONFIGS = {
    f"adapter-{number}": LoraConfig(r=2 + number, lora_alpha=8 + number, target_modules=LAYERS[number % 4])
    for number in range(7)
}


@pytest.fixture(scope="module")
def model() -> Any:
    """Return a model with seven adapters of different rank, scale and layers."""
    (first, config), *others = CONFIGS.items()
    wrapped: Any = get_peft_model(llama().float(), config, first)
    for name, other in others:
        wrapped.add_adapter(name, other)
    torch.manual_seed(5)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return wrapped.eval()


def _loras(model: Any, adapter: str) -> dict[str, Lora]:
    return {
        name.removeprefix("base_model.model."): Lora(
            layer.lora_A[adapter].weight.detach().t(), layer.lora_B[adapter].weight.detach().t(), layer.scaling[adapter]
        )
        for name, layer in model.named_modules()
        if adapter in getattr(layer, "lora_A", ())
    }


def _logits(model: Any, adapters: LoraDispatch, names: list[str | None]) -> torch.Tensor:
    with torch.inference_mode(), adapters.use_adapters(names):
        found: torch.Tensor = model(input_ids=_ids(names)).logits
    return found


def _ids(names: list[str | None]) -> torch.Tensor:
    return 9 + torch.arange(len(names))[:, None]


def _as_peft(model: Any, names: list[str | None]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=_ids(names), adapter_names=[name or BASE_ROW for name in names]).logits
    return found


PASSES = st.lists(st.lists(st.sampled_from([None, *CONFIGS]), min_size=1, max_size=12), min_size=1, max_size=5)


@examples(40)
@given(passes=PASSES, room=st.sampled_from([0, 4, 5, 100]))
def test_stacked_adapters_answer_as_peft_after_any_requests(
    model: Any, passes: list[list[str | None]], room: int
) -> None:
    base = llama().float()
    adapters = LoraDispatch(base, mixed=True)
    for name in CONFIGS:
        adapters.add(name, _loras(model, name))
    with pytest.MonkeyPatch.context() as patch:
        largest = max(sum(lora.nbytes for lora in _loras(model, name).values()) for name in CONFIGS)
        patch.setattr(lora_dispatch, "MAX_BYTES", room * largest)
        for names in passes:
            torch.testing.assert_close(_logits(base, adapters, names), _as_peft(model, names))


@pytest.mark.parametrize("how", ["put again", "dropped and put"])
def test_replaced_adapter_answers_with_its_new_weights(model: Any, how: str) -> None:
    base, names = llama().float(), list(CONFIGS)
    adapters = LoraDispatch(base, mixed=True)
    for name in names:
        adapters.add(name, _loras(model, name))
    asked: list[str | None] = [*names, None]
    before = _logits(base, adapters, asked)
    other = {layer: Lora(lora.down, -lora.up, lora.scale) for layer, lora in _loras(model, names[2]).items()}
    if how == "dropped and put":
        adapters.remove(names[2])
    adapters.add(names[2], other)
    after = _logits(base, adapters, asked)
    same = [row for row in range(len(asked)) if row != 2]
    assert torch.equal(after[same], before[same])
    assert not torch.allclose(after[2], before[2], atol=1e-3)
    fresh = llama().float()
    single = LoraDispatch(fresh, mixed=True)
    single.add(names[2], other)
    with torch.inference_mode(), single.use_adapters([names[2]]):
        expected = fresh(input_ids=_ids(asked)[2:3]).logits
    torch.testing.assert_close(after[2:3], expected)


@given(
    passes=st.lists(st.sets(st.sampled_from("abcdefghij"), max_size=6), max_size=30),
    room=st.lists(st.integers(0, 8), min_size=1, max_size=3),
)
def test_adapter_keeps_its_slot_while_it_is_requested(passes: list[set[str]], room: list[int]) -> None:
    places = AdapterSlots()
    before: tuple[str | None, ...] = ()
    rooms = sorted(room, reverse=True)  # it shrinks when a larger adapter comes
    for number, asked in enumerate(map(sorted, passes)):
        most = rooms[number * len(rooms) // len(passes)]
        placed = places.assign(asked, most)
        if len(asked) > most:
            assert placed is None
            continue
        assert placed is not None
        assert len(placed) <= most
        there = [name for name in placed if name is not None]
        assert len(set(there)) == len(there)
        assert set(asked) <= set(there)
        for name in set(asked) & set(before) if len(before) <= most else ():
            assert placed.index(name) == before.index(name)
        before = placed
