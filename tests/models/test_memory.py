"""Memory of training: parameters, bytes by part, and fitting micro-batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from making.tiny_bases import tiny_model
from tunewright.config import PRESETS, Quantization, TrainConfig
from tunewright.core.errors import UserError
from tunewright.models import memory_estimate as fit_memory
from tunewright.models.families import ATTENTION, MLP, Shape, drop_towers, read_shape
from tunewright.models.loading import disable_repacking
from tunewright.models.memory_estimate import (
    BatchShape,
    TrainingSetup,
    adapter_copies,
    attention_saved,
    estimate,
    layer_saved,
    weight_bytes,
)
from tunewright.models.memory_plan import (
    available_memory,
    card_named,
    fewest_recomputed,
    parse_size,
    plan,
    recomputed_layers,
)

LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
LLAMA_2_7B: dict[str, Any] = {
    "architectures": [LLAMA],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LLAMA_31_8B = {**LLAMA_2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
MISTRAL_7B = {**LLAMA_2_7B, "architectures": [MISTRAL], "intermediate_size": 14336, "num_key_value_heads": 8}
LLAMA_31_70B = {
    **LLAMA_31_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MISTRAL_SMALL_31: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "mistral",
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "vocab_size": 131072,
    },
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24},
}
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
EXPERTS = Shape(2, 48, 80, 6, 2, 8, 101, tied=False, attention_bias=False, mlp_bias=False, experts=4, chosen=2)
NF4_SHAPE = Shape(2, 64, 128, 4, 2, 16, 256, tied=False, attention_bias=False, mlp_bias=False)
TINY = Shape(2, 48, 80, 6, 2, 8, 101, tied=False, attention_bias=False, mlp_bias=False)
ALL_LINEAR: tuple[str, ...] = PRESETS["all-linear"]["target_modules"]
CLASSIC: tuple[str, ...] = PRESETS["classic"]["target_modules"]


def _shape(folder: Path, config: dict[str, Any]) -> Shape:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return read_shape(path)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_31_8B, 8_030_261_248),
        (MISTRAL_SMALL_31, 23_572_403_200),
        ({**MISTRAL_SMALL_31, "tie_word_embeddings": True}, 22_901_314_560),
        (MIXTRAL_8X7B, 46_702_792_704),
    ],
)
def test_shape_counts_the_parameters_of_transformers_text_model(
    tmp_path: Path, config: dict[str, Any], parameters: int
) -> None:
    import transformers

    assert _shape(tmp_path, config).parameters == parameters
    (architecture,) = config["architectures"]
    kind = getattr(transformers, architecture)
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(config))
    drop_towers(model)
    assert sum(weight.numel() for weight in model.parameters()) == parameters


@pytest.mark.parametrize("extra", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_shape_counts_tied_embeddings_and_biases(tmp_path: Path, extra: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**LLAMA_31_8B, "num_hidden_layers": 2, **extra}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    assert _shape(tmp_path, config).parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": -1}, {"num_key_value_heads": 5}],
)
def test_read_shape_refuses_invalid_configs(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        _shape(tmp_path, {**LLAMA_2_7B, **changes})
    assert caught.value.where == str(tmp_path / "config.json")


def _model(dtype: str, targets: tuple[str, ...], layers: int, shape: Shape = TINY, *, nf4: bool = False) -> Any:
    """Return a tiny Llama or, with experts, a Mixtral of this shape with LoRA, as training has it."""
    from tunewright.training.packing import attention
    from tunewright.training.packing.fused_loss import add_token_losses

    attention.register()
    base = _plain_model(replace(shape, layers=layers)).to(getattr(torch, dtype))
    if nf4:
        _quantize(base, getattr(torch, dtype))
    base.set_attn_implementation(attention.NAME)
    add_token_losses(base)
    return _with_lora(base, targets, "nf4" if nf4 else "none")


def _plain_model(shape: Shape) -> Any:
    return tiny_model(
        "mixtral" if shape.experts else "llama",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
    )


def _quantize(base: Any, dtype: torch.dtype) -> None:
    """Hold the linear layers in NF4, as `load_model` does."""
    from bitsandbytes.nn import Linear4bit

    for layer in base.model.layers:
        for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP)):
            for name in names:
                whole = getattr(part, name)
                packed: Any = Linear4bit(
                    whole.in_features, whole.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                )
                setattr(part, name, packed.to("cpu"))
    disable_repacking(base)
    base.requires_grad_(False)


def _with_lora(base: Any, targets: tuple[str, ...], quantization: Quantization) -> Any:
    from peft import LoraConfig, get_peft_model

    from tunewright.training.lora import use_fused_lora

    lora = LoraConfig(r=5, target_modules=list(targets), task_type="CAUSAL_LM")
    use_fused_lora(lora, quantization)
    model: Any = get_peft_model(base, lora)
    # As with checkpointing; without it the very first norm keeps nothing.
    model.enable_input_require_grads()
    return model.train()


def _batch(load: BatchShape, vocabulary: int) -> Any:
    from tunewright.training.packing import Group, pack

    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        drawn: list[int] = torch.randint(0, vocabulary, (count,), generator=generator).tolist()
        return drawn

    prefix = ids(load.shared)
    rows = [prefix + ids(load.own) for _ in range(load.rows)]
    labels = [[-100] * (len(row) - load.trained) + row[-load.trained :] for row in rows]
    return pack(rows, labels, share=True, groups=[Group(load.shared, tuple(range(load.rows)))])


def _saved_bytes(model: Any, batch: Any, dtype: str) -> int:
    """Count the bytes that autograd keeps, without parameters, each storage once."""
    from tunewright.training.packing.fused_loss import batch_token_losses

    parameters = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            kept[place] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        _loss = batch_token_losses(model, batch).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


SHORT, SHARED, LONG = BatchShape(2, 0, 16, 4), BatchShape(2, 10, 16, 4), BatchShape(2, 131, 150, 150)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "nf4", "targets", "loads"),
    [
        *((TINY, False, targets, [SHORT, SHARED, BatchShape(3, 0, 140, 7), BatchShape(2, 131, 16, 4), LONG])
          for targets in (CLASSIC, ALL_LINEAR, ("o_proj", "up_proj"))),
        *((EXPERTS, False, targets, [SHORT, SHARED, LONG]) for targets in (CLASSIC, ATTENTION)),
        (NF4_SHAPE, True, ALL_LINEAR, [SHARED, BatchShape(3, 0, 140, 7), LONG]),
    ],
)  # fmt: skip
def test_layer_saved_equals_what_autograd_saves(
    dtype: Any, shape: Shape, nf4: bool, targets: tuple[str, ...], loads: list[BatchShape]
) -> None:
    """To the byte: what a second layer adds."""
    one, two = (_model(dtype, targets, layers, shape, nf4=nf4) for layers in (1, 2))
    setup = TrainingSetup(targets, 5, dtype, nf4=nf4)
    copies = adapter_copies(replace(shape, layers=1), setup)
    for load in loads:
        batch = _batch(load, shape.vocabulary)
        more = _saved_bytes(two, batch, dtype) - _saved_bytes(one, batch, dtype)
        assert more == layer_saved(shape, setup, load.tokens) + attention_saved(shape, setup, load) + copies, load


@pytest.mark.parametrize("load", [BatchShape(8, 0, 100, 1), BatchShape(8, 60, 40, 40)])
@pytest.mark.parametrize("recomputed", [0, 2, "all"])
@pytest.mark.parametrize(("experts", "dtype"), [(False, "float32"), (False, "bfloat16"), (True, "bfloat16")])
def test_estimate_equals_the_allocator_peak_of_a_step(
    experts: bool, dtype: Any, recomputed: Any, load: BatchShape
) -> None:
    """Every allocation of a step, as torch's profiler sees them, against the sum of the parts."""
    shape = Shape(3, 192, 512, 6, 2, 32, 4000, tied=False, attention_bias=False, mlp_bias=False)
    targets = ATTENTION if experts else ALL_LINEAR
    shape = replace(shape, experts=4, chosen=2) if experts else shape
    model, batch = _model(dtype, targets, 3, shape), _batch(load, 4000)
    setup = TrainingSetup(targets, 5, dtype, recomputed=recomputed)
    if recomputed:
        model.gradient_checkpointing_enable()
        for place, layer in enumerate(model.get_decoder().layers):
            layer.gradient_checkpointing = place < setup.recomputed_of(3)

    assert _passing(shape, setup, load) == pytest.approx(_allocator_peak(model, batch, dtype), rel=0.15)


def _passing(shape: Shape, setup: TrainingSetup, load: BatchShape) -> int:
    """Return the estimate of what a step allocates."""
    found = estimate(shape, setup, load)
    return found.activations + found.attention + found.head + found.working + adapter_copies(shape, setup)


def _allocator_peak(model: Any, batch: Any, dtype: str) -> int:
    """Return the largest sum of the bytes that a step allocates and has not freed, as torch's profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    from tunewright.training.packing.fused_loss import batch_token_losses

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = batch_token_losses(model, batch).sum()
        loss.backward()
        model.zero_grad(set_to_none=True)

    step()  # what is cached once, such as masks, is there then
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events: Any = profiled.profiler
    allocations = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("load", [BatchShape(8, 0, 100, 1), BatchShape(8, 0, 100, 60)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_estimate_equals_the_allocator_peak_of_a_step_on_the_plain_path(dtype: Any, load: BatchShape) -> None:
    from tunewright.training.packing.padding import pad

    shape = Shape(3, 192, 512, 6, 2, 32, 16000, tied=False, attention_bias=False, mlp_bias=False)
    model = _with_lora(_plain_model(shape).to(getattr(torch, dtype)), ALL_LINEAR, "none")
    rows = torch.randint(0, 16000, (load.rows, load.own), generator=torch.Generator().manual_seed(0)).tolist()
    batch = pad(rows, [[-100] * (load.own - load.trained) + row[-load.trained :] for row in rows])
    setup = TrainingSetup(ALL_LINEAR, 5, dtype, padded=True)
    assert _passing(shape, setup, load) == pytest.approx(_allocator_peak(model, batch, dtype), rel=0.15)


def test_nf4_weight_bytes_equal_those_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shape = Shape(1, 256, 512, 4, 2, 64, 100, tied=True, attention_bias=False, mlp_bias=False)
    total = 0
    for name in ALL_LINEAR:
        inputs, outputs = shape.linear(name)
        weight = torch.randn(outputs, inputs)
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, quant_type="nf4", blocksize=64, compress_statistics=True
        )
        parts = (packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        total += sum(part.numel() * part.element_size() for part in parts)
    assert weight_bytes(shape, TrainingSetup(ALL_LINEAR, 8, nf4=True)) - 2 * shape.others == total


def _plan(shape: Shape, gpu: str, preset: Any = "all-linear", rows: int = 1, length: int = 2048) -> Any:
    return plan(
        "base",
        shape,
        TrainConfig(preset=preset),
        available_memory(gpu),
        rows=rows,
        length=length,
        shared=0,
        answer=length,
    )


def test_plan_fits_a_7b_with_lora_into_24_gb(tmp_path: Path) -> None:
    for config in (LLAMA_2_7B, MISTRAL_7B):
        message = _plan(_shape(tmp_path, config), "24GB")
        checkpointed = message.used[False]
        assert checkpointed.asked.total <= 24e9
        assert checkpointed.largest[2048] >= 1
        whole = next(p for p in message.setups if not p.setup.recomputed and not p.setup.nf4)
        assert whole.largest[4096] == 0


def test_padded_rows_leave_room_for_fewer_rows_and_share_nothing(tmp_path: Path) -> None:
    shape, settings, memory = _shape(tmp_path, LLAMA_31_8B), TrainConfig(), available_memory("80GB")
    packed, padded = (
        plan("base", shape, settings, memory, rows=4, length=1024, shared=512, answer=64, padded=padded)
        for padded in (False, True)
    )
    assert (packed.asked.tokens, padded.asked.tokens) == (512 + 4 * 512, 4 * 1024)
    assert all(b.largest[1024] < a.largest[1024] for a, b in zip(packed.setups, padded.setups, strict=True))


def test_plan_fits_a_70b_into_80_gb_in_4_bits_but_not_in_16(tmp_path: Path) -> None:
    message = _plan(_shape(tmp_path, LLAMA_31_70B), "80GB")
    fits = {(p.setup.nf4, p.setup.recomputed): p.asked.total <= 80e9 for p in message.setups}
    assert fits == {(False, 0): False, (False, "all"): False, (True, 0): False, (True, "all"): True}
    assert all(p.longest == 0 for p in message.setups if not p.setup.nf4)


@examples(30)
@given(
    rows=st.integers(1, 64),
    shared=st.integers(0, 300),
    own=st.integers(1, 300),
    nf4=st.booleans(),
    recomputed=st.sampled_from((0, 1, "all")),
)
def test_estimate_grows_with_rows_and_tokens_on_a_gpu(
    rows: int, shared: int, own: int, nf4: bool, recomputed: Any
) -> None:
    setup = TrainingSetup(ALL_LINEAR, 8, nf4=nf4, recomputed=recomputed, card=True)
    here = estimate(TINY, setup, BatchShape(rows, shared, own, 1)).total
    assert estimate(TINY, setup, BatchShape(rows + 1, shared, own, 1)).total > here
    assert estimate(TINY, setup, BatchShape(rows, shared, own + 1, 1)).total > here
    assert estimate(TINY, setup, BatchShape(rows, shared + 1, own, 1)).total > here
    # Tokens computed once save memory, beyond the fixed working memory of attention in two parts.
    if (rows - 1) * shared > 100:
        assert estimate(TINY, setup, BatchShape(rows, 0, shared + own, 1)).total > here


def test_plan_finds_the_largest_micro_batch_that_fits(tmp_path: Path) -> None:
    shape = _shape(tmp_path, LLAMA_31_8B)
    for planned in _plan(shape, "24GB").setups:
        for length, rows in planned.largest.items():
            if rows:
                assert estimate(shape, planned.setup, BatchShape(rows, 0, length, length)).total <= 24e9
            assert estimate(shape, planned.setup, BatchShape(rows + 1, 0, length, length)).total > 24e9


@pytest.mark.parametrize(("rows", "fewest"), [(1, 0), (2, 7), (4, 21), (8, 28), (64, 32)])
def test_fewest_recomputed_layers_fit_with_a_reserve(tmp_path: Path, rows: int, fewest: int) -> None:
    """An 8B on 40 GB: none, some, and all where even all are too many."""
    shape, memory, load = _shape(tmp_path, LLAMA_31_8B), 40 * 10**9, BatchShape(rows, 0, 2048, 2048)
    setup = TrainingSetup(ALL_LINEAR, 16, card=True)
    assert fewest_recomputed(shape, setup, load, memory) == fewest

    def need(layers: int) -> int:
        found = estimate(shape, replace(setup, recomputed=layers), load)
        return found.total + found.allocator

    needs = [need(layers) for layers in range(shape.layers + 1)]
    assert needs == sorted(needs, reverse=True)
    assert fewest == next((layers for layers, bytes_ in enumerate(needs) if bytes_ <= memory), shape.layers)


@pytest.mark.parametrize(("asked", "card", "expected"), [
    ("auto", True, None), ("auto", False, 0), ("all", False, "all"), ("none", True, 0), (7, True, 7), (32, True, "all"),
])  # fmt: skip
def test_recomputed_layers_follow_the_config(asked: Any, card: bool, expected: Any) -> None:
    assert recomputed_layers(TrainConfig(gradient_checkpointing=asked), 32, card=card) == expected


def test_parse_size_reads_sizes() -> None:
    sizes = {"24GB": 24 * 10**9, "24GiB": 24 << 30, " 80 gb": 80 * 10**9, "1.5TB": 15 * 10**11, "512MB": 512_000_000}
    assert {text: parse_size(text) for text in sizes} == sizes


@pytest.mark.parametrize("text", ["", "24", "GB", "24 apples", "-1GB", "0GB", "24GBs", "KB", "1e3GB", "inf GB"])
def test_available_memory_refuses_text_that_is_not_a_size(text: str) -> None:
    with pytest.raises(UserError) as caught:
        available_memory(text)
    assert caught.value.where == "--gpu"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h100", "H100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("a100-80gb", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("Tesla T4", "T4"),
        ("rtx_a6000", "RTX A6000"),
        ("l40s", "L40S"),
    ],
)
def test_card_named_finds_gpus_by_common_spellings(text: str, name: str) -> None:
    assert card_named(text, "--gpu") == name
    assert available_memory(text).bytes == available_memory(name).bytes
    assert name != "RTX 4090" or available_memory(text).bytes == 24564 << 20  # as `nvidia-smi` shows it


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("a100", "a100-40gb or a100-80gb"),
        ("v100", "v100-16gb or v100-32gb"),
        ("rtx 4091", "RTX 4090"),
        ("RTX 4090 Laptop GPU", "RTX 4090"),
        ("abacus", "such as 24GB or 24GiB"),
    ],
)
def test_card_named_refuses_unknown_names_and_suggests_similar_ones(text: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        card_named(text, "--gpu")
    assert fix in str(caught.value.fix)


def test_available_memory_names_the_source_of_this_machine() -> None:
    here = available_memory(None)
    assert here.bytes > 0
    assert here.card == torch.cuda.is_available()
    assert "free" in here.source or "left" in here.source


def test_constants_of_estimate_and_training_agree() -> None:
    from tunewright.training.packing import attention, fused_loss

    assert fit_memory.TILE_LOGITS == fused_loss.TILE_LOGITS
    assert fit_memory.SHORT == attention.SHORT
