"""Test items found in training rows: planted copies of every kind, nothing in unrelated sets; reports when adding."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from data_helpers import Listener, example, new_project, unlike_pairs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.dedup.decontaminate import ContaminationHit, MatchKind, find_hits, read_items
from tunewright.data.examples import Example, Message
from tunewright.data.notices import contaminated
from tunewright.data.versions import load_version

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


def test_find_hits_finds_nothing_of_one_suite_in_another() -> None:
    suites = {name: _suite(name)[::3] for name in SUITES}
    for name, items in suites.items():
        rows = {str(i): example(item, "x") for i, item in enumerate(items)}
        others = {other: texts for other, texts in suites.items() if other != name}
        assert find_hits(rows, others, Listener()) == []


CARD = "where can I change my card"
MORNING = f"Good morning, {CARD} and what does it cost me? Thank you for the answer"
PHRASE = "your entire answer has to be in lower case letters and must not have any commas at all"
PHRASES = [f"{topic} {topic}: {PHRASE}" for topic in "abcdefghijklmnop"]
HEADER = "Answer with one of the labels fees cards or loans and nothing else whatever the customer says:"
HEADED = [f"{HEADER} where is my new card today", f"{HEADER} what does a wire cost"]
CLAUSE = "terminate this agreement on thirty days notice"
AGREED = [f"The parties agree that either of them may {CLAUSE} to the other side"]


@pytest.mark.parametrize(
    ("row", "items", "output", "found"),
    [
        (f"Hi there! {CARD.upper()}, and does it cost anything these days?", ["x y z", CARD], "ok", [(1, "contained")]),
        (CARD, ["x y z", MORNING], "ok", [(1, "contained")]),
        # A few words match as a whole row only.
        ("lost card", ["Lost card!"], "ok", [(0, "equal")]),
        ("my lost card was found by a neighbour of mine", ["Lost card!"], "ok", []),
        ("Write a question for a test.", [ITEM, "other"], f"Here is one: {ITEM}", [(0, "contained")]),
        # A phrase of many items, or an instruction before every item, is no hit.
        (f"Tell me of the sea, {PHRASE}", PHRASES, "ok", []),
        (f"Tell me of the sea, {PHRASE}", PHRASES[:3], "ok", [(n, "overlap") for n in range(3)]),
        (f"{HEADER} how do I get a loan", HEADED, "ok", []),
        (HEADED[1], HEADED, "ok", [(1, "equal")]),
        ("I asked: what does a wire cost?", HEADED, "ok", [(1, "contained")]),
        # An output that is part of an item is no hit, an input is one.
        ("which clause is it", AGREED, CLAUSE, []),
        (CLAUSE, AGREED, "ok", [(0, "contained")]),
    ],
)
def test_find_hits_compares_words_of_a_row_with_each_item(
    row: str, items: list[str], output: str, found: list[tuple[int, str]]
) -> None:
    assert _hits(row, items, output) == found


def test_find_hits_scores_an_overlap_by_its_longest_run() -> None:
    words = [f"w{i}" for i in range(40)]
    hits = find_hits(
        {"row": example("before " + " ".join(words[5:25]) + " after", "x")}, {"suite": [" ".join(words)]}, Listener()
    )
    assert hits == [ContaminationHit("row", "suite", 0, "overlap", 20 / 40)]


def test_find_hits_ignores_system_turns() -> None:
    row = Example((Message("system", ITEM), Message("user", "hello"), Message("assistant", "hi")))
    assert find_hits({"row": row}, {"suite": [ITEM]}, Listener()) == []


@given(st.lists(st.text("ab. \n", max_size=40), min_size=1, max_size=6), st.text("AB,", max_size=9))
def test_find_hits_always_finds_an_item_that_is_a_row(items: list[str], extra: str) -> None:
    for number, item in enumerate(items):
        found = _hits(f"{item}!", [*items, extra])
        assert ((number, "equal") in found) == any(c.isalnum() for c in item)


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


@pytest.mark.parametrize("output", ["cancel", "Cancel my order", "cancel my order, please now"])
def test_find_hits_ignores_short_outputs_and_labels(output: str) -> None:
    rows = {"row": example("something else entirely", output)}
    assert find_hits(rows, {"suite": [output]}, Listener(), labels={output}) == []
    long = len(output.split()) >= 5
    assert bool(find_hits(rows, {"suite": [output]}, Listener())) == long


def test_find_hits_ignores_short_earlier_replies() -> None:
    turns = (Message("user", "a question"), Message("assistant", "weather"), Message("user", "more"))
    row = Example((*turns, Message("assistant", "yes")))
    assert find_hits({"row": row}, {"suite": ["weather", "more"]}, Listener()) == [
        ContaminationHit("row", "suite", 1, "equal", 1.0)
    ]


PAIRS = unlike_pairs(100)
PLANTED = "What is the name of the largest lake in the far north of the country?"


def _with_benchmark(root: Path, more: str = "") -> ProjectFolder:
    project = new_project(root, f"data:\n  benchmarks: [lakes.jsonl]\n{more}")
    (root / "lakes.jsonl").write_text(json.dumps({"question": PLANTED}) + "\n" + json.dumps("Who?") + "\n")
    return project


def _holding(project: ProjectFolder) -> Path:
    return write_jsonl(project.root / "holding.jsonl", [*PAIRS, (f"Tell me. {PLANTED} Be brief.", "the long lake")])


def test_add_reports_and_keeps_a_training_row_with_a_benchmark_item(tmp_path: Path) -> None:
    project = _with_benchmark(tmp_path / "p")
    listener = Listener()
    result = add(project, [_holding(project)], listener)
    row = next(m for m in load_version(project.dataset).members if m.example.output == "the long lake")
    assert row.split == "train"
    [hit] = result.contaminated
    assert (hit.row, hit.source, hit.item, hit.how) == (row.key, "lakes.jsonl", 0, "contained")
    reported = next(w for w in listener.warned if "benchmark item" in w)
    assert "holding.jsonl:101 contains or is part of item 1 of lakes.jsonl" in reported
    assert "kept" in reported
    assert "one text, or nearly all of it, is in the other. Near-duplicates (data.dedup_threshold)" in reported
    equal: tuple[str, MatchKind, str] = ("a.jsonl:1", "equal", "test row 1")
    contained: tuple[str, MatchKind, str] = ("a.jsonl:2", "contained", "test row 2")
    assert "nearly all of it" not in contaminated([equal], dropping=False)
    assert "nearly all of it" not in contaminated([contained], dropping=True)
    assert "nearly all of it" in contaminated([equal, contained], dropping=False)


def test_add_drops_contaminated_rows_and_records_them(tmp_path: Path) -> None:
    project = _with_benchmark(tmp_path / "p", "  contaminated: drop\n")
    listener = Listener()
    result = add(project, [_holding(project)], listener)
    version = load_version(project.dataset)
    assert all(m.example.output != "the long lake" for m in version.members)
    assert (result.added, result.version.counts.rows) == (100, 100)
    assert any("left out" in w and "holding.jsonl:101" in w for w in listener.warned)
    records = [
        json.loads(line) for line in next(project.dataset.glob("versions/*/imports.jsonl")).read_text().splitlines()
    ]
    assert [r["line"] for r in records if r["fate"] == "contaminated"] == [101]
    again = add(project, [_holding(project)], Listener())
    assert not again.created


def test_dropped_contaminated_rows_stay_out_in_later_versions(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {contaminated: drop}\n")
    add(project, [write_jsonl(tmp_path / "pairs.jsonl", PAIRS)], Listener())
    tests = load_version(project.dataset).examples("test")
    holding = [
        (f"Listen to this, please, and think: {m.example.input_text}. What now?", f"held {i}")
        for i, m in enumerate(tests)
    ]
    file = write_jsonl(tmp_path / "holding.jsonl", [*holding, *unlike_pairs(40, seed=3)])
    add(project, [file], Listener())
    for seed in (4, 5):
        add(project, [write_jsonl(tmp_path / "more.jsonl", unlike_pairs(60, seed=seed))], Listener())
        again = add(project, [file], Listener())
        assert (again.created, again.added, len({hit.row for hit in again.contaminated})) == (False, 0, len(tests))


def test_add_reports_a_training_row_with_a_test_row(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    add(project, [write_jsonl(tmp_path / "pairs.jsonl", PAIRS)], Listener())
    held_out = load_version(project.dataset).examples("test")[0]
    text = f"A customer wrote this last night, in some haste: {held_out.example.input_text}. What now, and who answers?"
    result = add(project, [write_jsonl(tmp_path / "more.jsonl", [(text, "call back")])], Listener())
    [hit] = result.contaminated
    assert (hit.source, hit.how) == ("the test split", "contained")


def test_add_refuses_an_unreadable_benchmark(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {benchmarks: [nowhere.jsonl]}\n")
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        add(project, [write_jsonl(tmp_path / "pairs.jsonl", PAIRS)], Listener())
    assert not (project.dataset / "HEAD").exists()


def _intents(rows: int = 40) -> list[tuple[str, str]]:
    """Utterances of several intents, of each one utterance that is the intent's name."""
    names = ["cancel", "weather", "timer", "balance", "transfer"]
    said = iter(unlike_pairs(rows * len(names), seed=7))
    return [pair for name in names for pair in [(name, name), *((next(said)[0], name) for _ in range(rows))]]


def test_add_keeps_rows_whose_label_equals_a_test_input(tmp_path: Path) -> None:
    pairs = _intents()
    for seed in range(200):  # until a one-word input is a test row
        project = new_project(tmp_path / f"p{seed}", f"seed: {seed}\ndata: {{contaminated: drop}}\n")
        result = add(project, [write_jsonl(tmp_path / "intents.jsonl", pairs)], Listener())
        version = load_version(project.dataset)
        assert (result.left_out, len(version.members)) == (0, len(pairs))
        if any(" " not in m.example.input_text for m in version.examples("test")):
            return
    pytest.fail("no one-word input was ever a test row")


def test_add_warns_of_a_class_that_loses_most_of_its_rows(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p", "data: {contaminated: drop, benchmarks: [items.jsonl]}\n")
    pairs = _intents()
    items = [json.dumps(prompt) + "\n" for prompt, intent in pairs if intent == "timer"]
    (tmp_path / "p" / "items.jsonl").write_text("".join(items))
    listener = Listener()
    result = add(project, [write_jsonl(tmp_path / "intents.jsonl", pairs)], listener)
    reported = [w for w in listener.warned if w.startswith("The class")]
    assert len(reported) == 1
    assert reported[0].startswith(f'The class "timer" loses {result.left_out} of its {result.left_out} training rows')
    assert result.left_out == len(items)
    assert not any(m.example.output == "timer" for m in load_version(project.dataset).members)
