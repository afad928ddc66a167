"""Ends of answers (limit, stop strings), and tokens as people read them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making import makers
from making.property_examples import examples
from making.tiny_bases import byte_tokenizer, chat_of
from tunewright.chat import chat_format
from tunewright.chat.answers import PLAIN_STOPS, answer_limit, answer_text, stop_strings
from tunewright.chat.inspection import view
from tunewright.config import Config, EvaluateConfig
from tunewright.data.examples import Message
from tunewright.generation.requests import Completion
from tunewright.generation.text_stream import TextStream

CHAT = chat_of(byte_tokenizer())
PLAIN = chat_of(byte_tokenizer(), kind="plain")


@dataclass(frozen=True)
class _Pair:
    example: Any


def _pairs(lengths: list[int]) -> Any:
    """Return answers of given numbers of bytes, without the end token."""
    return [
        _Pair(SimpleNamespace(messages=(Message("user", "x"), Message("assistant", "a" * (length - 1)))))
        for length in lengths
    ]


@given(st.lists(st.integers(2, 60), min_size=1, max_size=250))
@examples(25)
def test_answer_limit_is_the_99th_percentile_and_a_quarter(lengths: list[int]) -> None:
    usual = min(n for n in lengths if sum(length <= n for length in lengths) >= 0.99 * len(lengths))
    expected = usual + max(8, -(-usual // 4))
    assert answer_limit(Config(), CHAT, _pairs(lengths)) == expected


def test_answer_limit_is_the_configs_when_set() -> None:
    assert answer_limit(Config(evaluate=EvaluateConfig(max_new_tokens=3)), CHAT, []) == 3


def test_stop_strings_are_the_headings_for_the_plain_form_only() -> None:
    assert stop_strings(Config(), PLAIN) == PLAIN_STOPS
    assert stop_strings(Config(), CHAT) == ()
    for chat in (PLAIN, CHAT):
        assert stop_strings(Config(evaluate=EvaluateConfig(stop=("END",))), chat) == ("END",)
        assert stop_strings(Config(evaluate=EvaluateConfig(stop=())), chat) == ()


@pytest.mark.parametrize("turn", ["user", "assistant"])
def test_stop_strings_match_the_next_turn_of_the_plain_form(turn: str) -> None:
    """A base that continues like its prompt is cut at the end of the answer."""
    prompt = PLAIN.template.render([Message("user", "Q")], generation_prompt=True)
    following = Message("user", "Q2") if turn == "user" else Message("assistant", "A2")
    whole = PLAIN.template.render([Message("user", "Q"), Message("assistant", "A"), following], generation_prompt=False)
    without_end = whole[len(prompt) :].replace(PLAIN.tokenizer.eos_token, "")
    stream, text = TextStream(lambda ids: bytes(ids).decode(), PLAIN_STOPS), ""
    for byte in without_end.encode():
        text += stream.push(byte)
        if stream.stopped:
            break
    assert stream.stopped
    assert text == "A"


FUNCTIONS = Message("tools", '[{"function":{"name":"f"},"type":"function"}]')


@pytest.mark.parametrize(
    ("declared", "expected"),
    [(True, 'Look:\n{"name": "f", "arguments": {"a":1,"b":2}}'), (False, None)],
)
@pytest.mark.parametrize("stopped", [True, False])
def test_answer_text_has_canonical_calls_where_functions_are_declared(
    declared: bool, expected: str | None, stopped: bool
) -> None:
    text = 'Look:\n<tool_call>\n{"arguments": {"b": 2, "a":1}, "name": "f"}\n</tool_call>'
    chat = chat_format(byte_tokenizer(), stop_ids=CHAT.stop_ids, kind="own", today=CHAT.template.today, tools="hermes")
    ids = tuple(chat.tokenizer(text + " END" * stopped)["input_ids"])
    completion = Completion(ids, "stop", text if stopped else None)
    conversation = [*([FUNCTIONS] if declared else []), Message("user", "x")]
    assert answer_text(chat, completion, conversation) == (expected or text)


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
