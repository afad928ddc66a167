"""Each check of an answer's form on texts made by hand; and Google's file of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from making.real_data import SHARED
from tunewright.core.errors import UserError
from tunewright.evaluation.benchmarks.checks import Check
from tunewright.evaluation.benchmarks.instructions import Instruction, examples_control, read_instructions

CHECK: TypeAdapter[Check] = TypeAdapter(Check)
IFEVAL = SHARED / "ifeval" / "input_data.jsonl"

TEXTS: Sequence[tuple[dict[str, Any], Sequence[str], Sequence[str]]] = [
    ({"check": "words", "at_least": 3}, ["one two three", "Is it so?"], ["one two", ""]),
    ({"check": "words", "at_most": 2}, ["one two", "non-stop"], ["one two three"]),
    ({"check": "words", "at_least": 2, "at_most": 2}, ["one two"], ["one", "one two three"]),
    ({"check": "sentences", "at_least": 2}, ["So. It is.", "Wer? Ich!", "これは本です。それも。"], ["v1.2.", "no"]),
    ({"check": "sentences", "at_most": 1}, ["So it is", "3.5 percent."], ["So. It is."]),
    ({"check": "bullets", "at_least": 2, "at_most": 2}, ["* a\n* b", "- a\n  - b"], ["* a", "* a\n* b\n- c", "**a**"]),
    ({"check": "paragraphs", "at_least": 2, "at_most": 2}, ["a\n\nb", "a\n \nb\nc"], ["a\nb", "a\n\nb\n\nc"]),
    (
        {"check": "paragraphs", "separator": "***", "at_least": 2, "at_most": 2},
        ["a\n***\nb", "a *** b", "***\na\n***\nb"],
        ["a\n\nb", "a\n***\n***\nb", "a"],
    ),
    ({"check": "placeholders", "at_least": 2}, ["[name], [address]"], ["[name]", "(name) (address)"]),
    ({"check": "highlights", "at_least": 2}, ["*a b* and *c*", "**a** and **b**"], ["*a*", "* a\n* b", "** **"]),
    ({"check": "sections", "marker": "Part", "at_least": 2}, ["Part 1\na\nPart 2\nb"], ["Part 1\na", "part 1 part 2"]),
    ({"check": "occurrences", "of": "tea", "at_least": 2}, ["Tea and tea", "a team's tea"], ["tea"]),
    ({"check": "occurrences", "of": ",", "at_most": 0}, ["so it is"], ["so, it is"]),
    ({"check": "contains", "texts": ["red", "Blue"]}, ["blue and RED"], ["red", "blue"]),
    ({"check": "contains_one", "texts": ["yes.", "no."]}, ["I say yes."], ["I say Yes."]),
    ({"check": "forbids", "words": ["rich", "c++"]}, ["enriched riches"], ["so Rich", "in C++ it is"]),
    ({"check": "case", "letters": "lower"}, ["so it is, 1.", "é"], ["So", "123"]),
    ({"check": "case", "letters": "upper"}, ["SO IT IS!"], ["So", "123"]),
    ({"check": "starts_with", "text": "Dear you"}, [" dear you, come"], ["My dear you"]),
    ({"check": "ends_with", "text": "Is that all?"}, ['"… is that all?"', "Is that all? "], ["Is that all? No."]),
    ({"check": "quoted"}, ['"so"', ' "a "b" c" '], ['so "it" is', '"']),
    ({"check": "title"}, ["<<So>>\nit is"], ["<So>", "<< >>", "<<So\nit is>>"]),
    ({"check": "postscript", "marker": "P.S."}, ["So.\nP.S. no", "p. s. no"], ["chips", "PS no"]),
    ({"check": "postscript", "marker": "P.P.S"}, ["P.P.S no", "p. p. s"], ["P.S. no"]),
    ({"check": "json"}, ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n[]\n```", "12"], ["{a: 1}", "so: {}", ""]),
]  # fmt: skip


@pytest.mark.parametrize(("check", "good", "bad"), TEXTS, ids=lambda value: str(value)[:60])
def test_each_check_passes_and_fails_its_examples(
    check: dict[str, Any], good: Sequence[str], bad: Sequence[str]
) -> None:
    made = CHECK.validate_python(check)
    assert [made.passes(text) for text in good] == [True] * len(good)
    assert [made.passes(text) for text in bad] == [False] * len(bad)
    assert [made.passes(text) for text in made.examples()] == [True, False]


def test_every_check_has_examples() -> None:
    kinds = {kind["properties"]["check"]["const"] for kind in CHECK.json_schema()["$defs"].values()}
    assert {check["check"] for check, _, _ in TEXTS} == kinds


COUNTS = ["words", "sentences", "bullets", "paragraphs", "placeholders", "highlights", "sections", "occurrences"]


@given(st.sampled_from(COUNTS), st.integers(1, 40), st.booleans())
def test_generated_text_has_the_requested_count(kind: str, times: int, separated: bool) -> None:
    more: dict[str, Any] = {"sections": {"marker": "Part"}, "occurrences": {"of": "tea"}}.get(kind, {})
    if kind == "paragraphs" and separated:
        more = {"separator": "***"}
    made: Any = CHECK.validate_python({"check": kind, "at_least": times, "at_most": times, **more})
    assert made.count(made.make(times)) == times
    assert [made.passes(text) for text in made.examples()] == [True, False]


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=5))
def test_json_check_accepts_any_json(value: Any) -> None:
    made = CHECK.validate_python({"check": "json"})
    assert made.passes(json.dumps(value, indent=1))
    assert made.passes(f"```json\n{json.dumps(value)}\n```")


@given(st.text())
def test_checks_accept_any_text(text: str) -> None:
    for check, _, _ in TEXTS:
        made = CHECK.validate_python(check)
        assert made.passes(text) in (True, False)
    assert CHECK.validate_python({"check": "words", "at_least": len(re.findall(r"\w+", text)) or 1}).passes(
        text
    ) == bool(re.findall(r"\w+", text))


def test_checks_fail_on_an_empty_answer() -> None:
    check = CHECK.validate_python({"check": "occurrences", "of": ",", "at_most": 0})
    assert not Instruction("Write no comma.", (check,)).followed(" \n")
    assert Instruction("Write no comma.", (check,)).followed("so")


def test_control_fails_for_a_check_that_always_passes() -> None:
    checks = [CHECK.validate_python(check) for check, _, _ in TEXTS]
    good = examples_control([Instruction("p", tuple(checks))])
    assert (good.passed, good.score, good.items) == (True, 1.0, len(TEXTS))
    # Nothing but an empty text has no words, and an empty answer follows nothing.
    impossible = CHECK.validate_python({"check": "words", "at_most": 0})
    broken = examples_control([Instruction("p", (impossible, *checks))])
    assert not broken.passed
    assert broken.score == pytest.approx(len(TEXTS) / (len(TEXTS) + 1))


def test_read_instructions_reads_both_forms_and_counts_unsupported_checks(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows: list[Any] = [
        {"prompt": "Say so.", "checks": [{"check": "words", "at_most": 3}]},
        {
            "key": 1,
            "prompt": "List.",
            "instruction_id_list": ["detectable_format:number_bullet_lists", "length_constraints:number_words"],
            "kwargs": [{"num_bullets": 3}, {"relation": "less than", "num_words": 30, "num_bullets": None}],
        },
        {"prompt": "Hindi.", "instruction_id_list": ["language:response_language"], "kwargs": [{"language": "hi"}]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, unsupported = read_instructions(file)
    assert [i.prompt for i in found] == ["Say so.", "List."]
    assert unsupported == {"language:response_language": 1}
    assert found[1].followed("* a\n* b\n* c")
    assert not found[1].followed("* a\n* b\n* c" + " d" * 27)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "checks": []}, "checks is empty"),
        ({"prompt": "p", "checks": [{"check": "rhymes"}]}, "rhymes"),
        ({"prompt": "p", "checks": [{"check": "words"}]}, "at_least"),
        ({"prompt": "p", "checks": [{"check": "words", "at_least": 3, "at_most": 2}]}, "above at_most"),
        ({"prompt": " ", "checks": [{"check": "json"}]}, "must be text"),
        ({"checks": [{"check": "json"}]}, "'prompt' is missing"),
        ([], "Expected an object"),
    ],
)
def test_read_instructions_names_an_invalid_line(tmp_path: Path, row: Any, words: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "p", "checks": [{"check": "json"}]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        read_instructions(file)
    assert caught.value.where == f"{file}:2"


@pytest.mark.skipif(not IFEVAL.exists(), reason="IFEval's file is not part of the project")
def test_read_instructions_reads_googles_file() -> None:
    found, unsupported = read_instructions(IFEVAL)
    assert len(found) + sum(1 for _ in unsupported) < 541 < len(found) + sum(unsupported.values()) + 1
    assert set(unsupported) == {
        "language:response_language",
        "change_case:capital_word_frequency",
        "combination:two_responses",
        "length_constraints:nth_paragraph_first_word",
    }
    assert examples_control(found).passed
