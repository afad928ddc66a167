"""Input and ideal output by templates: rendered text, errors and notes."""

from __future__ import annotations

import datetime
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener, write_rows
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.readers import ReadResult, read_pairs, sandbox
from tunewright.data.readers.file_check import check_files, fix_file
from tunewright.data.readers.sandbox import parse_template, render

ROW = {"id": 7, "title": "Mitosis", "parts": [{"text": "é", "ok": True}, {"text": "<b>"}], "gold": 1, "note": None}


def _read(folder: Path, output: str, *rows: Any, **config: Any) -> ReadResult:
    data = DataConfig(**{"input": "{{ title }}", "output": output, **config})
    return read_pairs(write_rows(folder / "rows.jsonl", rows or (ROW,)), data)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ title }}: {{ gold }}", "Mitosis: 1"),
        ("{{ parts[gold].text }}", "<b>"),
        ("{{ parts | map(attribute='text') | join(' ') }}", "é <b>"),
        ("{{ parts | tojson }}", '[{"text": "é", "ok": true}, {"text": "<b>"}]'),
        ("{{ note | tojson }}", "null"),
        ("{{ {'b': title, 'a': gold} | tojson }}", '{"b": "Mitosis", "a": 1}'),
        ("{% for part in parts if part.ok is defined %}{{ part.text }}{% endfor %}", "é"),
        ("{{ missing | default('none') }}", "none"),
        ("{{ row['title'] }}{{ row | length }}", "Mitosis5"),
        ("{{ title }}\n", "Mitosis\n"),
        ("{{ 'a\\nb' }}", "a\nb"),
    ],
)
def test_template_renders_text_of_the_row(tmp_path: Path, template: str, text: str) -> None:
    reading = _read(tmp_path, template)
    assert [row.example.output for row in reading.rows] == [text]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
        max_leaves=6,
    )
)
def test_tojson_round_trips_with_ordered_keys(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    reading = _read(tmp_path_factory.mktemp("json"), "={{ x | tojson }}", {"title": "a", "x": value})
    if any("\ud800" <= c <= "\udfff" for c in text):
        assert [fault.code for fault in reading.faults] == ["E402"]
    else:
        assert [row.example.output for row in reading.rows] == [unicodedata.normalize("NFC", "=" + text)]


@pytest.mark.parametrize(
    ("template", "code", "words"),
    [
        ("{{ missing }}", "E207", "data.output: 'missing' is undefined"),
        ("{{ parts[5].text }}", "E207", "data.output: list object has no element 5"),
        ("{{ parts[1].ok }}", "E207", "has no attribute 'ok'"),
        ("{{ row['Title'] }}", "E207", "'Row object' has no attribute 'Title'"),
        ("{{ title + gold }}", "E207", "data.output: can only concatenate str"),
        ("{{ gold / 0 }}", "E207", "data.output: division by zero"),
        ("{{ parts.append(1) }}", "E207", "data.output: access to attribute 'append'"),
        ("{{ missing | tojson }}", "E207", "'missing' is undefined"),
        ("{{ note }}", "E305", "data.output: a value of the template is null, not text"),
        ("{{ parts }}", "E305", "is list, not text"),
        ("{{ gold == 1 }}", "E305", "is bool, not text"),
        ("{{ parts | map(attribute='text') }}", "E305", "is generator, not text"),
        ("{% if gold == 2 %}x{% endif %}", "E401", "an empty answer"),
        ("answer", "E207", 'missing key "answer" of data.output'),
    ],
)
def test_template_failure_is_a_fault_of_its_row(tmp_path: Path, template: str, code: str, words: str) -> None:
    good = {"title": "a", "missing": "b", "parts": [{"text": "c", "ok": "d"}] * 6, "Title": "x", "answer": "y"}
    reading = _read(tmp_path, template, ROW, {**good, "gold": 2, "note": "n"})
    assert [(fault.line, fault.code) for fault in reading.faults if fault.line == 1] == [(1, code)]
    assert words in reading.faults[0].reason


@pytest.mark.parametrize(
    ("config", "words", "where"),
    [
        ({"output": "{{ title"}, "line 1: unexpected end of template", "data.output (--output)"),
        ({"output": "\n{{ title | nothing }}"}, "line 2: No filter named 'nothing'", "data.output (--output)"),
        ({"input": "{% for %}"}, "Invalid template", "data.input (--input)"),
        ({"output": None}, "data.input is a template, but data.output is not set", "data.output (--output)"),
        ({"output": "{{ title }}"}, "both input and output", "data.output (--output)"),
        (
            {"output": "{{ gold }}", "drop_columns": ("gold",)},
            'uses the key "gold", which data.drop_columns drops',
            "data.drop_columns",
        ),
        ({"output": "{% include 'x' %}"}, "Include statements are not supported", "data.output (--output)"),
        ({"output": "{{ above[0] }}"}, "requires data.rows", "data.output (--output)"),
        ({"output": "{{ [1, 2] | random }}"}, "No filter named 'random'", "data.output (--output)"),
    ],
)
def test_invalid_template_is_refused_before_reading(
    tmp_path: Path, config: dict[str, Any], words: str, where: str
) -> None:
    data = DataConfig(**{"input": "{{ title }}", "output": "gold", **config})
    for act in (
        lambda: read_pairs(write_rows(tmp_path / "rows.jsonl", [ROW]), data),
        lambda: check_files([tmp_path / "none"], data, Listener()),
    ):
        with pytest.raises(UserError) as caught:
            act()
        assert words in caught.value.what
        assert caught.value.where == where


MORE = "{% set ns = namespace(t='aa', l=[1], n=1) %}{% for i in range(999) %}{% set ns."
TOO_LARGE = "makes a value of more than 262,144 characters and items"
TOO_LONG = "takes too many steps (limit 4,194,304)"
TOO_WIDE = "has a number over 10,000 in "


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'a' * 10**10 }}", TOO_LARGE),
        ("{{ 10**10 * title }}", TOO_LARGE),
        ("{{ ['a'] * 10**9 }}", TOO_LARGE),
        ("{{ ([[1] * 3000] * 3000) | tojson }}", TOO_LARGE),
        ("{{ 'a'.center(9999999999) }}", TOO_WIDE + "center"),
        ("{{ 'a'.zfill(9999999999) }}", TOO_WIDE + "zfill"),
        ("{{ 'a' | center(10**10) }}", TOO_WIDE + "center"),
        ("{{ [title] | map('center', 10**10) | first }}", TOO_WIDE + "center"),
        ("{{ title | indent(10**10) }}", TOO_WIDE + "indent"),
        ("{{ parts | tojson(indent=10**10) }}", TOO_WIDE + "tojson"),
        ("{{ 1.5 | round(10**9, 'ceil') }}", TOO_WIDE + "round"),
        ("{{ parts | batch(10**9, 'a') | list }}", TOO_WIDE + "batch"),
        ("{{ ('a ' * 99999) | wordwrap(1, 'b' * 99999) }}", TOO_LARGE),
        ("{{ '%9999999999d' % 1 }}", "formatting with % is not supported (use ~)"),
        ("{{ '{:9999999999}'.format(1) }}", "access to attribute 'format' of 'str' object is unsafe"),
        ("{{ 'a'.expandtabs(10**10) }}", "'expandtabs' of 'str' object is unsafe"),
        ("{{ (5).to_bytes(10**10) }}", "'to_bytes' of 'int' object is unsafe"),
        ("{{ 9**(9**9) }}", "makes a number of more than 100,000 bits"),
        (MORE + "n = (ns.n + 9) * (ns.n + 9) %}{% endfor %}", "makes a number of more than 100,000 bits"),
        (MORE + "t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}", TOO_LARGE),
        (MORE + "t = ns.t + ns.t %}{% endfor %}{{ ns.t }}", TOO_LARGE),
        (MORE + "l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}", TOO_LARGE),
        (MORE + "l = {1: ns.l, 2: ns.l} %}{% endfor %}", TOO_LARGE),
        (MORE + "l = namespace(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l | string }}", TOO_LARGE),
        (MORE + "l = dict(a=ns.l, b=ns.l) %}{% endfor %}", TOO_LARGE),
        ("{{ ('a' * 4000).replace('', 'b' * 4000) }}", TOO_LARGE),
        ("{{ ('a' * 4000) | replace('a', 'b' * 4000) }}", TOO_LARGE),
        ("{{ range(99999) | join('b' * 4000) }}", TOO_LARGE),
        ("{{ range(99999) | map('string') | join('b' * 4000) }}", TOO_LARGE),
        ("{{ ('b' * 4000).join(title * 999) }}", TOO_LARGE),
        ("{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4, TOO_LONG),
        ("{% for i in range(99999) %}" + "a" * 999 + "{% endfor %}", TOO_LARGE),
        ("{% for i in range(99999) %}{% if range(49999) | sort %}{% endif %}{% endfor %}", TOO_LONG),
        ("{% set a = 'a' * 99999 %}{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}", TOO_LONG),
        ("{% set a = 'a' * 99999 %}{% for i in range(99999) if a == a %}{% endfor %}", TOO_LONG),
        ("{% set a = 'a' * 99999 %}{% for i in range(99999) if 'b' in a %}{% endfor %}", TOO_LONG),
        ("{% set a = 'a' * 99999 %}{% for i in range(99999) if a is lower %}{% endfor %}", TOO_LONG),
        ("{% set a = 'a' * 99999 %}{% for i in range(99999) if a.upper() %}{% endfor %}", TOO_LONG),
        ("{% set a = 'a' * 99999 %}{% for i in range(99999) if a | upper %}{% endfor %}", TOO_LONG),
        ("{% set a = ['a' * 9999] * 25 %}{% for i in range(99999) if a | map('upper') | list %}{% endfor %}", TOO_LONG),
        ("{{ ([[1]] * 49999) | sum(start=[]) }}", "adds up lists in sum"),
    ],
)
def test_template_without_bound_is_a_fault_of_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, words: str
) -> None:
    monkeypatch.setattr(sandbox, "MAX_SIZE", sandbox.MAX_SIZE // 4)  # the fault comes sooner
    monkeypatch.setattr(sandbox, "MAX_WORK", sandbox.MAX_WORK // 4)
    good = {"title": "a", "parts": []}
    reading = _read(tmp_path, "{% if title != 'a' %}" + template + "{% endif %}x", ROW, good)
    assert [(fault.line, fault.code) for fault in reading.faults] == [(1, "E207")]
    assert words in reading.faults[0].reason
    assert [row.example.output for row in reading.rows] == ["x"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% macro a(n) %}{{ a(n) }}{{ a(n) }}{% endmacro %}{{ a(1) }}", "Macro statements are not supported"),
        ("{% set a %}{{ title }}{% endset %}{{ a }}", "AssignBlock statements are not supported"),
        ("{% filter upper %}a{% endfilter %}", "FilterBlock statements are not supported"),
        ("{% block a %}{% endblock %}{{ self.a() }}", "Block statements are not supported"),
        ("{% for a in parts recursive %}{{ loop(parts) }}{% endfor %}", "recursive loops are not supported"),
        ("{{ '%9d' | format(1) }}", "No filter named 'format'"),
    ],
)
def test_template_whose_text_cannot_be_bounded_is_refused(tmp_path: Path, template: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        _read(tmp_path, template)
    assert words in caught.value.what


@given(st.data())
def test_template_operations_equal_jinjas_own(data: st.DataObject) -> None:
    value = data.draw(st.text(max_size=20) | st.lists(st.text(max_size=5), max_size=5))
    other = data.draw(st.text(min_size=1, max_size=3))
    expressions = [
        "{{ (v | string) ~ o ~ 1 ~ 2.5 }}",
        "{% for a in v %}{{ loop.index }}/{{ loop.length }}{{ a }}{% else %}none{% endfor %}",
        "{{ v | join(o) }}{{ v | map('upper') | join(o) }}",
        "{{ (v | string).replace(o, o ~ o) | replace(o, 'x') | center(9) | indent(2) }}",
        "{{ v[1:] | string }}{{ v | length }}{{ v | batch(2, o) | list | string }}",
        "{{ 'y' if o in v and v != o and v is not none else 'n' }}{{ v | select('in', o) | list | string }}",
        "{{ (v | string).split(o) | sort | unique | join('+') }}{{ [1, 2] | sum }}{{ 7 * 3 % 5 ** 2 // 2 }}",
    ]
    plain = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    for expression in expressions:
        _, template = parse_template(expression)
        ours = render(template, {"v": value, "o": other})
        assert ours == plain.from_string(expression).render(v=value, o=other)


def test_template_and_key_name_can_be_combined(tmp_path: Path) -> None:
    reading = _read(tmp_path, "title", ROW, {**ROW, "title": 4}, input="{{ gold }}?")
    assert [(row.example.input_text, row.example.output) for row in reading.rows] == [("1?", "Mitosis")]
    assert [(fault.code, fault.path) for fault in reading.faults] == [("E305", "$.title")]


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows"])
def test_tables_read_only_the_mapped_columns(tmp_path: Path, name: str) -> None:
    rows = [{"Customer Question": f"q{i}", "reply": f"r{i}", "day": "Monday", "seen": "x"} for i in range(3)]
    data = DataConfig(input='{{ day }}: {{ row["Customer Question"] }}', output="{{ reply }}.")
    path = write_rows(tmp_path / name, rows)
    reading = read_pairs(path, data)
    assert [(r.example.input_text, r.example.output) for r in reading.rows] == [
        (f"Monday: q{i}", f"r{i}.") for i in range(3)
    ]
    assert [row.metadata for row in reading.rows] == [{"seen": "x"}] * 3
    with pytest.raises(UserError, match='No column named "answer"'):
        read_pairs(path, data.model_copy(update={"output": "{{ answer }}"}))
    whole = read_pairs(path, data.model_copy(update={"output": "{{ row | tojson }}"}))
    assert json.loads(whole.rows[1].example.output) == rows[1]


def test_template_gets_lists_and_dates_of_parquet(tmp_path: Path) -> None:
    rows = [{"q": ["a", "b"], "when": datetime.date(2024, 7, 26), "a": {"x": 1.5, "y": None}}]
    data = DataConfig(input="{{ q | join(', ') }} on {{ when }}", output="{{ a | tojson }}")
    [row] = read_pairs(write_rows(tmp_path / "rows.parquet", rows), data).rows
    assert (row.example.input_text, row.example.output) == ("a, b on 2024-07-26", '{"x": 1.5}')


def test_fix_file_writes_mapped_pairs_and_lists_dropped_keys(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [ROW, {"title": "b"}, {**ROW, "title": "c"}])
    data = DataConfig(input="{{ title }}", output="{{ gold }}")
    assert check_files([path], data, Listener()).counts == {"E207": 1}
    changes = fix_file(path, tmp_path / "out.jsonl", data)
    written = read_pairs(tmp_path / "out.jsonl", DataConfig())
    assert [(r.example.input_text, r.example.output) for r in written.rows] == [("Mitosis", "1"), ("c", "1")]
    assert [(c.line, c.code) for c in changes if c.left_out] == [(2, "E207")]
    assert written.rows[0].metadata == {key: ROW[key] for key in ("id", "parts")}
