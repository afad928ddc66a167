"""A full model as one GGUF file: the base, or the base with an adapter merged into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from tunewright.chat import ChatFormat
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.export.gguf.tensors import FILE_TYPES, FileType, Mixture, TensorFile, gguf_name, interleaved
from tunewright.export.gguf.tokenizer import add_token_ids, add_tokenizer
from tunewright.export.weights import Weights
from tunewright.models.bases import Base
from tunewright.models.families import read_shape, text_name
from tunewright.models.loading import text_settings

_KINDS = ("llama", "mistral")
"""llama.cpp treats both as the architecture "llama"; for others neither tensors nor positions have been compared."""


def write_model(
    path: Path,
    name: str,
    weights: Weights,
    base: Base,
    chat: ChatFormat,
    file_type: FileType,
    reporter: Reporter,
    *,
    system_prompt: str | None = None,
) -> list[str]:
    """Write the model with its tokenizer, converting from float32 to the file's type in one step.

    Its chat template adds ``system_prompt`` to conversations without a system message. Returns notes for the user.
    """

    def add_tokens(writer: Any, vocabulary: int) -> None:
        add_tokenizer(writer, chat, vocabulary, system_prompt)

    return _write(path, name, weights, base, add_tokens, file_type, reporter)


def write_token_id_model(
    path: Path,
    name: str,
    weights: Weights,
    base: Base,
    pieces: Sequence[bytes | None],
    stop_ids: Sequence[int],
    file_type: FileType,
    reporter: Reporter,
) -> list[str]:
    """Write the model for callers that pass and receive token ids (see :func:`add_token_ids`); return notes."""

    def add_tokens(writer: Any, vocabulary: int) -> None:
        add_token_ids(writer, pieces, stop_ids, vocabulary)

    return _write(path, name, weights, base, add_tokens, file_type, reporter)


def _write(
    path: Path,
    name: str,
    weights: Weights,
    base: Base,
    add_tokens: Callable[[Any, int], None],
    file_type: FileType,
    reporter: Reporter,
) -> list[str]:
    require_gguf(base)
    config: Any = text_settings(base)
    tied = read_shape(base.folder / "config.json").tied
    mixture = None
    if file_type in ("q4_k_m", "q5_k_m"):
        shared = config.num_attention_heads != config.num_key_value_heads
        mixture = Mixture(file_type, config.num_hidden_layers, tied, shared)
    file = TensorFile(path, file_type, mixture)
    notes = _add_shape(file.writer, config)
    file.writer.add_type(gguf.GGUFType.MODEL)
    file.writer.add_name(name)
    file.writer.add_file_type(FILE_TYPES[file_type])
    file.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokens(file.writer, config.vocab_size)
    frequencies = _rope_factors(config)
    if frequencies is not None:
        file.add("rope_freqs.weight", tuple(frequencies.shape), lambda: frequencies)
    for tensor in weights:
        text = text_name(tensor)
        if text is None or text.endswith("rotary_emb.inv_freq") or (text == "lm_head.weight" and tied):
            continue  # a vision weight; computed from the configuration; tied to the input embedding
        shape = tuple(weights.base[tensor].shape)
        file.add(gguf_name(text, config.num_hidden_layers), shape, _rotated(weights, tensor, config))
    with reporter.task(f"writing {path.name}", len(weights.base), "tensors") as task:
        file.write(task.advance)
    if file.whole:
        notes.append(f"{len(file.whole)} matrices are in f16: {file_type} needs rows of a multiple of 32 weights")
    if file.other:
        notes.append(
            f"{len(file.other)} matrices are in q5_0, q5_1 or q8_0, which are larger: {file_type} needs rows of a "
            "multiple of 256 weights"
        )
    return notes


def require_gguf(base: Base) -> None:
    """Check that the base's text model can be written as GGUF."""
    kind = text_settings(base).model_type
    if kind not in _KINDS:
        raise UserError(
            f"A {kind} model is not exported to GGUF: only {' and '.join(_KINDS)} models are, and Mistral 3 with such "
            "a text model",
            where=base.spec,
            fix="Use `tunewright export merge`, whose folder transformers and vLLM load.",
        )


def gguf_context(config: Any) -> int:
    """Return the maximum context of a base in llama.cpp, which has no sliding window for this architecture."""
    window = getattr(config, "sliding_window", None)
    context = int(config.max_position_embeddings)
    return context if window is None else min(int(window), context)


def permuted_heads(name: str, config: Any) -> int | None:
    """Return the number of heads of a tensor whose rows llama.cpp orders differently; None for other tensors."""
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else None


def _rotated(weights: Weights, name: str, config: Any) -> Callable[[], Tensor]:
    heads = permuted_heads(name, config)
    if heads is None:
        return lambda: weights[name]
    return lambda: interleaved(weights[name], heads)


def _add_shape(writer: Any, config: Any) -> list[str]:
    notes = []
    context = gguf_context(config)
    if context < config.max_position_embeddings:
        notes.append(
            f"its context is {context:,} tokens, not {config.max_position_embeddings:,}: llama.cpp does not support "
            "the sliding window of this architecture"
        )
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(config.rope_parameters["factor"]))
    return notes


def _rope_factors(config: Any) -> Tensor | None:
    """Return the divisors of Llama 3.1's rotary frequencies [head / 2]; None for unscaled positions."""
    kind = config.rope_parameters["rope_type"]
    if kind in ("default", "linear"):
        return None
    if kind != "llama3":
        raise UserError(f"rope_type {kind} cannot be exported to GGUF", where="config.json, rope_parameters")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(stretched)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    factors: Tensor = plain / stretched
    return factors


def write_lora(
    path: Path, name: str, weights: Weights, base: Base, file_type: FileType, reporter: Reporter
) -> list[str]:
    """Write the adapter's deltas of ``weights`` without the base.

    llama.cpp scales by alpha / rank, with one alpha for all layers. Any other scale of a layer (rsLoRA's, or a
    pattern's) is multiplied into its B. Returns notes for the user.
    """
    require_gguf(base)
    config = text_settings(base)
    if any(change.magnitude is not None for change in weights.changes.values()):
        raise UserError("llama.cpp does not support DoRA", where=name, fix="Export it merged: --merged.")
    first = next(iter(weights.changes.values()))
    alpha = first.scale * first.a.shape[0]
    file = TensorFile(path, file_type)
    file.writer.add_type(gguf.GGUFType.ADAPTER)
    file.writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    file.writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    file.writer.add_name(name)
    file.writer.add_file_type(FILE_TYPES[file_type])
    file.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor, change in weights.changes.items():
        into = gguf_name(str(text_name(tensor)), config.num_hidden_layers)
        own = change.scale * change.a.shape[0] / alpha
        file.add(f"{into}.lora_a", tuple(change.a.shape), _given(change.a))
        heads = permuted_heads(tensor, config)
        b = own * change.b
        file.add(f"{into}.lora_b", tuple(b.shape), _given(b if heads is None else interleaved(b, heads)))
    with reporter.task(f"writing {path.name}", 2 * len(weights.changes), "tensors") as task:
        file.write(task.advance)
    if not file.whole:
        return []
    return [f"{len(file.whole)} matrices are in f16: q8_0 needs rows of a multiple of 32 weights"]


def _given(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor
