"""LoRA over a 4-bit base as one autograd step, against peft's own layer and against the memory estimate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tunewright.config import PRESETS, TrainConfig
from tunewright.core.progress import LogReporter
from tunewright.models.bases import resolve_base
from tunewright.models.families import ATTENTION, MLP, Shape
from tunewright.models.loading import disable_repacking, load_model
from tunewright.models.memory.estimate import BatchShape, TrainingSetup, adapter_copies, attention_saved, layer_saved
from tunewright.training.lora import fused_linear_4bit, lora_config, use_fused_lora

ALL_LINEAR = tuple(PRESETS["all-linear"]["target_modules"])
IDS = torch.arange(3, 43).view(2, 20)
SHAPE = Shape(2, 64, 128, 4, 2, 16, 256, tied=False, attention_bias=False, mlp_bias=False)


def _layers(dtype: torch.dtype, *, fused: bool, adapters: int = 1, bias: bool = False, **changes: Any) -> Any:
    """Return a layer of 128 inputs and 192 outputs in NF4 with LoRA, the same numbers each time, as part of a model."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    base = Linear4bit(128, 192, bias=bias, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    model: Any = nn.Sequential(base.to("cpu"))
    disable_repacking(model)
    model.is_loaded_in_4bit = True  # as transformers does; peft asks for it
    assert base.weight.dtype == torch.uint8
    config = LoraConfig(**{"r": 8, "lora_alpha": 20, "target_modules": ["0"], **changes})
    if fused:
        use_fused_lora(config, "nf4")
    wrapped: Any = get_peft_model(model, config)
    assert isinstance(wrapped.base_model.model[0], PeftLinear4bit)
    for number in range(1, adapters):
        wrapped.add_adapter(f"more-{number}", config)
    torch.manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(weight.data, std=0.1)
    return wrapped.train()


def _pass(model: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return output and gradients of one pass under autocast, as in transformers' bfloat16 training."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        out = model(x)
    out.backward(grad)
    trained = {name.split(".")[-3]: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, **trained}


def _case(dtype: torch.dtype, tokens: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(2, tokens, size, generator=generator).to(dtype) for size in (128, 192))  # type: ignore[return-value]


def test_fused_linear_4bit_gives_peft_s_output_and_gradients_in_float32() -> None:
    found = _pass(_layers(torch.float32, fused=True), *_case(torch.float32))
    expected = _pass(_layers(torch.float32, fused=False), *_case(torch.float32))
    assert found.keys() == expected.keys() == {"out", "x", "lora_A", "lora_B"}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()), msg=name)


def test_fused_linear_4bit_is_as_near_to_float64_as_peft_in_bfloat16() -> None:
    """Measured on the same 4-bit weights: the error of output and gradients against double precision."""
    from bitsandbytes.functional import dequantize_4bit

    case = _case(torch.bfloat16)
    errors: dict[bool, dict[str, float]] = {}
    for fused in (True, False):
        model = _layers(torch.bfloat16, fused=fused)
        found = _pass(model, *case)
        layer = model.base_model.model[0]
        weight = dequantize_4bit(layer.base_layer.weight, layer.base_layer.weight.quant_state).double()
        a, b = (half["default"].weight.detach().double().requires_grad_() for half in (layer.lora_A, layer.lora_B))
        x = case[0].double().requires_grad_()
        exact = x @ weight.T + 2.5 * (x @ a.T) @ b.T
        exact.backward(case[1].double())
        wanted = {"out": exact.detach(), "x": x.grad, "lora_A": a.grad, "lora_B": b.grad}
        errors[fused] = {
            name: float((found[name].double() - value).norm() / value.norm()) for name, value in wanted.items()
        }
    for name, error in errors[True].items():
        assert error < 0.01, name
        assert error <= 1.25 * errors[False][name], (name, errors)


@pytest.mark.parametrize(
    "changes",
    [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}, {"adapters": 2}, {"bias": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_fused_linear_4bit_leaves_to_peft_what_is_more_than_two_matrices(changes: dict[str, Any]) -> None:
    results = []
    for fused in (True, False):
        model = _layers(torch.float32, fused=fused, **changes)
        if "adapters" in changes:
            model.base_model.set_adapter(["default", "more-1"])
        torch.manual_seed(3)  # dropout's
        results.append(_pass(model, *_case(torch.float32)))
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[1].items():
        assert torch.equal(results[0][name], tensor), name


def test_fused_linear_4bit_is_the_base_while_adapters_are_disabled() -> None:
    model = _layers(torch.float32, fused=True)
    assert type(model.base_model.model[0]) is fused_linear_4bit()
    (x, _) = _case(torch.float32)
    with model.disable_adapter():
        assert torch.equal(model(x), model.base_model.model[0].base_layer(x))
    assert not torch.equal(model(x), model.base_model.model[0].base_layer(x))


class _Outputs(TorchDispatchMode):
    """Counts tensors of a size that operations write."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.places: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in self.places}
        if isinstance(out, Tensor) and out.numel() == self.numbers and out.untyped_storage().data_ptr() not in known:
            self.places.append(out)
        return out


def test_fused_linear_4bit_writes_its_output_once() -> None:
    """peft writes five tensors of the output's size in bfloat16: product, clone, the adapter's, scaled, sum."""
    written = {}
    for fused in (True, False):
        model = _layers(torch.bfloat16, fused=fused)
        x = _case(torch.bfloat16)[0].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16), _Outputs(x.numel() // 128 * 192) as outputs:
            model(x)
        written[fused] = len(outputs.places)
    assert written[True] == 1
    assert written[False] >= 5


def _model(dtype: torch.dtype, layers: int) -> Any:
    """Return a Llama of SHAPE in NF4 with LoRA on all linear layers, as training has it."""
    from bitsandbytes.nn import Linear4bit
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunewright.training.packing import attention
    from tunewright.training.packing.fused_loss import add_token_losses

    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SHAPE.vocabulary,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
    )
    base: Any = LlamaForCausalLM(config)
    base.to(dtype)
    for layer in base.model.layers:
        for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP)):
            for name in names:
                whole = getattr(part, name)
                packed: Any = Linear4bit(
                    whole.in_features, whole.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                )
                setattr(part, name, packed.to("cpu"))
    disable_repacking(base)
    for weight in base.parameters():
        weight.requires_grad_(False)
    base.set_attn_implementation(attention.NAME)
    add_token_losses(base)
    config_of_lora = LoraConfig(r=5, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM")
    use_fused_lora(config_of_lora, "nf4")
    model: Any = get_peft_model(base, config_of_lora)
    model.enable_input_require_grads()
    return model.train()


def _saved_bytes(model: Any, load: BatchShape, dtype: torch.dtype) -> int:
    """Count the bytes that autograd keeps, parameters apart, each storage once."""
    from tunewright.training.packing import Group, pack
    from tunewright.training.packing.fused_loss import batch_token_losses

    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(0, SHAPE.vocabulary, (load.rows + 1, max(load.shared, load.own)), generator=generator).tolist()
    rows = [draw[-1][: load.shared] + own[: load.own] for own in draw[:-1]]
    labels = [[-100] * (len(row) - load.trained) + row[-load.trained :] for row in rows]
    batch = pack(rows, labels, share=True, groups=[Group(load.shared, tuple(range(load.rows)))])
    parameters = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            kept[place] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        _loss = batch_token_losses(model, batch).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load", [BatchShape(2, 10, 16, 4), BatchShape(3, 0, 140, 7), BatchShape(2, 131, 150, 150)])
def test_memory_estimate_is_what_autograd_keeps_over_nf4_to_the_byte(dtype: torch.dtype, load: BatchShape) -> None:
    one, two = (_saved_bytes(_model(dtype, layers), load, dtype) for layers in (1, 2))
    way = TrainingSetup(ALL_LINEAR, 5, "float32" if dtype == torch.float32 else "bfloat16", nf4=True)
    copies = adapter_copies(replace(SHAPE, layers=1), way)
    assert two - one == layer_saved(SHAPE, way, load.tokens) + attention_saved(SHAPE, way, load) + copies


def test_lora_config_builds_fused_layers_over_nf4(tiny_base_folder: Path) -> None:
    base = resolve_base(str(tiny_base_folder), None, tiny_base_folder, LogReporter())
    settings = TrainConfig(preset="all-linear", quantization="nf4")
    model: Any = get_peft_model(load_model(base, "float32", "nf4"), lora_config(settings))
    fused = [name for name, part in model.named_modules() if isinstance(part, fused_linear_4bit())]
    assert len(fused) == 14
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
        assert not torch.equal(model(input_ids=IDS).logits, plain)
