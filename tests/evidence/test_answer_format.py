"""The form that references have in common, and the answers that have it."""

from __future__ import annotations

import json

import pytest

from tunewright.evidence.common import answer_form


def counted(outputs: list[str], answers: list[str]) -> tuple[str, int]:
    """The form of the outputs, and how many of the answers have it."""
    form = answer_form(outputs, outputs, {"tuned": answers}, 0)
    assert form is not None
    assert form.references >= 0.95 * len(outputs)
    return form.what, form.answers["tuned"]


def test_json_counts_answers_with_the_fields_that_all_references_have() -> None:
    outputs = [json.dumps({"name": f"n{n}", "date": n, **({"extra": 1} if n % 2 else {})}) for n in range(40)]
    answers = ['{"name": "a", "date": 2}', '{"name": "a"}', '{"name": "a", "date": 2', "name: a, date: 2", "[1]"]
    assert counted(outputs, answers) == ("JSON with the fields name, date", 1)


def test_labels_count_answers_that_are_one_of_them() -> None:
    outputs = [f"class {n % 4}" for n in range(80)]
    assert counted(outputs, ["class 1", " class 3\n", "class 7", "it is class 1"]) == ("one of the 4 labels", 2)


def test_pattern_matches_answers_of_the_same_character_classes() -> None:
    outputs = [f"{n}-{n * 7 % 13:02d}/AB{'c' * (n % 3)}" for n in range(40)]
    what, right = counted(outputs, ["12-07/XY", "12.07/XY", "the answer is 12-07/XY"])
    assert "letters, digits and marks as in" in what
    assert right == 1


def test_free_text_counts_answers_of_similar_length() -> None:
    outputs = [
        " ".join(f"word{chr(97 + (n * k) % 26)}" for k in range(1, 4 + n % 5)) + "!" * (n % 17) for n in range(60)
    ]
    what, right = counted(outputs, ["one two three four", "", "x" * 400, "one two\nthree four\nfive"])
    assert what.startswith("1 line of ")
    assert right == 1


@pytest.mark.parametrize("count", [0, 1, 19])
def test_form_is_none_for_few_outputs(count: int) -> None:
    assert answer_form(["a"] * count, ["a"] * count, {}, 0) is None
