"""A tokenizer in GGUF: vocabulary, token types, merges or scores, and the chat template.

llama.cpp has the pre-tokenization rules in its own code, by name. A base's rule is recognized by its tokenizer.json.
The comparison that every GGUF goes through checks that both give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gguf

from tunewright.chat import ChatFormat
from tunewright.core.errors import UserError
from tunewright.export.templates import exported_template

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
_FIX = "Export it merged (`tunewright export merge`), or use another base."


def add_tokenizer(writer: Any, chat: ChatFormat, vocabulary: int, system_prompt: str | None) -> None:
    """Write the tokenizer and the chat template of ``chat`` for a model of ``vocabulary`` tokens.

    The template adds ``system_prompt`` to conversations without a system message.
    """
    tokenizer = chat.tokenizer
    stored: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    where = str(tokenizer.name_or_path)
    if stored["model"]["type"] != "BPE":
        raise UserError(f"llama.cpp has no tokenizer of this type ({stored['model']['type']})", where=where, fix=_FIX)
    pieces = {i: piece for piece, i in stored["model"]["vocab"].items()}
    added = {token["id"]: token for token in stored["added_tokens"]}
    tokens, kinds = [], []
    for i in range(vocabulary):
        token = added.get(i)
        tokens.append(token["content"] if token else pieces.get(i, f"[PAD{i}]"))
        kinds.append(_kind(tokens[-1], token, known=i in pieces, byte_tokens=bool(stored["model"]["byte_fallback"])))
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


def add_token_ids(writer: Any, pieces: Sequence[bytes | None], stop_ids: Sequence[int], vocabulary: int) -> None:
    """Write a vocabulary for a model that reads and writes ids alone, and whose answers a grammar may constrain.

    A grammar needs tokens' texts. llama.cpp holds a token back while its bytes are not whole characters, and then
    reports only the next one's id; it would also end answers at anything that looks like an end token (such as
    ``<|endoftext|>``). So only tokens of whole characters have their text. The others, and special tokens, are named
    by their ids and are control tokens: no grammar allows them, and they have no text.

    ``pieces`` are each token's bytes, None for special tokens. Of the ``stop_ids``, at least one, the first ends a
    constrained answer. GGUF has names for three; llama.cpp does not recognize others.
    """
    assert stop_ids
    names: dict[str, int] = {}
    for token, piece in enumerate(pieces):
        if piece and token not in stop_ids and _is_text(piece):
            # Of two tokens with the same text, one can be named by it.
            names.setdefault("".join(_BYTE_NAMES[byte] for byte in piece), token)
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


def _byte_names() -> dict[int, str]:
    """Return GPT-2's visible character for each byte (``bytes_to_unicode`` in openai/gpt-2, src/encoder.py)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


_BYTE_NAMES = _byte_names()


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
        return "gpt-2"  # without merges each byte is a token, whatever the rule
    if plain and kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and last["use_regex"]:
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        pattern = parts[0]["pattern"].get("Regex")
        if parts[0]["behavior"] == "Isolated" and not parts[0]["invert"] and pattern in _BY_PATTERN:
            return _BY_PATTERN[pattern]
    raise UserError("llama.cpp has no known pre-tokenization rule like this tokenizer's", where=where, fix=_FIX)


def _kind(token: str, added: Mapping[str, Any] | None, *, known: bool, byte_tokens: bool) -> gguf.TokenType:
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
