"""Checking files and correcting copies: every fault is reported, and only unambiguous faults are repaired."""

from __future__ import annotations

import codecs
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener
from hypothesis import given
from hypothesis import strategies as st

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.readers import read_pairs, source_size
from tunewright.data.readers.file_check import Change, check_files, fix_file

DATA = DataConfig()
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
GOOD = {"messages": [USER, ANSWER]}


def _file(folder: Path, rows: list[Any], name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _fixed(tmp_path: Path, rows: list[Any], data: DataConfig = DATA) -> tuple[list[Any], list[Change]]:
    path = _file(tmp_path, rows)
    before = path.read_bytes()
    changes = fix_file(path, tmp_path / "out.jsonl", data)
    assert path.read_bytes() == before
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    return written, [change for change in changes if change.code is not None]


def test_check_files_counts_faults_of_all_files_by_code(tmp_path: Path) -> None:
    first = _file(tmp_path, [GOOD, {"prompt": "a"}, {"messages": [USER]}, 7])
    second = _file(tmp_path, [{"prompt": "a", "completion": " "}, GOOD, GOOD, {"prompt": "b"}], "more.jsonl")
    listener = Listener()
    check = check_files([first, second], DATA, listener)
    reported = [(Path(f.source).name, f.line, f.code) for f in check.faults]
    assert reported == [
        ("pairs.jsonl", 2, "E202"),
        ("pairs.jsonl", 3, "E407"),
        ("pairs.jsonl", 4, "E103"),
        ("more.jsonl", 1, "E401"),
        ("more.jsonl", 4, "E202"),
    ]
    assert check.counts == {"E103": 1, "E202": 2, "E401": 1, "E407": 1}
    assert [(f.examples, f.faulty) for f in check.files] == [(1, 3), (2, 2)]
    assert not check.ok
    assert check.summary.startswith("3 examples and 5 faulty rows in 2 files")
    size = source_size(first) + source_size(second)
    assert listener.steps["checking"] == (size, size)


def test_check_files_continues_after_an_unreadable_file(tmp_path: Path) -> None:
    array = tmp_path / "cut.json"
    array.write_text(f"[\n{json.dumps(GOOD)},\n{json.dumps({'prompt': 'a'})},\n")
    check = check_files([tmp_path / "none.jsonl", array, _file(tmp_path, [GOOD])], DATA, Listener())
    assert [f.unreadable is None for f in check.files] == [False, False, True]
    assert [f.examples for f in check.files] == [0, 1, 1]
    assert check.files[1].unreadable is not None
    assert check.files[1].unreadable["where"] == f"{array}:4"
    assert [fault.line for fault in check.faults] == [3]
    assert not check.ok
    assert "2 files not readable to the end" in check.summary


@pytest.mark.parametrize(
    ("turns", "repaired", "codes"),
    [
        ([{**USER, "name": "Ann"}, ANSWER], [USER, ANSWER], ["E309"]),
        ([USER, {**ANSWER, "refusal": None, "tool_calls": []}], [USER, ANSWER], ["E303"]),
        ([{"role": "human", "content": "a"}, {"role": "Assistant", "content": "b"}], [USER, ANSWER], ["E304", "E304"]),
        ([{**USER, "weight": 0}, {**ANSWER, "weight": None}], [USER, ANSWER], ["E307", "E307"]),
        ([USER, ANSWER, USER], [USER, ANSWER], ["E407"]),
        ([USER, ANSWER, USER, {**ANSWER, "weight": 0}], [USER, ANSWER], ["E308"]),
        ([USER, ANSWER, USER, {"role": "assistant", "content": " "}], [USER, ANSWER], ["E401", "E407"]),
        ([{"role": "system", "content": ""}, USER, ANSWER], [USER, ANSWER], ["E401"]),
        ([USER, USER, ANSWER], [USER, ANSWER], ["E406"]),
        ([USER, {"role": "user", "content": "\n"}, ANSWER], [USER, ANSWER], ["E406"]),
    ],
)
def test_fix_file_repairs_and_lists_unambiguous_faults(
    tmp_path: Path, turns: list[Any], repaired: list[Any], codes: list[str]
) -> None:
    written, changes = _fixed(tmp_path, [GOOD, {"messages": turns}])
    assert written == [GOOD, {"messages": repaired}]
    assert [(c.line, c.code, c.left_out) for c in changes] == [(2, code, False) for code in codes]
    assert all(str(change).startswith(f"{tmp_path / 'pairs.jsonl'}:2: ") for change in changes)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": [USER, {"role": "user", "content": "another"}, ANSWER]}, "E406"),
        ({"messages": [ANSWER, USER, ANSWER]}, "E405"),
        ({"messages": [USER]}, "E407"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "E308"),
        ({"messages": [{"role": "user", "content": " "}, ANSWER]}, "E401"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "E305"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"id": "x"}]}]}, "E511"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "E307"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "E208"),
        ({"messages": [{**USER, "topic": "law"}, ANSWER]}, "E303"),
        ({**GOOD, "sytem": "x"}, "E201"),
        ({"prompt": "a", "completion": ""}, "E401"),
        (7, "E103"),
    ],
)
def test_fix_file_leaves_out_rows_without_a_safe_repair(tmp_path: Path, row: Any, code: str) -> None:
    written, changes = _fixed(tmp_path, [GOOD, row, GOOD])
    assert written == [GOOD, GOOD]
    assert [(c.line, c.code, c.left_out) for c in changes] == [(2, code, True)]


def test_fix_file_claims_no_repair_for_a_row_left_out(tmp_path: Path) -> None:
    turns = [{**USER, "name": "Ann"}, {"role": "assistant", "content": None}]
    _, changes = _fixed(tmp_path, [GOOD, {"messages": turns}])
    assert [(c.code, c.left_out) for c in changes] == [("E305", True)]


def test_fix_file_writes_utf8_without_byte_order_mark(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "café", "completion": "b"}, ensure_ascii=False) + "\n"
    for name, content, words in (
        ("mark", codecs.BOM_UTF8 + row.encode(), "byte-order mark"),
        ("wide", row.encode("utf-16"), "UTF-16 with a byte-order mark"),
        ("windows", row.encode("cp1252"), "read as cp1252"),
    ):
        (tmp_path / name).write_bytes(content)
        changes = fix_file(tmp_path / name, tmp_path / f"{name}.out", DATA)
        assert words in changes[0].what
        assert changes[0].line == 1
        assert json.loads((tmp_path / f"{name}.out").read_bytes().decode())["messages"][0]["content"] == "café"
        assert check_files([tmp_path / f"{name}.out"], DATA, Listener()).ok


def test_fix_file_writes_chat_rows_with_groups_and_without_system_turn(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("q,a,customer,id\nhi,ho,7,1\nhe,ha,,2\n")
    data = DataConfig(input="q", output="a", group_by=("customer",), drop_columns=("id",), system_prompt="Be brief.")
    changes = fix_file(path, tmp_path / "out.jsonl", data)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "customer": "7",
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
    }
    assert any("written as chat rows" in change.what for change in changes)
    again = read_pairs(tmp_path / "out.jsonl", data.model_copy(update={"input": None, "output": None}))
    assert [row.groups for row in again.rows] == [row.groups for row in read_pairs(path, data).rows]


def test_fix_file_keeps_a_weight_of_0(tmp_path: Path) -> None:
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]}
    written, changes = _fixed(tmp_path, [row])
    assert ([m.get("weight") for m in written[0]["messages"]], changes) == ([None, 0, None, None], [])


def test_fix_file_never_overwrites_a_file(tmp_path: Path) -> None:
    path, other = _file(tmp_path, [GOOD]), _file(tmp_path, [GOOD], "other.jsonl")
    (tmp_path / "link").symlink_to(path)
    for out, words in ((path, "overwrite"), (tmp_path / "link", "overwrite"), (other, "already")):
        before = out.read_bytes()
        with pytest.raises(UserError, match=words):
            fix_file(path, out, DATA)
        assert out.read_bytes() == before


def test_fix_file_writes_nothing_when_no_row_is_left(tmp_path: Path) -> None:
    path = _file(tmp_path, [7, {"prompt": "a"}])
    with pytest.raises(UserError, match="Every row has a fault"):
        fix_file(path, tmp_path / "out.jsonl", DATA)
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_fix_file_leaves_out_chosen_rows_and_their_repetitions(tmp_path: Path) -> None:
    text = "question;answer;note\nq;B;x\nq;A;y\nother;B;z\n Q ;B;later\nq;;\n"
    (tmp_path / "in.csv").write_text(text)
    data = DataConfig(input="question", output="answer")
    with pytest.raises(UserError, match="no row at line 1, 7"):
        fix_file(tmp_path / "in.csv", tmp_path / "out.csv", data, leave_out={1, 2, 7})
    with pytest.raises(UserError, match="Every row is left out"):
        fix_file(tmp_path / "in.csv", tmp_path / "out.csv", data, leave_out={2, 3, 4})
    assert not (tmp_path / "out.csv").exists()
    changes = fix_file(tmp_path / "in.csv", tmp_path / "out.csv", data, leave_out={2, 6})
    assert (tmp_path / "out.csv").read_text("utf-8-sig") == "question;answer;note\nq;A;y\nother;B;z\n"
    assert [(change.line, change.what, change.left_out) for change in changes if change.line < 6] == [
        (2, "left out, as chosen", True),
        (5, "left out: it repeats line 2, which was chosen", True),
    ]
    assert changes[0].before == "user: q\nassistant: B" and changes[-1].code == "E401"


def test_fix_file_fills_in_empty_answers_in_tables_and_chats(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("question;answer;note\nq;A;y\nr;;z\ns;;\n")
    data = DataConfig(input="question", output="answer")
    for lines, said in (({3: "B", 9: "C"}, "no row at line 9"), ({2: "B"}, "at line 2 has no empty answer")):
        with pytest.raises(UserError, match=said):
            fix_file(tmp_path / "in.csv", tmp_path / "out.csv", data, answers=lines)
    assert not (tmp_path / "out.csv").exists()
    changes = fix_file(tmp_path / "in.csv", tmp_path / "out.csv", data, answers={3: 'B; "two"\nlines'})
    copy = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text("utf-8-sig")), delimiter=";"))
    assert copy == [["question", "answer", "note"], ["q", "A", "y"], ["r", 'B; "two"\nlines', "z"]]
    assert [(each.line, each.code, each.left_out) for each in changes] == [(3, "E401", False), (4, "E401", True)]
    assert (changes[0].before, changes[0].after) == ("user: r\nassistant: ", 'user: r\nassistant: B; "two"\nlines')
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]
    fix_file(_file(tmp_path, [{"messages": chat, "id": 7}]), tmp_path / "out.jsonl", DATA, answers={1: "A"})
    expected = {"id": 7, "messages": [chat[0], {"role": "assistant", "content": "A"}]}
    assert json.loads((tmp_path / "out.jsonl").read_text()) == expected


_turns = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool"]),
            "content": st.one_of(
                st.sampled_from(["a", "b", " ", ""]), st.none(), st.just([{"type": "text", "text": "c"}])
            ),
        },
        optional={"weight": st.sampled_from([0, 1, 2, None]), "name": st.just("Ann"), "refusal": st.none()},
    ),
    max_size=6,
)


@given(st.lists(st.fixed_dictionaries({"messages": _turns}), max_size=5))
def test_fix_file_copy_is_valid_and_accounts_for_every_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("fix")
    path, out = _file(folder, [GOOD, *rows]), folder / "out.jsonl"
    changes = fix_file(path, out, DATA)
    assert check_files([out], DATA, Listener()).ok
    left_out = [change.line for change in changes if change.left_out]
    assert len(out.read_text().splitlines()) + len(left_out) == len(rows) + 1
    faulty = {fault.line for fault in read_pairs(path, DATA).faults}
    assert faulty == {change.line for change in changes if change.code is not None}


def test_check_files_counts_secrets_without_values(tmp_path: Path) -> None:
    card = "4539 1488 0343 6467"
    path = _file(tmp_path, [{"prompt": f"charge {card}", "completion": "done"}, {"prompt": "a", "completion": "b"}])
    checked = check_files([path], DataConfig(), Listener())
    assert (checked.ok, checked.faults, checked.secrets) == (False, (), {"card": 1})
    assert "secrets (payment card number: 1)" in checked.summary
    assert card not in checked.summary
    assert check_files([path], DataConfig(allow=("card",)), Listener()).ok
