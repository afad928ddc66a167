"""Conversations with functions in a dataset: every step sees their calls and results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener, new_project
from hypothesis import given
from hypothesis import strategies as st
from review_helpers import review
from tool_rows import OSLO, TOOLS, Row, as_openai, conversation, weather

from making.command_line import tunewright
from tunewright.config import DataConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.data.add import add
from tunewright.data.browse import write_version
from tunewright.data.dedup import exact_repeats, find_duplicates
from tunewright.data.dedup.decontaminate import find_hits
from tunewright.data.examples import Example, Message, ToolCall, call_id, with_calls_numbered
from tunewright.data.pii import find, redact, scan
from tunewright.data.readers import read_pairs
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.validate import edited_answer
from tunewright.data.review.edits import apply_edits
from tunewright.data.review.session import ReviewItem
from tunewright.data.versions import load_version

CARD, EMAIL = "4539 1488 0343 6467", "maria.lopez@uni-bonn.de"
CITIES = ["Oslo", "Bergen", "Kraków", "Lima", "Quito", "Accra", "Dakar", "Perth", "Turin", "Izmir", "Osaka", "Hanoi"]


def asked(city: str, number: int = 0, result: str = "sun", answer: str | None = None) -> Example:
    """A question, a call, its result and an answer."""
    return conversation(
        Message("user", f"Request {number * 7919 % 10007}: the weather of {city} please"),
        Message("assistant", "", calls=(weather(0, city=city),)),
        Message("tool", result, call_id=call_id(0)),
        Message("assistant", answer or f"{result} in {city}"),
    )


def called(city: str, number: int = 0) -> Example:
    """A question whose ideal output is a call."""
    return conversation(*asked(city, number).messages[1:3])


def _added(folder: Path, examples: list[Example], write: Any = as_openai, **options: Any) -> ProjectFolder:
    project = new_project(folder)
    path = folder.parent / "rows.jsonl"
    path.write_text("".join(json.dumps(write(each)) + "\n" for each in examples), encoding="utf-8")
    add(project, [path], Listener(), **options)
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A dataset of calls and of answers after results."""
    rows = [make(city, n) for n, city in enumerate(CITIES) for make in (asked, called)]
    return _added(tmp_path_factory.mktemp("tools") / "p", [*rows, OSLO])


@pytest.mark.parametrize("form", ["chat", "parquet"])
def test_version_on_disk_and_export_keep_calls_and_declarations(
    project: ProjectFolder, tmp_path: Path, form: Any
) -> None:
    version = load_version(project.dataset)
    assert OSLO in [member.example for member in version.members]
    path = tmp_path / f"out.{form}"
    write_version(version, path, form, Listener())
    reading = read_pairs(path, DataConfig())
    assert reading.faults == []
    assert {row.example for row in reading.rows} == {member.example for member in version.members}
    if form == "chat":
        row = json.loads(path.read_text().splitlines()[0])
        assert (row["tools"], "tools" in {turn["role"] for turn in row["messages"]}) == (
            json.loads(canonical_json(TOOLS)),
            False,
        )


def test_rows_that_differ_in_functions_only_are_not_duplicates() -> None:
    fewer = canonical_json(TOOLS[:1])
    rows = [asked("Oslo"), Example((Message("tools", fewer), *asked("Oslo").messages[1:])), asked("Oslo")]
    assert exact_repeats(rows, 0).keys() == {2}
    assert find_duplicates(rows, 0, 0.8, Listener()).keys() == {2}


def test_inputs_that_differ_in_a_result_only_are_near_duplicates() -> None:
    one, other = (
        asked("Oslo", result="light rain, 9 degrees", answer="ok"),
        asked("Oslo", result="light rain, 8 degrees", answer="ok"),
    )
    far = conversation(
        *[
            *asked("Oslo").messages[1:3],
            Message("tool", "snow, ice and a storm from the north all week", call_id=call_id(0)),
            Message("assistant", "ok"),
        ]
    )
    lone = asked("Quito", 5, answer="ok")
    assert find_duplicates([one, other, far, lone], 0, 0.7, Listener()).keys() == {1}


def test_same_question_with_another_call_is_a_conflict(tmp_path: Path) -> None:
    rows = [called(city, n) for n, city in enumerate(CITIES)]
    turns = rows[0].messages
    other = Example((*turns[:-1], Message("assistant", "", calls=(weather(0, city="Bergen"),))))
    with pytest.raises(UserError, match="different outputs"):
        _added(tmp_path / "p", [*rows, other])


def test_rows_with_other_weights_replace_the_known_ones(tmp_path: Path) -> None:
    rows = [asked(city, n) for n, city in enumerate(CITIES)]
    project = _added(tmp_path / "p", rows)
    call = rows[0].messages[2]
    masked = Example((*rows[0].messages[:2], Message("assistant", "", 0, call.calls), *rows[0].messages[3:]))
    path = tmp_path / "more.jsonl"
    path.write_text(json.dumps(as_openai(masked)) + "\n")
    add(project, [path], Listener())
    found = [m.example for m in load_version(project.dataset).members]
    assert (len(found), masked in found, rows[0] in found) == (len(rows), True, False)


def test_decontamination_searches_results_and_arguments() -> None:
    quoted = "the quick brown fox jumps over the lazy dog while seven wizards brew quartz potions in june"
    result = asked("Oslo", result=quoted)
    argument = conversation(Message("user", "Go"), Message("assistant", "", calls=(weather(0, city=quoted),)))
    hits = find_hits({"r": result, "a": argument, "n": asked("Oslo")}, {"test": [quoted]}, Listener())
    assert {hit.row for hit in hits} == {"r", "a"}


def _with_secrets() -> Example:
    mail = ToolCall("get_weather", canonical_json({"city": f'say "hi" to {EMAIL}\n'}), call_id(0))
    return conversation(
        Message("user", "Weather?"),
        Message("assistant", "", calls=(mail,)),
        Message("tool", json.dumps({"card": CARD, "by": EMAIL}), call_id=call_id(0)),
        Message("assistant", "Paid."),
    )


def test_scan_finds_secrets_in_arguments_and_results_with_their_place() -> None:
    found = scan([("rows.jsonl:3", _with_secrets())])
    assert found.counts == {"email": 2, "card": 1}
    lines = list(map(str, found.places))
    assert lines[0] == 'rows.jsonl:3: e-mail address in messages[1] (assistant) under "city", 12-35'
    assert "messages[2] (tool)" in lines[1]


def test_password_is_found_by_the_name_of_its_argument() -> None:
    login = {"name": "login", "parameters": {"type": "object", "properties": {"password": {"type": "string"}}}}
    tools = canonical_json([{"type": "function", "function": login}])
    call = ToolCall("login", canonical_json({"password": "Xk9!rTq2#vLm"}), call_id(0))
    example = Example((Message("tools", tools), Message("user", "In"), Message("assistant", "", calls=(call,))))
    assert [place.finding.kind for place in scan([("a:1", example)]).places] == ["password"]
    redacted, counts = redact(example)
    assert (json.loads(redacted.messages[-1].calls[0].arguments), counts) == (
        {"password": "<PASSWORD_1>"},
        {"password": 1},
    )


def test_redact_replaces_a_value_alike_in_arguments_results_and_text() -> None:
    redacted, counts = redact(_with_secrets())
    assert json.loads(redacted.messages[2].calls[0].arguments) == {"city": 'say "hi" to <EMAIL_1>\n'}
    assert json.loads(redacted.messages[3].content) == {"card": "<CARD_1>", "by": "<EMAIL_1>"}
    assert counts == {"email": 2, "card": 1}
    assert redact(redacted) == (redacted, {})
    assert redacted.messages[0] == _with_secrets().messages[0]


_values = st.recursive(
    st.one_of(
        st.text(max_size=12), st.integers(), st.booleans(), st.none(), st.sampled_from([EMAIL, CARD, f"a {EMAIL}."])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["a", "note", "to", "id"]), _values, max_size=4))
def test_redacted_arguments_are_canonical_json_without_findings(arguments: Row) -> None:
    call = ToolCall("f", canonical_json(arguments), call_id(0))
    example = conversation(Message("user", "a"), Message("assistant", "", calls=(call,)))
    redacted, _ = redact(example)
    text = redacted.messages[-1].calls[0].arguments
    assert canonical_json(json.loads(text)) == text
    assert EMAIL not in text
    assert CARD not in text
    assert redact(redacted) == (redacted, {})
    if scan([("a:1", example)]).places == ():
        assert redacted == example


def test_edit_of_an_answer_changes_calls_and_keeps_them_checked(tmp_path: Path) -> None:
    project = _added(tmp_path / "p", [called(city, n) for n, city in enumerate(CITIES)])
    member = load_version(project.dataset).members[0]
    session = review(project, "ada")
    card = ReviewItem(session.members[member.key], 1)
    refused = session.edit(card, '{"name": "get_weather", "arguments": {}}')
    assert ("'city' is a required property" in refused, "no verdict" in refused) == (True, True)
    better = 'Looking it up.\n{"name": "get_weather", "arguments": {"days": 3, "city": "Rome"}}'
    assert session.edit(card, better) == ""
    apply_edits(project, Listener())
    [edited] = [m.example for m in load_version(project.dataset).members if "Rome" in m.example.output]
    assert edited.messages[-1] == Message("assistant", "Looking it up.", calls=(weather(0, city="Rome", days=3),))


@pytest.mark.parametrize("example", [OSLO, called("Lima"), asked("Lima")])
def test_edited_answer_is_the_inverse_of_the_output(example: Example) -> None:
    assert edited_answer(example, example.output) == example.messages[-1]


def test_edited_answer_of_an_undeclared_function_is_refused() -> None:
    with pytest.raises(RowError, match='answer calls "rm"') as caught:
        edited_answer(called("Lima"), '{"name": "rm", "arguments": {}}')
    assert caught.value.code == "E503"


def test_purge_finds_copies_of_arguments(tmp_path: Path) -> None:
    private = "the summer house of the Lindqvist family near Uddevalla"
    rows = [make(city, n) for n, city in enumerate(CITIES) for make in (asked, called)]
    secret = conversation(Message("user", "There"), Message("assistant", "", calls=(weather(0, city=private),)))
    project = _added(tmp_path / "p", [*rows, secret])
    (project.root / "notes.txt").write_text(f"seen: {private}")
    ran = tunewright(
        "data", "remove", "--where", "contains(output, 'Uddevalla')", "--because", "asked", "--purge", "--json",
        "-p", project.root,
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert "notes.txt" in ran.stdout
    stored = "".join(p.read_text(errors="replace") for p in project.dataset.rglob("*") if p.is_file())
    assert "Uddevalla" not in stored


def test_demonstrations_number_calls_by_their_place_in_the_prompt() -> None:
    shown = [m for m in OSLO.messages if m.role not in ("tools", "system")]
    turns = with_calls_numbered([OSLO.messages[0], *shown, *shown, *asked("Lima").messages[1:]])
    ids = [call.id for turn in turns for call in turn.calls]
    assert ids == [call_id(n) for n in range(5)]
    assert [turn.call_id for turn in turns if turn.role == "tool"] == ids
    assert find(turns[2].text) == []
