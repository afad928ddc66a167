"""Formats kept with their tokenizers: reused while nothing has changed, and never longer than the tokenizer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers

from tiny import CHATML, byte_tokenizer
from tunewright.chat import ChatFormat, chat_format, encode
from tunewright.chat.loading import cached_format
from tunewright.config import ChatConfig
from tunewright.data.examples import Message

TURNS = [Message("user", "A <|new|> Ohio 12"), Message("assistant", "Oh. <|new|>")]


def _kept(tokenizer: Any) -> ChatFormat:
    ends = frozenset([tokenizer.eos_token_id])
    return cached_format(tokenizer, stop_ids=ends, kind="own", today=ChatConfig().date)


def _fresh(tokenizer: Any) -> ChatFormat:
    ends = frozenset([tokenizer.eos_token_id])
    return chat_format(tokenizer, stop_ids=ends, kind="own", today=ChatConfig().date)


def test_cached_format_is_reused_while_the_tokenizer_is_unchanged() -> None:
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    first, second = _kept(tokenizer), _kept(tokenizer)
    assert second.encoder is first.encoder
    assert second.tokenizer is tokenizer
    assert _kept(other).encoder is not first.encoder
    assert encode(tokenizer, TURNS) == encode(tokenizer, TURNS) == _fresh(tokenizer).encode(TURNS)
    assert _kept(tokenizer).encoder is first.encoder


def _set_template(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | upper")


def _add_special_token(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})


def _add_token_that_the_template_writes(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("Ohio", normalized=False)])
    tokenizer.chat_template = CHATML.replace("message['content']", "'Ohio' + message['content']")


def _lower_case(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _split_digits(tokenizer: Any) -> None:
    before = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("12", "removed"), before])


@pytest.mark.parametrize(
    "change", [_set_template, _add_special_token, _add_token_that_the_template_writes, _lower_case, _split_digits]
)
def test_cached_format_is_recreated_when_the_tokenizer_changes(change: Callable[[Any], None]) -> None:
    tokenizer = byte_tokenizer()
    before, encoder = encode(tokenizer, TURNS), _kept(tokenizer).encoder
    change(tokenizer)
    assert _kept(tokenizer).encoder is not encoder
    expected = _fresh(tokenizer).encode(TURNS)
    assert encode(tokenizer, TURNS) == expected
    if change is not _add_special_token:  # a message that says so is spelled out, before and after
        assert expected != before


def test_cached_format_does_not_keep_the_tokenizer_alive() -> None:
    tokenizer = byte_tokenizer()
    encode(tokenizer, TURNS)
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None
