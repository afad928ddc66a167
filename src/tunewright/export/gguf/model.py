"""A full model as one GGUF file, with its tokenizer: the base, or the base with an adapter merged into it.

llama.cpp has the pre-tokenization rules in its own code, by name. A base's rule is recognized by its tokenizer.json.
The comparison that every GGUF goes through checks that both give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from tunewright.chat import ChatFormat
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.export.gguf.tensors import FILE_TYPES, FileType, Mixture, TensorFile, gguf_name, interleaved
from tunewright.export.templates import exported_template
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
    add_tokens: Callable[[Any, int], None],
    file_type: FileType,
    reporter: Reporter,
) -> list[str]:
    """Write the model, converted from float32 to the file's type in one step; return the user's notes.

    ``add_tokens`` writes the vocabulary, given its size: `add_tokenizer` or `add_token_ids`.
    """
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


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BY_PATTERN = {_LLAMA3: "llama-bpe", _TEKKEN: "tekken"}
_MERGED_INSTEAD = "Export it merged (`tunewright export merge`), or use another base."


def add_tokenizer(chat: ChatFormat, system_prompt: str | None, writer: Any, vocabulary: int) -> None:
    """Write the tokenizer and the chat template of ``chat`` for a model of ``vocabulary`` tokens.

    The template adds ``system_prompt`` to conversations without a system message.
    """
    tokenizer = chat.tokenizer
    stored: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    where = str(tokenizer.name_or_path)
    if stored["model"]["type"] != "BPE":
        raise UserError(
            f"llama.cpp has no tokenizer of this type ({stored['model']['type']})", where=where, fix=_MERGED_INSTEAD
        )
    pieces = {i: piece for piece, i in stored["model"]["vocab"].items()}
    added = {token["id"]: token for token in stored["added_tokens"]}
    tokens, kinds = [], []
    for i in range(vocabulary):
        token = added.get(i)
        tokens.append(token["content"] if token else pieces.get(i, f"[PAD{i}]"))
        kinds.append(
            _token_kind(tokens[-1], token, known=i in pieces, byte_tokens=bool(stored["model"]["byte_fallback"]))
        )
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in stored["model"]["merges"]]
    if stored["model"]["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, merges))
        # The chat template writes the space that sentencepiece adds before a text's first word.
        writer.add_add_space_prefix(False)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(stored, where))
        writer.add_token_list(tokens)
        # The writer omits an empty list, and llama.cpp needs one: add a pair that occurs in no text.
        end = str(tokenizer.eos_token)
        writer.add_token_merges(merges or [f"{end} {end}"])
    writer.add_token_types(kinds)
    _add_special(writer, chat)
    writer.add_chat_template(exported_template(chat, system_prompt))


def add_token_ids(pieces: Sequence[bytes | None], stop_ids: Sequence[int], writer: Any, vocabulary: int) -> None:
    """Write a vocabulary for a model that reads and writes only ids, and whose answers a grammar may constrain.

    A grammar needs tokens' texts. llama.cpp holds a token back while its bytes are not whole characters, and
    then reports only the next one's id; it would also end answers at anything that looks like an end token
    (such as ``<|endoftext|>``). So only tokens of whole characters have their text. Other tokens, and special
    tokens, are named by their ids and are control tokens: no grammar allows them, and they have no text.

    ``pieces`` are each token's bytes, None for special tokens. Of the ``stop_ids``, at least one, the first ends a
    constrained answer. GGUF has names for three; llama.cpp does not recognize others.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert stop_ids
    visible = bytes_to_unicode()  # GPT-2's character for each byte
    names: dict[str, int] = {}
    for token, piece in enumerate(pieces):
        if piece and token not in stop_ids and _is_text(piece):
            # If two tokens have the same text, only one can be named by it.
            names.setdefault("".join(visible[byte] for byte in piece), token)
    texts = {token: name for name, token in names.items()}
    writer.add_tokenizer_model("gpt2")
    # llama.cpp removes spaces before punctuation from the texts of most other kinds, "gpt-2" among them.
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([texts.get(token, f"[{token}]") for token in range(vocabulary)])
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    writer.add_token_types([kinds[token in texts] for token in range(vocabulary)])
    writer.add_token_merges(["[0] [0]"])
    # llama.cpp's grammars end with the token "eot", if there is one.
    add_end = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    first, *others = stop_ids
    for token, add in zip([*others[:1], first, *others[1:]], add_end, strict=False):
        add(token)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _is_text(piece: bytes) -> bool:
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return False
    return len(text) < 3 or (text[0], text[-1]) not in {("<", ">"), ("[", "]"), ("_", ">")}  # like an end token


def pre_tokenizer_name(stored: Mapping[str, Any], where: str) -> str:
    """Return llama.cpp's name for a tokenizer.json's pre-tokenization rule."""
    rule = stored["pre_tokenizer"] or {}
    parts: Sequence[Mapping[str, Any]] = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    kinds = [part.get("type") for part in parts]
    last = parts[-1]
    plain = not stored["normalizer"] and kinds[-1] == "ByteLevel" and not last["add_prefix_space"]
    if plain and kinds == ["ByteLevel"] and (last["use_regex"] or not stored["model"]["merges"]):
        return "gpt-2"  # without merges each byte is a token, regardless of the rule
    if plain and kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and last["use_regex"]:
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        pattern = parts[0]["pattern"].get("Regex")
        if parts[0]["behavior"] == "Isolated" and not parts[0]["invert"] and pattern in _BY_PATTERN:
            return _BY_PATTERN[pattern]
    raise UserError(
        "llama.cpp has no known pre-tokenization rule like this tokenizer's", where=where, fix=_MERGED_INSTEAD
    )


def _token_kind(token: str, added: Mapping[str, Any] | None, *, known: bool, byte_tokens: bool) -> gguf.TokenType:
    if added is not None:
        if token == "<unk>" and byte_tokens:
            return gguf.TokenType.UNKNOWN
        return gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if not known:
        return gguf.TokenType.UNUSED
    if byte_tokens and len(token) == 6 and token.startswith("<0x"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Return sentencepiece's merge priorities: of two pairs, the one whose piece has the higher score merges first."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault(pair.replace(" ", "", 1), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _add_special(writer: Any, chat: ChatFormat) -> None:
    tokenizer = chat.tokenizer
    if chat.bos_id >= 0:
        writer.add_bos_token_id(chat.bos_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    # GGUF has names for two more end tokens; llama.cpp also recognizes Llama 3's by their text.
    others = sorted(chat.stop_ids - {tokenizer.eos_token_id})
    for token, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(token)
    writer.add_add_bos_token(chat.adds_bos)
    writer.add_add_eos_token(False)
