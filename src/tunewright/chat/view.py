"""Token ids as people can read them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tunewright.chat.format import ChatFormat, Tokens


@dataclass(frozen=True)
class TokenView:
    """One token of a row: its text (bytes that are no whole character as ``<0xF0>``), and what becomes of it."""

    id: int
    text: str
    control: bool
    trained: bool


def view(chat: ChatFormat, tokens: Tokens) -> list[TokenView]:
    """Return the tokens of a row, one by one."""
    pieces: list[str] = chat.tokenizer.convert_ids_to_tokens(list(tokens.ids))
    control = set(chat.encoder.control.values())
    as_text = _of_bytes if "ByteLevel" in repr(chat.tokenizer.backend_tokenizer.decoder) else _of_sentencepiece
    return [
        TokenView(token, piece if token in control else as_text(piece), token in control, trained)
        for token, piece, trained in zip(tokens.ids, pieces, tokens.loss_mask, strict=True)
    ]


def _of_sentencepiece(piece: str) -> str:
    return piece.replace("\u2581", " ")


def _of_bytes(piece: str) -> str:
    """Return the text of a byte-level piece, in which each character stands for a byte (Radford et al. 2019, GPT-2)."""
    alphabet = _alphabet()
    if not all(character in alphabet for character in piece):
        return piece
    raw = bytes(alphabet[character] for character in piece)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in raw)


@cache
def _alphabet() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
