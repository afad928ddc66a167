"""Tokens per word and bits per byte, counted another way."""

from __future__ import annotations

import math

import pytest

from tunewright.advisor.specificity import fertility, surprise


def test_tokens_per_word_are_of_all_texts_together() -> None:
    domain = [("D. Minn.", 5), ("Oh. Muni. Ct., Ravenna", 11), ("", 1)]
    generic = [("the court of the state", 5), ("a list", 2)]
    message = fertility(domain, ["a", "a", "b"], generic, seed=0)
    assert message.domain == pytest.approx(17 / 7)  # a blank text counts as one word
    assert message.generic == pytest.approx(1.0)
    assert message.ratio == pytest.approx(17 / 7)
    assert message.interval is not None and message.interval.low <= 17 / 7 <= message.interval.high
    assert message.samples == 2


def test_fertility_ratio_is_none_without_generic_text() -> None:
    message = fertility([("D. Minn.", 5)], ["a"], [], seed=0)
    assert (message.domain, message.generic, message.ratio, message.interval) == (2.5, None, None, None)


def test_bits_per_byte_are_of_all_answers_together() -> None:
    references = ["Äb", "long answer"]  # 3 and 11 bytes
    message = surprise("zero-shot", 0, [3 * math.log(2), 39 * math.log(2)], references, ["a", "b"], seed=0)
    assert message.bits_per_byte == pytest.approx(42 / 14)
    assert message.interval.low == pytest.approx(1.0)  # both draws the first
    assert message.interval.high == pytest.approx(39 / 11)
    assert message.items == 2
