"""Incremental text: the pieces join to the full text, in whole characters, and stop strings never show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from making.tiny_bases import byte_tokenizer
from tunewright.generation.text_stream import Detokenizer, StopFilter, TextStream

BYTES = byte_tokenizer()


def _decode(ids: Sequence[int]) -> str:
    return str(BYTES.decode(ids, skip_special_tokens=True))


def _sentencepiece_decoder() -> Callable[[Sequence[int]], str]:
    """Llama 2's and Mistral's decoder: ``▁`` for spaces, the first one dropped, bytes for what is not in the list."""
    pieces = ["<unk>", "▁", "▁a", "▁b", "c", "é"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return lambda ids: str(tokenizer.decode(list(ids)))


def _byte_token(byte: int) -> str:
    """The token of a byte, as GPT-2 writes it: a printable character for each."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [each for each in range(256) if each not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


def _pieces(stream: Any, tokens: Sequence[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.flush()]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")))
def test_detokenizer_yields_whole_characters_that_join_to_the_text(text: str) -> None:
    pieces = _pieces(Detokenizer(_decode), BYTES.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_detokenizer_yields_a_character_with_its_last_byte() -> None:
    pieces = _pieces(Detokenizer(_decode), BYTES.encode("a€b", add_special_tokens=False))
    assert pieces == ["a", "", "", "€", "b", ""]


def test_flush_replaces_a_cut_off_character() -> None:
    tokens = BYTES.encode("a€", add_special_tokens=False)
    assert _pieces(Detokenizer(_decode), tokens[:-1]) == ["a", "", "", "\ufffd"]


@given(st.lists(st.sampled_from(range(256))))
def test_detokenizer_reads_invalid_bytes_like_the_full_text(tokens: list[int]) -> None:
    assert "".join(_pieces(Detokenizer(_decode), tokens)) == _decode(tokens)


PIECES = st.sampled_from(
    ["\ufffd".encode(), "€".encode(), "é".encode(), "🙂".encode(), b"\xff", b"\xe2", b"\x82", b"a"]
)
LONG = st.lists(st.tuples(PIECES, st.integers(1, 30)), min_size=1, max_size=6).map(
    lambda runs: b"".join(piece * count for piece, count in runs)
)


@given(LONG)
def test_detokenizer_joins_to_the_text_after_long_runs_of_invalid_bytes(content: bytes) -> None:
    tokens = [BYTES.convert_tokens_to_ids(_byte_token(byte)) for byte in content]
    pieces = _pieces(Detokenizer(_decode), tokens)
    assert "".join(pieces) == _decode(tokens)


@given(st.lists(st.tuples(st.sampled_from("\ufffd€é🙂a"), st.integers(1, 30)), min_size=1, max_size=6))
def test_sentencepiece_bytes_join_to_the_text_after_long_runs_of_replacement_characters(
    runs: list[tuple[str, int]],
) -> None:
    text = "".join(letter * count for letter, count in runs)
    tokens = [6 + byte for byte in text.encode()]
    assert "".join(_pieces(Detokenizer(_sentencepiece_decoder()), tokens)) == text


@pytest.mark.parametrize("piece", [b"\xff", "\ufffd".encode(), b"\xe2\x82", "€".encode()])
def test_detokenizer_decodes_each_token_a_bounded_number_of_times(piece: bytes) -> None:
    decoded = 0

    def counting(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return _decode(ids)

    content = piece * 300
    _pieces(Detokenizer(counting), [BYTES.convert_tokens_to_ids(_byte_token(byte)) for byte in content])
    assert decoded <= 70 * len(content)


@given(st.lists(st.sampled_from([1, 2, 3, 4, 5])), st.text("ß€🙂", max_size=3))
def test_sentencepiece_tokens_keep_their_spaces(tokens: list[int], tail: str) -> None:
    decode = _sentencepiece_decoder()
    tokens = tokens + [6 + byte for byte in tail.encode()]
    assert "".join(_pieces(Detokenizer(decode), tokens)) == decode(tokens)


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Reads the text letter by letter: the plain way to say what stops it."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], True
    return text, False


@given(st.lists(st.text("abc", max_size=4)), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
def test_text_ends_before_the_first_stop_string_however_it_arrives(pieces: list[str], stops: list[str]) -> None:
    passed, stopped = _cut("".join(pieces), stops)
    filtered = StopFilter(stops)
    sent = ""
    for piece in pieces:
        sent += filtered.push(piece)
        assert passed.startswith(sent)
        if filtered.stopped:
            break
    assert (sent + filtered.flush(), filtered.stopped) == (passed, stopped)


def test_stop_filter_holds_back_only_a_possible_stop_string() -> None:
    filtered = StopFilter(["END"])
    assert [filtered.push(piece) for piece in ("x", "E", "N", "E", "ND!")] == ["x", "", "", "EN", ""]
    assert filtered.stopped


@pytest.mark.parametrize("stops", [("€",), ("b€",)])
def test_stop_string_is_found_across_the_bytes_of_a_character(stops: tuple[str, ...]) -> None:
    stream = TextStream(_decode, stops)
    text = ""
    for token in BYTES.encode("ab€c", add_special_tokens=False):
        text += stream.push(token)
        if stream.stopped:
            break
    assert stream.stopped
    assert text + stream.flush() == "ab€c".split(stops[0])[0]
