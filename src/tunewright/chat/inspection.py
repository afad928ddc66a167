"""Token ids as readable text, and differences between chat formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from tunewright.chat.format import ChatFormat
from tunewright.chat.rendering import Tokens


@dataclass(frozen=True)
class TokenView:
    """A token of a row, with its text (bytes of incomplete characters as ``<0xF0>``), and whether it is trained."""

    id: int
    text: str
    control: bool
    trained: bool


def view(chat: ChatFormat, tokens: Tokens) -> list[TokenView]:
    """Return the tokens of a row as readable text."""
    pieces: list[str] = chat.tokenizer.convert_ids_to_tokens(list(tokens.ids))
    control = set(chat.encoder.control.values())
    byte_level = "ByteLevel" in repr(chat.tokenizer.backend_tokenizer.decoder)

    def as_text(piece: str) -> str:
        return _of_bytes(piece) if byte_level else piece.replace("\u2581", " ")

    return [
        TokenView(token, piece if token in control else as_text(piece), token in control, trained)
        for token, piece, trained in zip(tokens.ids, pieces, tokens.loss_mask, strict=True)
    ]


def _of_bytes(piece: str) -> str:
    """Return the text of a byte-level token, whose characters encode bytes (Radford et al. 2019, GPT-2)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    if not all(character in alphabet for character in piece):
        return piece
    raw = bytes(alphabet[character] for character in piece)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in raw)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two formats' descriptions, each as text; empty if they render the same ids."""
    found = []
    if before["kind"] != now["kind"]:
        names = {"own": "the base's own template", "plain": "the plain form"}
        found.append(f"the format was {names[before['kind']]} and is {names[now['kind']]}")
    elif (old_tools := before.get("tools", "own")) != (new_tools := now.get("tools", "own")):
        found.append(f"chat.tools was {old_tools} and is {new_tools}")
    elif before["template"] != now["template"]:
        old, new = (str(side["template"]).splitlines() for side in (before, now))
        changed = (i for i, pair in enumerate(zip_longest(old, new), start=1) if pair[0] != pair[1])
        line = next(changed, len(old))  # no changed line: white space at the end
        found.append(f"the chat template differs from its line {line} on")
    if before["date"] != now["date"]:
        found.append(f"the date in the chat template was {before['date']} and is {now['date']}")
    for name in ("special_tokens", "end_tokens"):
        if before[name] != now[name]:
            found.append(f"the {name.replace('_', ' ')} were {before[name]} and are {now[name]}")
    if before["probe"] != now["probe"] and not found:
        found.append("the tokenizer makes other tokens of the same text (another version of it, or of tokenizers?)")
    return found
