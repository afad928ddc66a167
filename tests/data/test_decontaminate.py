"""Test items found in training rows: planted copies of every kind in real suites, and nothing in unrelated sets."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
from data_helpers import Listener, example
from hypothesis import given
from hypothesis import strategies as st

from tunewright.core.errors import UserError
from tunewright.data.dedup.decontaminate import ContaminationHit, find_hits, read_items
from tunewright.data.examples import Example, Message

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
SUITES = {"arc_easy": "arc_easy/arc_easy.jsonl", "gsm8k": "gsm8k/test.jsonl", "ifeval": "ifeval/input_data.jsonl"}
ITEM = "Which of these gases do plants take out of the air to make sugar?"


def _hits(row: str, items: list[str], output: str = "ok") -> list[tuple[int, str]]:
    found = find_hits({"row": example(row, output)}, {"suite": items}, Listener())
    return [(hit.item, hit.how) for hit in found]


def _suite(name: str) -> list[str]:
    path = DATA / SUITES[name]
    if not path.is_file():
        pytest.skip(f"the {name} file is not next to this checkout")
    return read_items(path)


@pytest.mark.parametrize("name", SUITES)
def test_find_hits_finds_all_planted_copies(name: str) -> None:
    items = _suite(name)
    draw = random.Random(0)
    chosen = draw.sample(range(len(items)), 100)
    rows: dict[str, Example] = {}
    planted: dict[str, int] = {}
    for number in chosen:
        text = items[number].removeprefix("Question: ")
        marks = "".join(c if c.isalnum() or c.isspace() or c == "_" else " - " for c in text)
        for kind, copy in {
            "verbatim": text,
            "cased": text.upper(),
            "punctuation": f"{marks} !",
            "embedded": f"Hello, my teacher gave me this for homework. {text} Can you tell me, please?",
        }.items():
            rows[f"{kind} {number}"] = example(copy, "x")
            planted[f"{kind} {number}"] = number
    hits = find_hits(rows, {name: items}, Listener())
    # Some suites have an item twice, so a copy may be one of more than its own item.
    assert {(hit.row, hit.item) for hit in hits} >= set(planted.items())
    assert {hit.how for hit in hits if hit.row.startswith("verbatim") and planted[hit.row] == hit.item} == {"equal"}


@pytest.mark.parametrize("name", SUITES)
def test_find_hits_finds_nothing_of_a_suite_in_bank_questions(name: str) -> None:
    path = DATA / "banking77" / "train.csv"
    if not path.is_file():
        pytest.skip("the BANKING77 files are not next to this checkout")
    with path.open(newline="", encoding="utf-8") as file:
        rows = {str(i): example(row["text"], row["category"]) for i, row in enumerate(csv.DictReader(file))}
    assert find_hits(rows, {name: _suite(name)}, Listener()) == []


def test_find_hits_finds_nothing_of_one_suite_in_another() -> None:
    suites = {name: _suite(name) for name in SUITES}
    for name, items in suites.items():
        rows = {str(i): example(item, "x") for i, item in enumerate(items)}
        others = {other: texts for other, texts in suites.items() if other != name}
        assert find_hits(rows, others, Listener()) == []


def test_find_hits_finds_short_items_in_rows_and_short_rows_in_items() -> None:
    short = "where can I change my card"
    assert _hits(f"Hi there! {short.upper()}, and does it cost anything these days?", ["x y z", short]) == [
        (1, "contained")
    ]
    assert _hits(short, ["x y z", f"Good morning, {short} and what does it cost me? Thank you for the answer"]) == [
        (1, "contained")
    ]


def test_find_hits_matches_a_few_words_only_as_a_whole_row() -> None:
    assert _hits("lost card", ["Lost card!"]) == [(0, "equal")]
    assert _hits("my lost card was found by a neighbour of mine", ["Lost card!"]) == []


def test_find_hits_includes_outputs_that_contain_an_item() -> None:
    assert _hits("Write a question for a test.", [ITEM, "other"], output=f"Here is one: {ITEM}") == [(0, "contained")]


def test_find_hits_scores_an_overlap_by_its_longest_run() -> None:
    words = [f"w{i}" for i in range(40)]
    hits = find_hits(
        {"row": example("before " + " ".join(words[5:25]) + " after", "x")}, {"suite": [" ".join(words)]}, Listener()
    )
    assert hits == [ContaminationHit("row", "suite", 0, "overlap", 20 / 40)]


def test_find_hits_ignores_phrases_of_many_items() -> None:
    phrase = "your entire answer has to be in lower case letters and must not have any commas at all"
    items = [f"{topic} {topic}: {phrase}" for topic in "abcdefghijklmnop"]
    assert _hits(f"Tell me of the sea, {phrase}", items) == []
    assert _hits(f"Tell me of the sea, {phrase}", items[:3]) == [(0, "overlap"), (1, "overlap"), (2, "overlap")]


def test_find_hits_ignores_an_instruction_before_every_item() -> None:
    header = "Answer with one of the labels fees cards or loans and nothing else whatever the customer says:"
    tests = [f"{header} where is my new card today", f"{header} what does a wire cost"]
    assert _hits(f"{header} how do I get a loan", tests) == []
    assert _hits(f"{header} what does a wire cost", tests) == [(1, "equal")]
    assert _hits("I asked: what does a wire cost?", tests) == [(1, "contained")]


def test_find_hits_ignores_system_turns() -> None:
    row = Example((Message("system", ITEM), Message("user", "hello"), Message("assistant", "hi")))
    assert find_hits({"row": row}, {"suite": [ITEM]}, Listener()) == []


@given(st.lists(st.text("ab. \n", max_size=40), min_size=1, max_size=6), st.text("AB,", max_size=9))
def test_find_hits_always_finds_an_item_that_is_a_row(items: list[str], extra: str) -> None:
    for number, item in enumerate(items):
        found = _hits(f"{item}!", [*items, extra])
        assert ((number, "equal") in found) == any(c.isalnum() for c in item)


def test_find_hits_advances_progress_to_the_number_of_rows() -> None:
    listener = Listener()
    find_hits({"a": example("x", "y"), "b": example("z", "y")}, {"suite": [ITEM]}, listener)
    assert listener.steps == {"looking for test items": (2, 2)}


def test_read_items_accepts_strings_and_known_or_named_fields(tmp_path: Path) -> None:
    file = tmp_path / "suite.jsonl"
    file.write_text('"one"\n{"answer": "no", "question": "two"}\n\n{"prompt": "three\u2028"}\n', encoding="utf-8-sig")
    assert read_items(file) == ["one", "two", "three\u2028"]
    file.write_text('{"answer": "no", "question": "two"}\n')
    assert read_items(file, "answer") == ["no"]


def test_read_items_takes_the_last_user_turn_of_a_chat_export(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    said = [("system", "Be brief."), ("user", "one"), ("assistant", "yes"), ("user", "two"), ("assistant", "no")]
    parts = [{"role": "user", "content": [{"type": "text", "text": "three"}]}]
    chats = [[{"role": role, "content": text} for role, text in said], parts]
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))
    assert read_items(file) == ["two", "three"]


def test_read_items_names_every_place_that_it_looked_in(tmp_path: Path) -> None:
    file = tmp_path / "suite.jsonl"
    file.write_text('{"utterance": "x"}\n')
    with pytest.raises(UserError, match="question, query, prompt, instruction, input, text, or a user turn") as error:
        read_items(file)
    assert error.value.fix is not None
    assert '{"question": "..."}' in error.value.fix


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "Not JSON"),
        ('{"answer": "x"}', "No text in"),
        ('{"messages": [{"role": "assistant"}]}', "No text in"),
        ('{"text": 3}', "No text in"),
    ],
)
def test_read_items_refuses_a_line_without_text(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "suite.jsonl"
    file.write_text(f'"fine"\n{text}\n')
    with pytest.raises(UserError, match=what) as error:
        read_items(file)
    assert error.value.where == f"{file}:2"


def test_read_items_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read the file"):
        read_items(tmp_path / "none.jsonl")


@pytest.mark.parametrize("output", ["cancel", "Cancel my order", "cancel my order, please now"])
def test_find_hits_ignores_short_outputs_and_labels(output: str) -> None:
    rows = {"row": example("something else entirely", output)}
    assert find_hits(rows, {"suite": [output]}, Listener(), labels={output}) == []
    long = len(output.split()) >= 5
    assert bool(find_hits(rows, {"suite": [output]}, Listener())) == long


def test_find_hits_ignores_an_output_that_is_part_of_an_item() -> None:
    clause = "terminate this agreement on thirty days notice"
    item = f"The parties agree that either of them may {clause} to the other side"
    assert _hits("which clause is it", [item], output=clause) == []
    assert _hits(clause, [item]) == [(0, "contained")]


def test_find_hits_ignores_short_earlier_replies() -> None:
    turns = (Message("user", "a question"), Message("assistant", "weather"), Message("user", "more"))
    row = Example((*turns, Message("assistant", "yes")))
    assert find_hits({"row": row}, {"suite": ["weather", "more"]}, Listener()) == [
        ContaminationHit("row", "suite", 1, "equal", 1.0)
    ]
