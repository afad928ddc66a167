"""Word differences: exact where that is quick, and one change where it is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tunewright.core.text import changes

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
