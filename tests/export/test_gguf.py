"""GGUF files: read back by transformers' own loader, and run by llama.cpp."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from export_helpers import CHATS, adapted, in_bfloat16, logits, open_base, peft_logits
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from making.makers import build_llama3_base, build_mistral_base, llama2_tokenizer
from making.tiny_bases import build_base
from tunewright.chat import ChatFormat, open_chat
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.export.gguf.artifact import LlamaCpp, running
from tunewright.export.gguf.model import add_tokenizer, write_lora, write_model
from tunewright.export.gguf.tensors import FileType, Mixture, quantize_rows
from tunewright.export.weights import Weights, read_deltas
from tunewright.models.bases import Base


def _build_llama2_like(folder: Path) -> Path:
    build_mistral_base(folder, "v1")
    llama2_tokenizer().save_pretrained(folder)
    return folder


BASES: dict[str, Callable[[Path], Path]] = {
    "bytes": build_base,
    "mistral": lambda folder: build_base(folder, "mistral"),
    "llama 3.1": lambda folder: build_llama3_base(folder, "llama3_1"),
    "mistral v1": lambda folder: build_mistral_base(folder, "v1"),
    "mistral v3": lambda folder: build_mistral_base(folder, "v3"),
    "tekken": lambda folder: build_mistral_base(folder, "v7-tekken"),
    "llama 2": _build_llama2_like,
}


def _written(base: Base, path: Path, file_type: FileType = "f16", adapter: Path | None = None) -> ChatFormat:
    chat = open_chat(base)
    changes = read_deltas(adapter) if adapter else {}
    tokens = partial(add_tokenizer, chat, None)
    write_model(path, "tiny", Weights(base, "float32", changes), base, tokens, file_type, LogReporter())
    return chat


def _log_probs(engine: LlamaCpp, ids: list[int], vocabulary: int) -> torch.Tensor:
    listed = engine.next_token(ids)
    found = torch.full((vocabulary,), float("nan"), dtype=torch.float64)
    found[listed.ids] = listed.log_probs.double()
    return found


# The largest vocabularies take ten times as long as the others.
LARGE = ("llama 3.1", "tekken")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in BASES])
def test_llama_cpp_renders_the_training_ids_and_predicts_equally(name: str, tmp_path: Path) -> None:
    base = open_base(BASES[name](tmp_path / "base"))
    chat = _written(base, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    with running(tmp_path / "model.gguf", 512) as engine:
        for messages in CHATS:
            ids = list(chat.prompt(messages))
            assert engine.prompt_ids(messages, chat.template) == ids, messages
        ours = logits(model, [ids])[0][-1].double().log_softmax(-1)
        theirs = _log_probs(engine, ids, len(ours))
    there = ~theirs.isnan()
    assert int(there.sum()) == min(len(ours), 1000)
    assert float((ours - theirs)[there].abs().max()) < 0.02


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("file_type", ["f16", "q8_0"])
def test_transformers_reads_the_merged_gguf_as_peft_computes(
    architecture: Any, file_type: FileType, tmp_path: Path
) -> None:
    base = open_base(in_bfloat16(build_base(tmp_path / "base", architecture)))
    adapter = adapted(base.folder, tmp_path / "adapter")
    chat = _written(base, tmp_path / "model.gguf", file_type, adapter.folder)
    ids = [chat.prompt(messages) for messages in CHATS]
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    plain = logits(AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32), ids)
    allowed = 0.005 if file_type == "f16" else 0.1
    for found, wanted, without in zip(
        logits(back, ids), peft_logits(base.folder, adapter.folder, ids), plain, strict=True
    ):
        assert float((found - wanted).abs().max()) < allowed
        assert float((without - wanted).abs().max()) > 3 * allowed


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("mistral", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"alpha_pattern": {"q_proj": 3, "down_proj": 20}}),
    ],
)
def test_llama_cpp_applies_the_lora_file_as_peft(architecture: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    base = open_base(in_bfloat16(build_base(tmp_path / "base", architecture)))
    adapter = adapted(base.folder, tmp_path / "adapter", **settings)
    chat = _written(base, tmp_path / "model.gguf")
    weights = Weights(base, "bfloat16", read_deltas(adapter.folder))
    assert write_lora(tmp_path / "lora.gguf", adapter.name, weights, base, "f16", LogReporter()) == []
    ids = list(chat.prompt(CHATS[0]))
    wanted = peft_logits(base.folder, adapter.folder, [ids])[0][-1].double().log_softmax(-1)
    plain = logits(AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32), [ids])[0][-1]
    with running(tmp_path / "model.gguf", 512, tmp_path / "lora.gguf") as engine:
        found = _log_probs(engine, ids, len(wanted))
    assert float((found - wanted).abs().max()) < 0.02
    assert float((plain.double().log_softmax(-1) - wanted).abs().max()) > 0.1


def test_gguf_keeps_tied_embeddings_and_scaled_positions(tmp_path: Path) -> None:
    folder = build_base(tmp_path / "base")
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    LlamaForCausalLM(config).save_pretrained(folder)
    base = open_base(folder)
    chat = _written(base, tmp_path / "model.gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert "output.weight" not in names
    assert "rope_freqs.weight" in names
    ids = list(chat.prompt(CHATS[0])) * 4
    ours = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), [ids])[0][-1].double()
    with running(tmp_path / "model.gguf", 1024) as engine:
        theirs = _log_probs(engine, ids, len(ours))
    assert float((ours.log_softmax(-1) - theirs).abs().max()) < 0.02


def test_gguf_refuses_dora_and_unknown_tokenizers(tmp_path: Path) -> None:
    base = open_base(build_base(tmp_path / "base"))
    adapter = adapted(base.folder, tmp_path / "adapter", use_dora=True)
    weights = Weights(base, "float32", read_deltas(adapter.folder))
    with pytest.raises(UserError, match="does not support DoRA"):
        write_lora(tmp_path / "lora.gguf", adapter.name, weights, base, "f16", LogReporter())
    tokenizer = base.folder / "tokenizer.json"
    text = tokenizer.read_text(encoding="utf-8")
    assert '"add_prefix_space": false' in text
    tokenizer.write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true', 1), encoding="utf-8")
    with pytest.raises(UserError, match="no known pre-tokenization rule"):
        _written(open_base(base.folder), tmp_path / "model.gguf")


# K-quants: the types of published files, and llama.cpp's conversion read back by the package gguf

KIND = gguf.GGMLQuantizationType
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def _types(mixture: Mixture, columns: int = 4096) -> Counter[str]:
    names = [f"blk.{layer}.{matrix}.weight" for layer in range(mixture.layers) for matrix in MATRICES]
    return Counter(mixture.kind(name, columns).name for name in ["token_embd.weight", *names, "output.weight"])


def test_mixture_has_the_types_of_published_files() -> None:
    """As llama.cpp lists them when it loads Llama 3 8B and 70B."""
    assert _types(Mixture("q4_k_m", 32, tied=False, shared_heads=True)) == {"Q4_K": 193, "Q6_K": 33}
    assert _types(Mixture("q5_k_m", 32, tied=False, shared_heads=True)) == {"Q5_K": 193, "Q6_K": 33}
    assert _types(Mixture("q4_k_m", 80, tied=False, shared_heads=True)) == {"Q4_K": 441, "Q5_K": 40, "Q6_K": 81}


def test_mixture_takes_larger_types_for_other_row_lengths() -> None:
    mixture = Mixture("q4_k_m", 32, tied=True, shared_heads=False)
    assert mixture.kind("blk.5.attn_q.weight", 576) == KIND.Q5_0
    assert mixture.kind("blk.0.attn_v.weight", 576) == KIND.Q8_0
    assert mixture.kind("token_embd.weight", 576) == KIND.Q8_0
    assert mixture.kind("token_embd.weight", 512) == KIND.Q6_K
    assert Mixture("q5_k_m", 32, tied=True, shared_heads=False).kind("blk.5.attn_q.weight", 576) == KIND.Q5_1
    assert mixture.kind("blk.5.attn_q.weight", 16) == KIND.F16


# Of the values' spread; a uniform grid over the +-3 spreads of 32 values has 6 / 2**bits / sqrt(12).
@pytest.mark.parametrize(("kind", "error"), [("Q4_K", 0.11), ("Q5_K", 0.055), ("Q6_K", 0.028), ("Q5_1", 0.055)])
@pytest.mark.parametrize("rows", [1, 5, 67])
def test_quantized_rows_are_read_back_close_to_the_weights(kind: str, error: float, rows: int) -> None:
    weights = np.random.default_rng(0).normal(size=(rows, 512)).astype(np.float32)
    back = gguf.quants.dequantize(quantize_rows(weights, getattr(KIND, kind)), getattr(KIND, kind))
    assert back.shape == weights.shape
    assert np.sqrt(((back - weights) ** 2).mean()) < error


@pytest.mark.parametrize("file_type", ["q4_k_m", "q5_k_m"])
def test_llama_cpp_runs_a_file_of_k_quants(file_type: FileType, tmp_path: Path) -> None:
    base = open_base(build_base(tmp_path / "base", hidden_size=256, intermediate_size=512))
    files = {name: tmp_path / f"{name}.gguf" for name in ("f16", file_type)}
    tops = []
    for name, path in files.items():
        chat = _written(base, path, name)
        with running(path, 512) as engine:
            listed = engine.next_token(chat.prompt(CHATS[0]))
        tops.append(dict(zip(listed.ids.tolist(), listed.log_probs.tolist(), strict=True)))
    exact, rounded = tops
    assert 0 < max(abs(exact[token] - rounded[token]) for token in exact if token in rounded) < 0.5
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(files[file_type]).tensors}
    assert kinds["blk.0.attn_q.weight"] == ("Q4_K" if file_type == "q4_k_m" else "Q5_K")
    assert kinds["output.weight"] == "Q6_K"
    assert kinds["output_norm.weight"] == "F32"
