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
from tunewright.data.dedup.decontaminate import Hit, contaminated, read_items
from tunewright.data.examples import Example, Message

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
SUITES = {"arc_easy": "arc_easy/arc_easy.jsonl", "gsm8k": "gsm8k/test.jsonl", "ifeval": "ifeval/input_data.jsonl"}
ITEM = "Which of these gases do plants take out of the air to make sugar?"


def _hits(row: str, items: list[str], output: str = "ok") -> list[tuple[int, str]]:
    found = contaminated({"row": example(row, output)}, {"suite": items}, Listener())
    return [(hit.item, hit.how) for hit in found]


def _suite(name: str) -> list[str]:
    path = DATA / SUITES[name]
    if not path.is_file():
        pytest.skip(f"the {name} file is not beside this checkout")
    return read_items(path)


@pytest.mark.parametrize("name", SUITES)
def test_planted_copies_of_real_items_are_all_found(name: str) -> None:
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
    hits = contaminated(rows, {name: items}, Listener())
    # Some suites have an item twice, so a copy may be one of more than its own item.
    assert {(hit.row, hit.item) for hit in hits} >= set(planted.items())
    assert {hit.how for hit in hits if hit.row.startswith("verbatim") and planted[hit.row] == hit.item} == {"equal"}


@pytest.mark.parametrize("name", SUITES)
def test_bank_questions_hold_no_item_of_a_real_suite(name: str) -> None:
    path = DATA / "banking77" / "train.csv"
    if not path.is_file():
        pytest.skip("the BANKING77 files are not beside this checkout")
    with path.open(newline="", encoding="utf-8") as file:
        rows = {str(i): example(row["text"], row["category"]) for i, row in enumerate(csv.DictReader(file))}
    assert contaminated(rows, {name: _suite(name)}, Listener()) == []


def test_suites_hold_no_items_of_each_other() -> None:
    suites = {name: _suite(name) for name in SUITES}
    for name, items in suites.items():
        rows = {str(i): example(item, "x") for i, item in enumerate(items)}
        others = {other: texts for other, texts in suites.items() if other != name}
        assert contaminated(rows, others, Listener()) == []


def test_a_short_item_is_found_inside_a_longer_row_and_a_short_row_inside_a_longer_item() -> None:
    short = "where can I change my card"
    assert _hits(f"Hi there! {short.upper()}, and does it cost anything these days?", ["x y z", short]) == [
        (1, "contained")
    ]
    assert _hits(short, ["x y z", f"Good morning, {short} and what does it cost me? Thank you for the answer"]) == [
        (1, "contained")
    ]


def test_a_few_words_count_only_as_a_whole_row() -> None:
    assert _hits("lost card", ["Lost card!"]) == [(0, "equal")]
    assert _hits("my lost card was found by a neighbour of mine", ["Lost card!"]) == []


def test_an_output_that_holds_an_item_is_a_hit() -> None:
    assert _hits("Write a question for a test.", [ITEM, "other"], output=f"Here is one: {ITEM}") == [(0, "contained")]


def test_a_piece_of_a_long_item_is_an_overlap_scored_by_its_longest_run() -> None:
    words = [f"w{i}" for i in range(40)]
    hits = contaminated(
        {"row": example("before " + " ".join(words[5:25]) + " after", "x")}, {"suite": [" ".join(words)]}, Listener()
    )
    assert hits == [Hit("row", "suite", 0, "overlap", 20 / 40)]


def test_a_phrase_that_many_items_share_is_no_hit() -> None:
    phrase = "your entire answer has to be in lower case letters and must not have any commas at all"
    items = [f"{topic} {topic}: {phrase}" for topic in "abcdefghijklmnop"]
    assert _hits(f"Tell me of the sea, {phrase}", items) == []
    assert _hits(f"Tell me of the sea, {phrase}", items[:3]) == [(0, "overlap"), (1, "overlap"), (2, "overlap")]


def test_the_instruction_before_every_item_is_not_what_is_looked_for() -> None:
    header = "Answer with one of the labels fees cards or loans and nothing else whatever the customer says:"
    tests = [f"{header} where is my new card today", f"{header} what does a wire cost"]
    assert _hits(f"{header} how do I get a loan", tests) == []
    assert _hits(f"{header} what does a wire cost", tests) == [(1, "equal")]
    assert _hits("I asked: what does a wire cost?", tests) == [(1, "contained")]


def test_system_turns_do_not_count() -> None:
    row = Example((Message("system", ITEM), Message("user", "hello"), Message("assistant", "hi")))
    assert contaminated({"row": row}, {"suite": [ITEM]}, Listener()) == []


@given(st.lists(st.text("ab. \n", max_size=40), min_size=1, max_size=6), st.text("AB,", max_size=9))
def test_an_item_as_a_row_is_always_found(items: list[str], extra: str) -> None:
    for number, item in enumerate(items):
        found = _hits(f"{item}!", [*items, extra])
        assert ((number, "equal") in found) == any(c.isalnum() for c in item)


def test_progress_ends_at_the_number_of_rows() -> None:
    listener = Listener()
    contaminated({"a": example("x", "y"), "b": example("z", "y")}, {"suite": [ITEM]}, listener)
    assert listener.steps == {"looking for test items": (2, 2)}


def test_items_are_read_from_strings_and_from_the_usual_or_the_named_field(tmp_path: Path) -> None:
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
        ("{", "not JSON"),
        ('{"answer": "x"}', "no text in"),
        ('{"messages": [{"role": "assistant"}]}', "no text in"),
        ('{"text": 3}', "no text in"),
    ],
)
def test_a_line_without_a_text_is_refused_with_its_place(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "suite.jsonl"
    file.write_text(f'"fine"\n{text}\n')
    with pytest.raises(UserError, match=what) as error:
        read_items(file)
    assert error.value.where == f"{file}:2"


def test_a_file_that_is_not_there_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_items(tmp_path / "none.jsonl")


@pytest.mark.parametrize("output", ["cancel", "Cancel my order", "cancel my order, please now"])
def test_an_output_is_no_hit_when_it_is_short_or_a_label(output: str) -> None:
    rows = {"row": example("something else entirely", output)}
    assert contaminated(rows, {"suite": [output]}, Listener(), labels={output}) == []
    long = len(output.split()) >= 5
    assert bool(contaminated(rows, {"suite": [output]}, Listener())) == long


def test_an_output_is_no_hit_when_it_is_a_piece_of_a_longer_item() -> None:
    clause = "terminate this agreement on thirty days notice"
    item = f"The parties agree that either of them may {clause} to the other side"
    assert _hits("which clause is it", [item], output=clause) == []
    assert _hits(clause, [item]) == [(0, "contained")]


def test_an_earlier_reply_is_no_hit_when_it_is_short() -> None:
    turns = (Message("user", "a question"), Message("assistant", "weather"), Message("user", "more"))
    row = Example((*turns, Message("assistant", "yes")))
    assert contaminated({"row": row}, {"suite": ["weather", "more"]}, Listener()) == [
        Hit("row", "suite", 1, "equal", 1.0)
    ]
