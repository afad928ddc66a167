"""Stop strings in the decoding loop, found across token boundaries, against a search in the full answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from making.property_examples import examples
from making.wandering_models import PAD, STOPS, VOCABULARY, llama, reference
from tunewright.generation.generate import generate
from tunewright.generation.requests import Completion, Request

PIECES = ["a", "b", "ab", "\n", "\n\n", "# ", "##", "ba\n", "é", "", "#"]
PROMPTS = [tuple(range(start, start + 6)) for start in range(8, 108, 10)]


def _decode(ids: Sequence[int]) -> str:
    """Every token is a piece of text, some of several characters, some of none."""
    return "".join(PIECES[token % len(PIECES)] for token in ids)


@cache
def _model() -> Any:
    return llama()


@cache
def _answers() -> list[Completion]:
    return [reference(_model(), Request(prompt, None, 24)) for prompt in PROMPTS]


# Stop strings from anywhere in some answer, and some that are in no answer.
INSIDE = st.builds(
    lambda row, start, length: _decode(_answers()[row].ids)[start : start + length],
    st.integers(0, len(PROMPTS) - 1),
    st.integers(0, 20),
    st.integers(1, 6),
).filter(bool)
STOP_STRINGS = st.lists(INSIDE | st.text("ab\n#é", min_size=1, max_size=4), min_size=1, max_size=3)


def _cut(text: str, stops: Sequence[str]) -> str | None:
    """Before the stop string that is complete first; of those complete at once, before the longest."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - len(max(hits, key=len))]
    return None


@given(STOP_STRINGS, st.integers(1, 10))
@examples(40)
def test_answer_ends_before_its_first_stop_string(stops: list[str], batch: int) -> None:
    requests = [Request(prompt, None, 24, stop=tuple(stops)) for prompt in PROMPTS]
    message = generate(_model(), requests, stop_ids=STOPS, pad_id=PAD, batch_size=batch, decode=_decode)
    for completion, whole in zip(message, _answers(), strict=True):
        cut = _cut(_decode(whole.ids), stops)
        if cut is None:
            assert completion == whole
            continue
        assert (completion.finish, completion.before_stop) == ("stop", cut)
        # Nothing was decoded past the token that completed the stop string.
        assert completion.ids == whole.ids[: len(completion.ids)]
        assert _cut(_decode(completion.ids[:-1]), stops) is None


def test_requests_with_and_without_stop_strings_share_a_batch() -> None:
    model: Any = _model()
    stop = _decode(_answers()[1].ids)[2:4]
    requests = [Request(p, None, 24, stop=(stop,) if n == 1 else ()) for n, p in enumerate(PROMPTS)]
    message = generate(model, requests, stop_ids=STOPS, pad_id=PAD, batch_size=4, decode=_decode)
    assert [t for n, t in enumerate(message) if n != 1] == [a for n, a in enumerate(_answers()) if n != 1]
    assert message[1].before_stop == _cut(_decode(_answers()[1].ids), (stop,))
    assert max(max(a.ids) for a in _answers()) < VOCABULARY
