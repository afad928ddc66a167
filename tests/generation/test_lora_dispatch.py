"""One pass for rows of many adapters, against PEFT's own mixed batches."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from making.property_examples import examples
from making.wandering_models import llama
from tunewright.generation import lora_dispatch
from tunewright.generation.batched_lora import AdapterSlots, Lora
from tunewright.generation.lora_dispatch import LoraDispatch
from tunewright.generation.requests import BASE_ROW
from tunewright.training.lora import use_fused_lora

CONFIGS = {
    "wide": LoraConfig(r=8, lora_alpha=20, target_modules=["q_proj", "v_proj", "down_proj", "o_proj"]),
    "narrow": LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]),
    "scaled": LoraConfig(r=5, lora_alpha=3, use_rslora=True, target_modules=["down_proj", "lm_head"]),
    "words": LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens", "v_proj"]),
}


@pytest.fixture(scope="module")
def model() -> Any:
    """Return a model with adapters of different rank, scale and layers."""
    return _with_adapters(CONFIGS, seed=3)


def _with_adapters(configs: dict[str, LoraConfig], seed: int) -> Any:
    (first, config), *others = configs.items()
    wrapped: Any = get_peft_model(llama().float(), config, first)
    for name, other in others:
        wrapped.add_adapter(name, other)
    torch.manual_seed(seed)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return wrapped.eval()


@examples(30)
@given(names=st.lists(st.sampled_from([None, *CONFIGS]), min_size=1, max_size=9), tokens=st.integers(1, 5))
def test_dispatch_answers_rows_as_peft(model: Any, names: list[str | None], tokens: int) -> None:
    ids = torch.randint(8, 128, (len(names), tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.inference_mode():
        expected = model(input_ids=ids, adapter_names=[name or BASE_ROW for name in names]).logits
        with LoraDispatch(model, mixed=True).use_adapters(names):
            found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected)


def test_dispatch_restores_the_model_also_after_a_failure(model: Any) -> None:
    ids = torch.tensor([[9, 10, 11]])
    adapters = LoraDispatch(model, mixed=True)
    model.set_adapter("wide")
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        with pytest.raises(RuntimeError), adapters.use_adapters(["narrow"]):
            raise RuntimeError
        assert torch.equal(model(input_ids=ids).logits, before)


def test_dispatch_keeps_the_base_dtype_and_rounds_the_sum_once() -> None:
    """PEFT adds one adapter's delta in float32 and rounds once, as in training."""
    wrapped: Any = get_peft_model(llama().to(torch.bfloat16), CONFIGS["narrow"], "narrow", autocast_adapter_dtype=True)
    torch.nn.init.normal_(wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_B["narrow"].weight)
    wrapped.eval()
    ids = torch.tensor([[9, 10, 11], [12, 13, 14]])
    with torch.inference_mode():
        expected = wrapped(input_ids=ids).logits
        with LoraDispatch(wrapped, mixed=True).use_adapters(["narrow", "narrow"]):
            found = wrapped(input_ids=ids).logits
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


BESIDE = ["wide", "narrow", "scaled"]


def _loras(model: Any, adapter: str) -> dict[str, Lora]:
    """Return copies of a PeftModel adapter's weights, by the names of the base's layers."""
    return {
        name.removeprefix("base_model.model."): Lora(
            layer.lora_A[adapter].weight.detach().clone().t(),
            layer.lora_B[adapter].weight.detach().clone().t(),
            layer.scaling[adapter],
        )
        for name, layer in model.named_modules()
        if adapter in getattr(layer, "lora_A", ())
    }


def _logits(model: Any, adapters: LoraDispatch, names: list[str | None], ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), adapters.use_adapters(names):
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@examples(30)
@given(
    names=st.lists(st.sampled_from([None, *BESIDE]), min_size=1, max_size=9),
    tokens=st.integers(1, 5),
    others=st.lists(st.tuples(st.sampled_from(BESIDE), st.booleans()), max_size=8),
)
def test_added_adapters_answer_as_peft_after_any_history(
    model: Any, names: list[str | None], tokens: int, others: list[tuple[str, bool]]
) -> None:
    base = llama().float()
    adapters = LoraDispatch(base, mixed=True)
    for name, put in [*others, *((name, True) for name in names if name is not None)]:
        if put:
            adapters.add(name, _loras(model, name))
        else:
            adapters.remove(name)
    ids = torch.randint(8, 128, (len(names), tokens), generator=torch.Generator().manual_seed(tokens))
    found = _logits(base, adapters, names, ids)
    assert torch.equal(found, _logits(model, LoraDispatch(model, mixed=True), names, ids))
    with torch.inference_mode():
        expected = model(input_ids=ids, adapter_names=[name or BASE_ROW for name in names]).logits
    torch.testing.assert_close(found, expected)


def test_base_is_unchanged_by_added_adapters_and_nothing_of_them_stays(model: Any) -> None:
    base, ids = llama().float(), torch.tensor([[9, 10, 11]])
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    parts = [(name, type(part), sorted(vars(part))) for name, part in base.named_modules()]
    plain = base(input_ids=ids).logits
    adapters = LoraDispatch(base, mixed=True)
    loras = _loras(model, "wide")
    held = [weakref.ref(lora.down) for lora in loras.values()]
    adapters.add("wide", loras)
    del loras
    adapters.require(["wide"])
    assert not torch.equal(_logits(base, adapters, ["wide"], ids), plain)
    assert torch.equal(_logits(base, adapters, [None], ids), plain)
    adapters.remove("wide")
    adapters.remove("wide")  # once more does no harm
    with pytest.raises(ValueError, match="no adapter wide"):
        adapters.require(["wide"])
    assert not any(ref() is not None for ref in held)
    assert [(name, type(part), sorted(vars(part))) for name, part in base.named_modules()] == parts
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    assert torch.equal(base(input_ids=ids).logits, plain)


def test_adding_an_adapter_for_a_missing_layer_changes_nothing(model: Any) -> None:
    base, ids = llama().float(), torch.tensor([[9, 10, 11]])
    adapters = LoraDispatch(base, mixed=True)
    adapters.add("wide", _loras(model, "wide"))
    before = _logits(base, adapters, ["wide"], ids)
    lora = next(iter(_loras(model, "narrow").values()))
    for name in ("narrow", "wide"):
        with pytest.raises(AttributeError):
            adapters.add(name, {"model.layers.0.self_attn.q_proj": lora, "model.layers.9.self_attn.q_proj": lora})
    assert torch.equal(_logits(base, adapters, ["wide"], ids), before)
    with pytest.raises(ValueError, match="no adapter narrow"):
        adapters.require(["narrow"])


def _trained_as(fused: bool, dtype: torch.dtype) -> Any:
    """A model with the layers that training has, or those that evaluation has; the numbers are the same."""
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj", "down_proj"])
    if fused:
        use_fused_lora(config)
    wrapped: Any = get_peft_model(llama().to(dtype), config)
    torch.manual_seed(4)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape) * 0.3
    return wrapped.eval()


def test_answers_during_training_equal_those_of_evaluation_to_the_bit() -> None:
    """Training's own layers under autocast, as in transformers' trainer, against peft's without."""
    ids = torch.tensor([[9, 10, 11], [12, 13, 14]])
    names: list[str | None] = ["default", "default"]
    training, evaluation = _trained_as(True, torch.bfloat16), _trained_as(False, torch.bfloat16)
    adapters = LoraDispatch(training, mixed=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = _logits(training, adapters, names, ids)
    assert torch.equal(found, _logits(evaluation, LoraDispatch(evaluation, mixed=False), names, ids))


def test_attached_layers_answer_many_passes_and_are_restored(model: Any) -> None:
    base, ids = llama().float(), torch.tensor([[9, 10, 11], [12, 13, 14]])
    plain = base(input_ids=ids).logits
    adapters = LoraDispatch(base, mixed=True)
    adapters.add("wide", _loras(model, "wide"))
    passes: list[list[str | None]] = [["wide", None], ["wide", None], [None, None], ["narrow", "wide"], [None, "wide"]]
    found = []
    with pytest.raises(RuntimeError), adapters.attached():
        for names in passes:
            if "narrow" in names:
                adapters.add("narrow", _loras(model, "narrow"))  # on layers that had none before
            found.append(_logits(base, adapters, names, ids))
        with pytest.raises(AssertionError):
            base(input_ids=ids)  # whose rows are these?
        raise RuntimeError
    alone = LoraDispatch(model, mixed=True)
    for names, logits in zip(passes, found, strict=True):
        torch.testing.assert_close(logits, _logits(model, alone, names, ids))
    assert not any("forward" in vars(part) for part in base.modules())
    assert torch.equal(base(input_ids=ids).logits, plain)


# Stacked weights of many adapters

LAYERS = [["q_proj", "v_proj"], ["q_proj"], ["down_proj", "o_proj"], ["q_proj", "down_proj"]]
MANY = {
    f"adapter-{number}": LoraConfig(r=2 + number, lora_alpha=8 + number, target_modules=LAYERS[number % 4])
    for number in range(7)
}


@pytest.fixture(scope="module")
def many() -> Any:
    """Return a model with seven adapters of different rank, scale and layers."""
    return _with_adapters(MANY, seed=5)


def _ids(names: list[str | None]) -> torch.Tensor:
    return 9 + torch.arange(len(names))[:, None]


def _as_peft(model: Any, names: list[str | None]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=_ids(names), adapter_names=[name or BASE_ROW for name in names]).logits
    return found


PASSES = st.lists(st.lists(st.sampled_from([None, *MANY]), min_size=1, max_size=12), min_size=1, max_size=5)


@examples(40)
@given(passes=PASSES, room=st.sampled_from([0, 4, 5, 100]))
def test_stacked_adapters_answer_as_peft_after_any_requests(
    many: Any, passes: list[list[str | None]], room: int
) -> None:
    base = llama().float()
    adapters = LoraDispatch(base, mixed=True)
    for name in MANY:
        adapters.add(name, _loras(many, name))
    with pytest.MonkeyPatch.context() as patch:
        largest = max(sum(lora.nbytes for lora in _loras(many, name).values()) for name in MANY)
        patch.setattr(lora_dispatch, "MAX_BYTES", room * largest)
        for names in passes:
            torch.testing.assert_close(_logits(base, adapters, names, _ids(names)), _as_peft(many, names))


@pytest.mark.parametrize("how", ["put again", "dropped and put"])
def test_replaced_adapter_answers_with_its_new_weights(many: Any, how: str) -> None:
    base, names = llama().float(), list(MANY)
    adapters = LoraDispatch(base, mixed=True)
    for name in names:
        adapters.add(name, _loras(many, name))
    asked: list[str | None] = [*names, None]
    before = _logits(base, adapters, asked, _ids(asked))
    other = {layer: Lora(lora.down, -lora.up, lora.scale) for layer, lora in _loras(many, names[2]).items()}
    if how == "dropped and put":
        adapters.remove(names[2])
    adapters.add(names[2], other)
    after = _logits(base, adapters, asked, _ids(asked))
    same = [row for row in range(len(asked)) if row != 2]
    assert torch.equal(after[same], before[same])
    assert not torch.allclose(after[2], before[2], atol=1e-3)
    fresh = llama().float()
    single = LoraDispatch(fresh, mixed=True)
    single.add(names[2], other)
    expected = _logits(fresh, single, [names[2]], _ids(asked)[2:3])
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
