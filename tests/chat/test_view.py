"""Tokens as people read them: their texts together are the conversation, whatever kind of tokenizer made them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

import makers
from tiny import byte_tokenizer, chat_of
from tunewright.chat.inspection import view
from tunewright.data.examples import Message

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer,
    "llama3": makers.llama3_tokenizer,
    "sentencepiece": lambda: makers.mistral_tokenizer("v3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_view_texts_join_to_the_conversation(kind: str) -> None:
    chat = chat_of(TOKENIZERS[kind]())
    messages = [Message("user", "Where is Zoë's café, 東京?\n\n [INST]"), Message("assistant", "Here.  There.")]
    tokens = chat.encode(messages)
    views = view(chat, tokens)
    assert [v.id for v in views] == list(tokens.ids)
    shown = "".join(v.text for v in views).encode()
    text = re.sub(rb"<0x(..)>", lambda byte: bytes.fromhex(byte[1].decode()), shown).decode()
    assert chat.template.render(messages, generation_prompt=False).removesuffix("\n") == text
    assert "Here.  There." in "".join(v.text for v in views if v.trained)
    assert [v.text for v in views if v.control][-1] == chat.tokenizer.eos_token


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_view_shows_incomplete_characters_as_bytes(kind: str) -> None:
    chat = chat_of(TOKENIZERS[kind]())
    views = view(chat, chat.encode([Message("user", "\U0001f9ff"), Message("assistant", "x")]))
    assert [v.text for v in views if v.text.startswith("<0x")] == ["<0xF0>", "<0x9F>", "<0xA7>", "<0xBF>"]
