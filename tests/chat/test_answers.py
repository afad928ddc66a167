"""Where answers end: the limit against a count, the stop strings by form."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import byte_tokenizer, chat_of
from tunewright.chat.answers import PLAIN_STOPS, answer_limit, stop_strings
from tunewright.config import Config, EvaluateConfig
from tunewright.data.examples import Message
from tunewright.generation.text_stream import TextStream

CHAT = chat_of(byte_tokenizer())
PLAIN = chat_of(byte_tokenizer(), kind="plain")


@dataclass(frozen=True)
class _Pair:
    example: Any


def _pairs(lengths: list[int]) -> Any:
    """Answers of so many bytes; each has its end token besides."""
    return [
        _Pair(SimpleNamespace(messages=(Message("user", "x"), Message("assistant", "a" * (length - 1)))))
        for length in lengths
    ]


@given(st.lists(st.integers(2, 60), min_size=1, max_size=250))
@settings(max_examples=25, deadline=None)
def test_the_limit_is_a_quarter_more_than_what_holds_99_answers_of_100(lengths: list[int]) -> None:
    usual = min(n for n in lengths if sum(length <= n for length in lengths) >= 0.99 * len(lengths))
    expected = usual + max(8, -(-usual // 4))
    assert answer_limit(Config(), CHAT, _pairs(lengths)) == expected


def test_one_stray_long_answer_does_not_decide_the_limit() -> None:
    assert answer_limit(Config(), CHAT, _pairs([10] * 150 + [500])) == 18


def test_the_recipes_limit_counts_where_it_has_one() -> None:
    assert answer_limit(Config(evaluate=EvaluateConfig(max_new_tokens=3)), CHAT, []) == 3


def test_the_plain_form_ends_at_its_headings_and_a_template_at_its_end_token() -> None:
    assert stop_strings(Config(), PLAIN) == PLAIN_STOPS
    assert stop_strings(Config(), CHAT) == ()
    for chat in (PLAIN, CHAT):
        assert stop_strings(Config(evaluate=EvaluateConfig(stop=("END",))), chat) == ("END",)
        assert stop_strings(Config(evaluate=EvaluateConfig(stop=())), chat) == ()


@pytest.mark.parametrize("turn", ["user", "assistant"])
def test_what_the_plain_form_writes_after_an_answer_is_a_stop_string(turn: str) -> None:
    """A base that goes on as its prompt does is cut where the answer ended."""
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
