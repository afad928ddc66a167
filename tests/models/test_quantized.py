"""A base in NF4: what is quantized and to which numbers, and that it trains as it evaluates."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from making.tiny_bases import build_base
from tunewright.config import PRESETS
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.models.bases import Base, resolve_base
from tunewright.models.loading import load_model, require_bitsandbytes

IDS = torch.arange(3, 43)[None]

# Dettmers et al. 2023, appendix E.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> Base:
    return _base(tiny_base_folder)


def _base(folder: Path) -> Base:
    return resolve_base(str(folder), None, folder.parent, LogReporter())


def _tuned(base: Base, dtype: str = "float32") -> Any:
    """An adapter that has an effect, on an NF4 base."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(PRESETS["all-linear"]["target_modules"]), task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_model(base, dtype, "nf4"), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def _trained(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits in training mode, and each LoRA weight's gradient."""
    model.train()
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nf4_quantizes_exactly_the_seven_linear_layers(
    architecture: Literal["llama", "mistral"], dtype: str, tmp_path: Path
) -> None:
    from bitsandbytes.nn import Linear4bit

    base = _base(build_base(tmp_path / architecture, architecture))
    before = base.digest
    model = load_model(base, dtype, "nf4")
    four_bit = {name for name, part in model.named_modules() if isinstance(part, Linear4bit)}
    linear = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert four_bit == linear - {"lm_head"}
    assert {name.rpartition(".")[2] for name in four_bit} == set(PRESETS["all-linear"]["target_modules"])
    for name, weight in model.named_parameters():
        held_whole = name.removesuffix(".weight") not in four_bit
        assert weight.dtype == (getattr(torch, dtype) if held_whole else torch.uint8), name
    for part in model.modules():
        if isinstance(part, Linear4bit):
            assert part.compute_dtype == getattr(torch, dtype)
            held: Any = part.weight
            assert held.quant_state.nested
    assert _base(base.folder).digest == before


def _reference(weight: Tensor, codes: Tensor) -> Tensor:
    """NF4 in blocks of 64, whose scales are quantized in blocks of 256 around their mean to 8-bit ``codes``."""
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1)
    nearest = (blocks[:, :, None] / scales[:, None, None] - NF4).abs().argmin(-1)
    mean = scales.mean()
    centred = scales - mean
    held = torch.cat(
        [
            codes[(part[:, None] / part.abs().max() - codes).abs().argmin(-1)] * part.abs().max()
            for part in centred.split(256)
        ]
    )
    return (NF4[nearest] * (held + mean)[:, None]).reshape(weight.shape)


def test_dequantized_weights_match_the_nf4_paper(base: Base) -> None:
    from bitsandbytes.functional import dequantize_4bit

    whole, quantized = load_model(base, "float32", "none"), load_model(base, "float32", "nf4")
    compared = 0
    for name, weight in whole.named_parameters():
        held: Any = quantized.get_parameter(name)
        if held.dtype != torch.uint8:
            assert torch.equal(held, weight)
            continue
        codes = held.quant_state.state2.code
        assert len(codes) == 256
        found = dequantize_4bit(held, held.quant_state)
        torch.testing.assert_close(found, _reference(weight.detach(), codes), rtol=1e-6, atol=1e-7)
        assert 0.02 < float((found - weight.detach()).norm() / weight.detach().norm()) < 0.15
        compared += 1
    assert compared == 14


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eval_mode_changes_neither_logits_nor_gradients_over_nf4(base: Base, dtype: str) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes by itself leaves no gradient at all after one evaluation."""
    model = _tuned(base, dtype)
    logits, gradients = _trained(model)
    assert len(gradients) == 2 * 14
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits)
    again, gradients_again = _trained(model)
    assert torch.equal(again, logits)
    assert gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradients_again[name], gradient), name


def test_bitsandbytes_has_the_repacking_switch() -> None:
    from bitsandbytes.nn import Linear4bit

    assert hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu")


def test_mixed_batch_over_nf4_answers_each_row_as_alone(base: Base, tmp_path: Path) -> None:
    from tunewright.generation.generate import generate
    from tunewright.generation.requests import Request
    from tunewright.models.loading import with_adapters

    for name, seed in (("one", 1), ("two", 2)):
        made = _tuned(base)
        torch.manual_seed(seed)
        for key, weight in made.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.3)
        made.save_pretrained(tmp_path / name)
    model = with_adapters(load_model(base, "float32", "nf4"), {name: tmp_path / name for name in ("one", "two")})
    requests = [Request((5 + n, 60, 70), adapter, 8) for n, adapter in enumerate([None, "one", "two"] * 2)]

    def answers(asked: list[Request]) -> Any:
        return generate(model, asked, stop_ids={0}, pad_id=258, batch_size=8)

    together = answers(requests)
    assert together == [answers([request])[0] for request in requests]
    assert len({completion.ids for completion in together[:3]}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_added_adapter_over_nf4_answers_as_peft_layers(dtype: str, base: Base, tmp_path: Path) -> None:
    from tunewright.adapters.lora_weights import load_lora_weights
    from tunewright.generation.lora_dispatch import LoraDispatch
    from tunewright.models.loading import with_adapters

    _tuned(base).save_pretrained(tmp_path)
    model: Any = load_model(base, dtype, "nf4")
    adapters = LoraDispatch(model, mixed=True)
    adapters.add("tuned", load_lora_weights(tmp_path, model))
    wrapped: Any = with_adapters(load_model(base, dtype, "nf4"), {"tuned": tmp_path})
    ids = torch.cat([IDS, IDS + 1])
    with torch.inference_mode():
        with adapters.use_adapters(["tuned", None]):
            found = model(input_ids=ids).logits
        assert torch.equal(found, wrapped(input_ids=ids, adapter_names=["tuned", "__base__"]).logits)
        assert not torch.equal(found, model(input_ids=ids).logits)


def _installed(version: str | None) -> Any:
    def look(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    return look


@pytest.mark.parametrize(("version", "message"), [(None, "it is not installed"), ("0.45.5", "0.45.5 is installed")])
def test_load_model_names_the_pip_command_without_bitsandbytes(
    version: str | None, message: str, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunewright.models.loading.package_version", _installed(version))
    require_bitsandbytes("none")
    with pytest.raises(UserError, match=message) as caught:
        load_model(base, "float32", "nf4")
    assert "pip install 'tunewright[4bit]'" in (caught.value.fix or "")


# The decision tree of bitsandbytes' kernel (dQuantizeNF4 in its csrc/kernels.cu,
# later csrc/cuda/blockwise_quantization.cu). It compares weight * (1 / absmax) in float32 by `>`.
CUDA_THRESHOLDS = torch.tensor([
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
])  # fmt: skip


def test_processor_quantizes_every_bfloat16_weight_to_the_cards_bits() -> None:
    """For every weight and every mantissa of a block's largest weight, in blocks of 64 weights.

    The kernel is compiled with --use_fast_math, whose reciprocal may be 1 ulp off (CUDA Programming Guide). No bit
    depends on it.
    """
    from bitsandbytes.functional import quantize_4bit

    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    largest = torch.cat([1 + torch.arange(128) / 128, torch.tensor([2.0**-100, 1.7 * 2.0**-60, 1.3 * 2.0**60])])
    for scale in largest.bfloat16():
        weights = every[every.abs() <= scale]  # no infinity, no NaN
        blocks = torch.cat([weights, scale.repeat(-len(weights) % 63)]).view(-1, 63)
        blocks = torch.cat([scale.expand(len(blocks), 1), blocks], 1)  # each has its largest weight
        packed, state = quantize_4bit(blocks, blocksize=64, quant_type="nf4")
        assert bool((state.absmax == scale.float()).all())
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
        exact = 1 / scale.float()
        for reciprocal in (exact, exact.nextafter(exact * 2), exact.nextafter(exact / 2)):
            assert torch.equal(codes, torch.bucketize(blocks.flatten().float() * reciprocal, CUDA_THRESHOLDS).byte())
