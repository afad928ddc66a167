"""Text: word differences, and Unicode normalisation with Python's result at a cost in proportion to the text."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunewright
from tunewright.core import text as unicode
from tunewright.core.text import MAX_MARKS, Form, changes, mark_fault, normalize
from tunewright.data.dedup.decontaminate import normalised_words
from tunewright.data.examples import Example, Message
from tunewright.data.examples import normalised as folded
from tunewright.metrics import normalised

WORDS = st.lists(st.sampled_from(["a", "b", " ", "c", "\n"]), max_size=12)


@given(WORDS, WORDS)
def test_changes_turn_one_text_into_the_other(old: list[str], new: list[str]) -> None:
    built: list[str] = []
    at = 0
    for kind, i, j, m, n in changes(old, new):
        assert (i, m) == (at, len(built))
        assert (old[i:j] == new[m:n]) or kind != "equal"
        built += old[i:j] if kind == "equal" else new[m:n]
        at = j
    assert (built, at) == (new, len(old))


def test_changes_are_one_change_when_words_repeat_too_often() -> None:
    old, new = ["a", "b"] * 400, ["b", *["a"] * 800, "b"]
    assert changes(old, new) == [("replace", 0, 798, 0, 800), ("equal", 798, 800, 800, 802)]


ABOVE, BELOW, IOTA = "\u0300", "\u0316", "\u0345"
COMPOUND = "\u0f73\u0f75\u0f81\u0344\uff9e\uff9f"
"""Marks that decompose to others; most have no combining class of their own."""

LETTERS = "a\u00fc\u1f82\u1100\u1161\u11a8\ufdfaZ "
PIECE = st.one_of(
    st.text(),
    st.text(LETTERS),
    st.text(ABOVE + BELOW + IOTA + COMPOUND, min_size=MAX_MARKS - 2, max_size=3 * MAX_MARKS),
)


@given(st.lists(PIECE, max_size=6).map("".join), st.sampled_from(["NFC", "NFKC"]))
def test_normalize_equals_pythons(text: str, form: Form) -> None:
    assert normalize(text, form) == unicodedata.normalize(form, text)


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_marks_are_all_of_unicode(form: Form) -> None:
    every = (chr(code) for code in range(sys.maxunicode + 1))
    decomposition = "NFD" if form == "NFC" else "NFKD"
    marks = {each for each in every if unicodedata.combining(unicodedata.normalize(decomposition, each)[0])}  # type: ignore[arg-type]
    assert unicode._marks(form) == marks


def _swaps(decomposed: str) -> int:
    """Count the swaps with which Python's insertion sort orders the marks of a decomposed text."""
    swaps = 0
    classes: list[int] = []
    for own in map(unicodedata.combining, decomposed):
        classes = [*classes, own] if own else []
        swaps += sum(other > own for other in classes)
    return swaps


def _cost(monkeypatch: pytest.MonkeyPatch, use: Callable[[str], object], text: str) -> int:
    """Count the characters that reach Python's normalisation while ``use`` runs, and the swaps that it makes."""
    cost, normalise = 0, unicodedata.normalize

    def counting(form: str, given: str) -> str:
        nonlocal cost
        cost += len(given) + _swaps("".join(normalise("NFD", letter) for letter in given))
        return normalise(form, given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(unicodedata, "normalize", counting)
        use(text)
    return cost


def _keys(text: str) -> object:
    example = Example((Message("user", text), Message("assistant", text)))
    return example.pair_key, example.input_key, example.prompt_key, example.question_key, example.content_key


USES: list[Callable[[str], object]] = [normalize, mark_fault, normalised, folded, normalised_words, _keys]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("marks", [(ABOVE, BELOW), ("\u0344", BELOW), (ABOVE, "\u0f73"), (IOTA, ABOVE + BELOW)])
def test_cost_of_twice_the_marks_is_at_most_twice(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[str], object], marks: tuple[str, str]
) -> None:
    unicode._marks("NFC"), unicode._marks("NFKC")
    once, twice = (_cost(monkeypatch, use, "a" + marks[0] * n + marks[1] * n) for n in (200, 400))
    assert twice <= 2.2 * once
    assert (once > 0) is (use is not mark_fault)


@pytest.mark.parametrize("letters", ["a", "é", "漢字", "\u0e01", "😀"])
def test_mark_fault_names_the_first_run_over_the_limit(letters: str) -> None:
    allowed = letters + (ABOVE + BELOW) * (MAX_MARKS // 2) + letters
    assert mark_fault(allowed * 3) is None
    place = len(allowed + letters) + 1
    fault = f"more than 30 combining marks in a row, from character {place}"
    for count in (31, 32, 61, 62, 93, 1000):
        assert mark_fault(allowed + letters + BELOW * count + letters + ABOVE * 40) == fault


def test_no_other_module_normalises() -> None:
    source = Path(tunewright.__file__).parent
    callers = [path for path in source.rglob("*.py") if "unicodedata.normalize" in path.read_text(encoding="utf-8")]
    assert callers == [source / "core" / "text.py"]
