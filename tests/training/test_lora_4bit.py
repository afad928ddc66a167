"""LoRA over a 4-bit base as one autograd step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn

from tunewright.config import TrainConfig
from tunewright.core.progress import LogReporter
from tunewright.models.bases import resolve_base
from tunewright.models.loading import disable_repacking, load_model
from tunewright.training.lora import fused_linear_4bit, lora_config, use_fused_lora

IDS = torch.arange(3, 43).view(2, 20)


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
