"""K-quants: the types of published files, and llama.cpp's conversion read back by the package gguf."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from export_helpers import CHATS, open_base

from making.tiny_bases import build_base
from tunewright.chat import open_chat
from tunewright.core.progress import LogReporter
from tunewright.export.gguf.artifact import running
from tunewright.export.gguf.model import add_tokenizer, write_model
from tunewright.export.gguf.tensors import FileType, Mixture, quantize_rows
from tunewright.export.weights import Weights

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
    chat = open_chat(base)
    files = {name: tmp_path / f"{name}.gguf" for name in ("f16", file_type)}
    tops = []
    for name, path in files.items():
        tokens = partial(add_tokenizer, chat, None)
        write_model(path, "tiny", Weights(base, "float32", {}), base, tokens, name, LogReporter())
        with running(path, 512) as engine:
            listed = engine.next_token(chat.prompt(CHATS[0]))
        tops.append(dict(zip(listed.ids.tolist(), listed.log_probs.tolist(), strict=True)))
    exact, rounded = tops
    assert 0 < max(abs(exact[token] - rounded[token]) for token in exact if token in rounded) < 0.5
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(files[file_type]).tensors}
    assert kinds["blk.0.attn_q.weight"] == ("Q4_K" if file_type == "q4_k_m" else "Q5_K")
    assert kinds["output.weight"] == "Q6_K"
    assert kinds["output_norm.weight"] == "F32"
