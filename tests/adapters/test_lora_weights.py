"""LoRA weights read without changing the base, against what peft builds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file

from making.property_examples import examples
from making.wandering_models import llama
from tunewright.adapters.lora_weights import check_adapter, load_lora_weights
from tunewright.adapters.registry import CONFIG, WEIGHTS
from tunewright.core.errors import UserError
from tunewright.generation.lora_dispatch import LoraDispatch

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
IDS = torch.tensor([[9, 10, 11, 12], [13, 14, 15, 16]])
PATTERNS = st.sampled_from(["q_proj", "layers.1.self_attn.v_proj", r"model.layers.0.*", r".*\.down_proj"])
RANKS, ALPHAS = st.integers(1, 9), st.sampled_from([1, 3, 8.0, 20, 0.5])
CONFIGS = st.fixed_dictionaries(
    {
        "r": RANKS,
        "lora_alpha": ALPHAS,
        "use_rslora": st.booleans(),
        "lora_dropout": st.sampled_from([0.0, 0.3]),
        "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
        # The first that matches holds, and peft writes them sorted.
        "rank_pattern": st.dictionaries(PATTERNS, RANKS, max_size=2).map(lambda found: dict(sorted(found.items()))),
        "alpha_pattern": st.dictionaries(PATTERNS, ALPHAS, max_size=2).map(lambda found: dict(sorted(found.items()))),
    },
    optional={"exclude_modules": st.sampled_from([["layers.0.self_attn.q_proj"], ["k_proj"], r".*\.1\..*", []])},
)
TARGETS = st.one_of(
    st.fixed_dictionaries({"target_modules": st.lists(st.sampled_from(KINDS), min_size=1, unique=True)}),
    st.fixed_dictionaries(
        {
            "target_modules": st.lists(st.sampled_from(KINDS[:7]), min_size=1, unique=True),
            "layers_to_transform": st.sampled_from([0, 1, [0], [0, 1], []]),
            "layers_pattern": st.sampled_from([None, "layers", ["layers"]]),
        }
    ),
    st.fixed_dictionaries({"target_modules": st.sampled_from(["all-linear", r".*\.layers\.1\..*_proj", r".*q_proj"])}),
)


def _base(dtype: torch.dtype) -> Any:
    return llama().float().to(dtype)


def _save(folder: Path, config: LoraConfig, weights_in: torch.dtype = torch.float32) -> None:
    """Save an adapter with an effect by peft."""
    wrapped: Any = get_peft_model(llama().float(), config)
    torch.manual_seed(4)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.4)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor.to(weights_in) for name, tensor in tensors.items()}, folder / WEIGHTS)


@examples(15)
@given(
    config=CONFIGS,
    targets=TARGETS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    weights_in=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_load_lora_weights_equals_peft_for_any_configuration(
    config: dict[str, Any], targets: dict[str, Any], dtype: torch.dtype, weights_in: torch.dtype
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            _save(folder, LoraConfig(**config, **targets), weights_in)
        except ValueError:
            assume(False)  # nothing that it could be for, or what excludes itself: peft does not make it
        base = _base(dtype)
        names = [name for name, _ in base.named_modules()]
        read = load_lora_weights(folder, base)
        assert [name for name, _ in base.named_modules()] == names
        wrapped = PeftModel.from_pretrained(_base(dtype), folder).eval()
    built = {
        name.removeprefix("base_model.model."): layer
        for name, layer in wrapped.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert read.keys() == built.keys()
    for name, lora in read.items():
        layer: Any = built[name]
        assert lora.scale == layer.scaling["default"]
        for ours, theirs in ((lora.down, layer.lora_A["default"].weight), (lora.up, layer.lora_B["default"].weight)):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs.t())
            assert ours.stride() == theirs.t().stride()
    beside = LoraDispatch(base, mixed=True)
    beside.add("default", read)
    with torch.inference_mode():
        expected = wrapped(input_ids=IDS).logits
        with beside.use_adapters(["default", "default"]):
            found = base(input_ids=IDS).logits
        with LoraDispatch(wrapped, mixed=True).use_adapters(["default", "default"]):
            before = wrapped(input_ids=IDS).logits
        plain = base(input_ids=IDS).logits
    assert torch.equal(found, before), "as rows of a PeftModel are answered"
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, plain)


PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("more", "key", "by_vllm"),
    [
        ({"use_dora": True}, "use_dora", "DoRA"),
        ({"lora_bias": True}, "lora_bias", "biases in addition"),
        ({"bias": "lora_only"}, "bias", "bias: lora_only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", "lm_head"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights", "pissa"),
        ({"init_lora_weights": "olora"}, "init_lora_weights", "olora"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens", "activated LoRA"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication", "replicated layers"),
        ({"r": 600}, "r", "600"),
        ({"rank_pattern": {"q_proj": 513}}, "r", "513"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices", "trainable_tokens"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens is not a linear layer", "embed_tokens"),
    ],
)
def test_adapters_beyond_plain_lora_are_neither_stored_for_vllm_nor_loaded(
    more: dict[str, Any], key: str, by_vllm: str, tmp_path: Path
) -> None:
    get_peft_model(llama().float(), LoraConfig(**PLAIN | more)).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=by_vllm) as refused:
        check_adapter(tmp_path, servable=True)
    assert (refused.value.where or "").startswith(f"{tmp_path / CONFIG}, ")
    check_adapter(tmp_path, servable=False)
    if key == "r":  # only vLLM has a largest rank
        load_lora_weights(tmp_path, llama().float())
    else:
        with pytest.raises(UserError, match=key):
            load_lora_weights(tmp_path, llama().float())


@pytest.mark.parametrize(
    "more", [{"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"r": 512, "rank_pattern": {"v_proj": 8}}]
)
def test_plain_lora_is_stored_and_loaded(more: dict[str, Any], tmp_path: Path) -> None:
    _save(tmp_path, LoraConfig(**PLAIN | more))
    check_adapter(tmp_path, servable=True)
    assert len(load_lora_weights(tmp_path, llama().float())) == 4


def test_load_lora_weights_refuses_unknown_keys_with_an_effect(tmp_path: Path) -> None:
    _save(tmp_path, LoraConfig(**PLAIN))
    said = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(said | {"use_tomorrow": False}))
    assert len(load_lora_weights(tmp_path, llama().float())) == 4
    (tmp_path / CONFIG).write_text(json.dumps(said | {"use_tomorrow": True}))
    with pytest.raises(UserError, match="use_tomorrow: true"):
        load_lora_weights(tmp_path, llama().float())


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NAME), f"{NAME} is missing"),
        (
            lambda tensors: tensors.update({NAME.replace("q_proj", "k_proj"): tensors[NAME].clone()}),
            "not part of the configuration",
        ),
        (lambda tensors: tensors.update({NAME: tensors[NAME][:3].clone()}), r"is \[3, 64\]; with this base"),
        (lambda tensors: tensors.update({NAME: tensors[NAME][:, :32].clone()}), r"is \[4, 32\]; with this base"),
    ],
)
def test_load_lora_weights_refuses_missing_and_unexpected_weights(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    _save(tmp_path, LoraConfig(**PLAIN))
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=message):
        load_lora_weights(tmp_path, llama().float())


def test_load_lora_weights_reports_unreadable_files(tmp_path: Path) -> None:
    _save(tmp_path, LoraConfig(**PLAIN))
    (tmp_path / WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_lora_weights(tmp_path, llama().float())
    said = {"peft_type": "LORA", "target_modules": ".*_proj", "layers_to_transform": [0]}
    (tmp_path / CONFIG).write_text(json.dumps(said))
    with pytest.raises(UserError, match="peft rejects"):
        load_lora_weights(tmp_path, llama().float())


def test_loaded_weights_do_not_change_with_the_file(tmp_path: Path) -> None:
    """Reading maps the file, so a later write could change the answers."""
    _save(tmp_path, LoraConfig(**PLAIN))
    read = load_lora_weights(tmp_path, llama().float())
    before = {name: lora.down.clone() for name, lora in read.items()}
    with (tmp_path / WEIGHTS).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size - 4096)
        file.write(b"\0" * 4096)
    assert all(torch.equal(read[name].down, before[name]) for name in read)
