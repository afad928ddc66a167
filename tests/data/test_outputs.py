"""Output templates: what is masked and what is not, whatever stands around it; labels among outputs."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.data.examples import find_labels, normalised, output_template, template_groups

WORDS = st.text(alphabet="abcdefgh ,.;()=", min_size=1, max_size=20)
NUMBERS = st.one_of(
    st.integers(-9999, 10**9).map(str),
    st.decimals(0, 9999, places=2).map(str),
    st.dates().map(str),
    st.times().map(lambda time: time.strftime("%H:%M")),
)
INSIDE = st.text(max_size=12)


def _sql(text: str) -> str:
    return "'" + text.replace("\\", "").replace("'", "''") + "'"


LITERALS = {"string": st.one_of(INSIDE.map(json.dumps), INSIDE.map(_sql)), "number": NUMBERS}


@pytest.mark.parametrize(
    ("output", "template"),
    [
        ('SELECT a FROM t WHERE b = "x" AND c > 3.5', "select a from t where b = <string> and c > <number>"),
        ("name = 'O''Brien'", "name = <string>"),
        ('{"city": "Rome", "n": [1, 22], "ok": true}', '{"city": <string>, "n": [<number>, <number>], "ok": true}'),
        ("{'day':'2020-01-02'}", "{'day':<string>}"),
        ("'2020-01-02'::date", "<string>::date"),
        ("FLIGHTalias0.T1 = 7", "flightalias0.t1 = <number>"),
        ("on 2020-01-02 at 12:30, 1,500.00 EUR, -5", "on <number> at <number>, <number> eur, <number>"),
        ("It's the client's, isn't it", "it's the client's, isn't it"),
        ("32 weeks,  the 3rd", "<number> weeks, the <number>rd"),
        ('a "b', 'a "b'),
        ("", ""),
    ],
)
def test_output_template_masks_literals_and_nothing_else(output: str, template: str) -> None:
    assert output_template(output) == template


@given(data=st.data(), kinds=st.lists(st.sampled_from(sorted(LITERALS)), min_size=1, max_size=4))
def test_output_template_is_equal_when_only_literals_differ(data: st.DataObject, kinds: list[str]) -> None:
    between = [data.draw(WORDS) for _ in range(len(kinds) + 1)]

    def output() -> str:
        parts = [f" {data.draw(LITERALS[kind])} {words}" for kind, words in zip(kinds, between[1:], strict=True)]
        return between[0] + "".join(parts)

    one = output_template(output())
    assert one == output_template(output())
    assert one.count("<string>") == kinds.count("string")
    assert one.count("<number>") == kinds.count("number")


@given(before=WORDS, word=st.sampled_from(["alpha", "beta"]), literal=LITERALS["string"], after=WORDS)
def test_output_template_differs_when_a_word_differs(before: str, word: str, literal: str, after: str) -> None:
    other = {"alpha": "beta", "beta": "alpha"}[word]
    assert output_template(f"{before} {word} {literal} {after}") != output_template(
        f"{before} {other} {literal} {after}"
    )


@given(st.text(alphabet=st.characters(exclude_categories=["Nd"], exclude_characters="\"'"), max_size=60))
def test_output_template_of_text_without_quotes_and_digits_is_the_text(text: str) -> None:
    if not any(char.isdigit() for char in normalised(text)):  # a compatibility form may become a digit
        assert output_template(text) == normalised(text)


@given(st.text(max_size=60))
def test_output_template_ignores_case_and_white_space(text: str) -> None:
    assert output_template(f"  {text}\n") == output_template(text)
    ascii_text = text.encode("ascii", "ignore").decode()
    assert output_template(ascii_text.upper()) == output_template(ascii_text.lower())


def test_template_groups_leaves_out_templates_of_one_row() -> None:
    outputs = {"a": "x = 1", "b": "x = 2", "c": "y = 1"}
    assert template_groups(outputs) == dict.fromkeys("ab", "output_template=x = <number>")


def test_labels_among_are_all_outputs_when_class_like() -> None:
    assert find_labels(["yes", "no "] * 5) == {"yes", "no"}


def test_labels_among_is_empty_when_not_class_like() -> None:
    assert find_labels([f"text {i}" for i in range(300)] + ["I cannot help with that."] * 5) == frozenset()
