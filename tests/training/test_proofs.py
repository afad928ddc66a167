"""The proofs of a base: every architecture of docs/how-to/models.md at its published shape, shrunk, and mutations."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from making.command_line import tiny_project
from making.command_line import tunewright as run
from making.tiny_bases import build_base, build_shrunk
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.engines.vllm import vllm_support
from tunewright.generation import decoding, kv_cache
from tunewright.models.bases import resolve_base
from tunewright.models.families import Shape, shape_of
from tunewright.models.shrunk import random_model, shrunk
from tunewright.training.packing import attention
from tunewright.training.proving import cache_fault, layers_fault, packing_fault, prove, prove_config, require_proofs

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + n / 48 for n in range(48)],
    "long_factor": [1.0 + n for n in range(48)],
    "original_max_position_embeddings": 4096,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.015625,
    "logits_scaling": 16.0,
    "residual_multiplier": 0.22,
    "num_key_value_heads": 8,
}
HYBRID = {**GRANITE, "layer_types": (["mamba"] * 5 + ["attention"]) * 5 + ["mamba", "attention"]}

PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama 3.1": ("llama", "LlamaForCausalLM", {"rope_parameters": LLAMA_3, "num_key_value_heads": 8}),
    "Mistral 7B v0.1": ("mistral", "MistralForCausalLM", {"sliding_window": 4096}),
    "Mistral Small 3.1": ("mistral3", "Mistral3ForConditionalGeneration", {}),
    "Devstral 2": ("ministral3", "Ministral3ForCausalLM", {}),
    "Mixtral": ("mixtral", "MixtralForCausalLM", {}),
    "Mistral 4": ("mistral4", "Mistral4ForCausalLM", {}),
    "Mistral Large 4": ("mistral_large4", "MistralLarge4ForConditionalGeneration", {}),
    "Qwen 2.5": ("qwen2", "Qwen2ForCausalLM", {"num_key_value_heads": 4}),
    "Qwen 3": ("qwen3", "Qwen3ForCausalLM", {"num_key_value_heads": 8}),
    "Qwen 3 MoE": ("qwen3_moe", "Qwen3MoeForCausalLM", {}),
    "Qwen 3.5": ("qwen3_5", "Qwen3_5ForConditionalGeneration", {}),
    "Gemma 2": ("gemma2", "Gemma2ForCausalLM", {}),
    "Gemma 3 text": ("gemma3_text", "Gemma3ForCausalLM", {}),
    "Gemma 3": ("gemma3", "Gemma3ForConditionalGeneration", {}),
    "Gemma 4": (
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {"text_config": {"model_type": "gemma4_text", "final_logit_softcapping": 30.0}},
    ),
    "Phi 3": ("phi3", "Phi3ForCausalLM", {"sliding_window": 2047}),
    "Phi 4 mini": (
        "phi3",
        "Phi3ForCausalLM",
        {
            "rope_parameters": LONG,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "Granite": ("granite", "GraniteForCausalLM", GRANITE),
    "Granite hybrid": ("granitemoehybrid", "GraniteMoeHybridForCausalLM", HYBRID),
    "OLMo 2": ("olmo2", "Olmo2ForCausalLM", {}),
    "OLMo 3": ("olmo3", "Olmo3ForCausalLM", {}),
    "SmolLM 3": ("smollm3", "SmolLM3ForCausalLM", {}),
    "gpt-oss": ("gpt_oss", "GptOssForCausalLM", {}),
    "GLM 4": ("glm4", "Glm4ForCausalLM", {}),
    "GLM 4.5": ("glm4_moe", "Glm4MoeForCausalLM", {"head_dim": 128, "attention_bias": True}),
    "Llama 4": ("llama4_text", "Llama4ForCausalLM", {}),
    "Cohere 2": ("cohere2", "Cohere2ForCausalLM", {}),
}
FAILS: dict[str, set[str]] = {
    "Qwen 3.5": {"packing", "cache"},
    "Granite hybrid": {"packing", "cache"},
    "Mistral Large 4": {"packing", "cache"},
    "Llama 4": {"packing", "cache"},
}
EXPERTS = {"Mixtral", "Mistral 4", "Mistral Large 4", "Qwen 3 MoE", "gpt-oss", "GLM 4.5", "Llama 4", "Granite hybrid"}


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "models.md"


def _config(name: str) -> tuple[Any, str]:
    kind, architecture, values = PUBLISHED[name]
    return transformers.AutoConfig.for_model(kind, **values), architecture


def _expected(name: str) -> set[str]:
    return FAILS.get(name, set()) | ({"memory"} if name in EXPERTS else set())


def test_page_lists_the_proved_architectures_with_what_fails_and_what_vllm_serves() -> None:
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.count("|") == 6]
    shown = {
        architecture: (set(re.findall(r"`(\w+)`", row[3])), row[4].strip())
        for row in rows
        for architecture in re.findall(r"`(\w+For\w+)`", row[2])
    }
    says = {"yes": "lists it and its adapters", "merged only": "but not its adapters", "no": "does not list it"}
    assert {architecture: fails for architecture, (fails, _) in shown.items()} == {
        architecture: _expected(name) for name, (_, architecture, _) in PUBLISHED.items()
    }
    for architecture, (_, vllm) in shown.items():
        assert says[vllm] in vllm_support(architecture), architecture


@pytest.mark.parametrize("name", PUBLISHED)
def test_architecture_passes_and_fails_the_expected_proofs(name: str) -> None:
    config, architecture = _config(name)
    proofs = {each.name: each for each in prove_config(config, architecture)}
    failed = {key: each.reason for key, each in proofs.items() if not each.passed}
    assert failed.keys() == _expected(name), failed
    assert all(failed.values())
    if name in ("Qwen 3.5", "Granite hybrid"):
        assert failed["packing"] == "layers of the kind linear_attention carry a state from one token to the next"


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("Llama 3.1", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("Phi 3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("gpt-oss", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("GLM 4", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ],
)
def test_linear_layers_are_found_in_the_model(name: str, linear: set[str]) -> None:
    assert set(shape_of(*_config(name)).names) == linear


@pytest.fixture(scope="module")
def gemma() -> tuple[Any, Shape]:
    """A shrunk Gemma 2: windows, soft caps, norms before and after each block."""
    config, architecture = _config("Gemma 2")
    small = shrunk(config)
    return random_model(small, architecture), shape_of(small, architecture)


@pytest.fixture(scope="module")
def gpt_oss() -> tuple[Any, Shape]:
    """A shrunk gpt-oss: sinks, windows and biases."""
    config, architecture = _config("gpt-oss")
    small = shrunk(config)
    return random_model(small, architecture), shape_of(small, architecture)


def _scale_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm.weight.data.mul_(1.1)


def _drop_bias(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.bias.data.zero_()
    model.model.layers[0].self_attn.v_proj.bias.data.zero_()


def _drop_sinks(model: Any) -> None:
    model.model.layers[0].self_attn.sinks.data.fill_(-1e4)


def _window_off_by_one(model: Any) -> None:
    for layer in model.model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window += 1


def _without_cap(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def _mutated(model: Any, change: Callable[[Any], None]) -> Any:
    mutated = copy.deepcopy(model)
    change(mutated)
    return mutated


@pytest.mark.parametrize("change", [_drop_bias, _drop_sinks, _scale_norm])
def test_changed_weight_of_the_loaded_model_fails_layers(
    change: Callable[[Any], None], gpt_oss: tuple[Any, Shape]
) -> None:
    model, shape = gpt_oss
    assert "logits of the loaded model differ" in str(layers_fault(model, shape, change))
    assert layers_fault(model, shape) is None


@pytest.mark.parametrize("change", [_drop_bias, _drop_sinks, _scale_norm, _window_off_by_one])
def test_mutation_of_the_copy_fails_packing(change: Callable[[Any], None], gpt_oss: tuple[Any, Shape]) -> None:
    model, shape = gpt_oss
    assert "packed rows differ" in str(packing_fault(_mutated(model, change), model, shape))


@pytest.mark.parametrize("change", [_scale_norm, _window_off_by_one, _without_cap])
def test_mutation_of_a_soft_capped_copy_fails_packing(change: Callable[[Any], None], gemma: tuple[Any, Shape]) -> None:
    model, shape = gemma
    assert "packed rows differ" in str(packing_fault(_mutated(model, change), model, shape))


@pytest.mark.parametrize("change", [_drop_bias, _drop_sinks, _scale_norm])
def test_mutation_of_the_copy_fails_cache(change: Callable[[Any], None], gpt_oss: tuple[Any, Shape]) -> None:
    model, shape = gpt_oss
    assert "decoded token differs" in str(cache_fault(_mutated(model, change), model, shape))


def test_packed_window_off_by_one_fails_only_packing(gemma: tuple[Any, Shape], monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape = gemma
    seen = attention._seen
    monkeypatch.setattr(
        attention, "_seen", lambda queries, before, window, *a: seen(queries, before, window and window - 1, *a)
    )
    assert "packed rows differ" in str(packing_fault(copy.deepcopy(model), model, shape))
    assert cache_fault(copy.deepcopy(model), model, shape) is None


def test_decoding_positions_off_by_one_fail_only_cache(
    gemma: tuple[Any, Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that count padding rotate a shorter row's keys further."""
    model, shape = gemma
    monkeypatch.setattr(
        decoding, "from_prefix", lambda prefix, shifts: kv_cache.from_prefix(prefix, [shift + 1 for shift in shifts])
    )
    assert "decoded token differs" in str(cache_fault(copy.deepcopy(model), model, shape))
    assert packing_fault(copy.deepcopy(model), model, shape) is None


def test_proofs_are_kept_by_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = build_base(tmp_path / "base")
    made = prove(base / "config.json", LogReporter())
    assert made.packed and made.own_cache and made.layers
    monkeypatch.setattr("tunewright.training.proving.prove_config", lambda *_: pytest.fail("proved again"))
    assert prove(base / "config.json", LogReporter()) == made


def test_base_that_cannot_be_packed_has_the_reason_and_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = build_base(tmp_path / "base")
    config, architecture = _config("Granite hybrid")
    values = shrunk(config).to_dict() | {"architectures": [architecture], "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(values))
    base = resolve_base(str(folder), None, tmp_path, LogReporter())
    assert not require_proofs(base, ("layers",), LogReporter()).packed
    with pytest.raises(UserError, match="fails the proof `packing`: layers of the kind linear_attention"):
        require_proofs(base, ("layers", "packing"), LogReporter())
    ran = run("doctor", "--base", folder, "--json")
    assert ran.code == 0
    assert {each["name"]: each["passed"] for each in ran.document["proofs"]} == {
        "layers": True,
        "packing": False,
        "cache": False,
        "adapter": True,
        "memory": False,
    }
    assert {each["part"]: each["state"] for each in ran.document["template"]}["answers"] == "passed"
    assert ran.document["vllm"].endswith(" lists it and its adapters.")
    assert vllm_support("Gemma3nForCausalLM").endswith("serve them with the engine peft, or merged.")
    assert vllm_support("OfNoOneForCausalLM").endswith(" does not list it: serve it with the engine peft.")


def test_doctor_proves_a_bases_own_weights_and_finds_a_broken_one(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    ran = run("doctor", "--base", folder, "--full", "--json")
    assert ran.code == 0
    assert {each["name"]: each["reason"] for each in ran.document["full"]["proofs"]} == dict.fromkeys(
        ("layers", "packing", "cache", "adapter", "memory")
    )
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})
    ran = run("doctor", "--base", folder, "--full", "--json")
    assert ran.code == 3
    assert all(each["passed"] for each in ran.document["proofs"])
    assert ran.document["full"]["proofs"][0]["reason"] == "the logits of the loaded model differ by inf%"
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    ran = run("doctor", "--base", folder, "--full")
    assert (ran.code, "needs " in ran.stderr and "Leave out --full" in ran.stderr) == (2, True)


def test_doctor_exits_with_3_for_a_base_without_decoder_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "base").mkdir()
    values = transformers.GPT2Config().to_dict() | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(values))
    ran = run("doctor", "--base", tmp_path / "base")
    assert ran.code == 3
    assert "cannot be opened as a causal decoder" in ran.stdout


def test_attention_with_sinks_and_cap_of_separate_rows_is_causal() -> None:
    from tunewright.generation.attention import attend_scores

    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    whole = attend_scores(query, key, value, None, 0.3, 2.0, torch.randn(4))
    changed = value.clone()
    changed[:, :, 4] += 1
    again = attend_scores(query, key, changed, None, 0.3, 2.0, None)
    plain = attend_scores(query, key, value, None, 0.3, 2.0, None)
    assert torch.equal(again[:, :, :4], plain[:, :, :4])
    assert not torch.allclose(plain, whole)


@pytest.mark.parametrize(
    "name", ["Gemma 2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Phi 3", "gpt-oss", "Gemma 4"))]
)
def test_base_is_trained_evaluated_and_merged_by_the_command_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kind, architecture, values = PUBLISHED[name]
    base = build_shrunk(tmp_path / "base", kind, architecture, **values)
    project = tiny_project(tmp_path / "project", base, count=40)
    settings = (project / "tunewright.yaml").read_text().replace("epochs: 2", "epochs: 1")
    (project / "tunewright.yaml").write_text(settings.replace("evaluate:\n", "evaluate:\n  max_new_tokens: 3\n"))
    for command in (["data", "add", project / "pairs.jsonl"], ["train", "--force"], ["export", "merge"]):
        ran = run(*command, "-p", project)
        assert ran.code == 0, ran.stderr
    ran = run("evaluate", "-p", project)
    assert ran.code in (0, 3, 4), ran.stderr
