"""Tables as spreadsheet programs and ticket systems export them, through `data check`: one file for each habit."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import openpyxl  # type: ignore[import-untyped]
import pytest
import yaml
from data_helpers import unlike_pairs

from making.command_line import tunewright as command
from tunewright.config import FileSource

PAIRS = unlike_pairs(20)
HEADER = ("Nr", "Frage", "Antwort", "Preis")
ROWS = [(str(n), asked, f"{answer}, über\nzwei Zeilen; so", f"{n},50") for n, (asked, answer) in enumerate(PAIRS)]
MAPPED = ("--input", "Frage", "--output", "Antwort")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    command("init", str(tmp_path / "project"))
    return tmp_path / "project"


def _table(rows: Iterable[Sequence[str]], delimiter: str = ";", end: str = "\r\n") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(rows)
    return text.getvalue()


def _save(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def _workbook(path: Path, rows: Iterable[Sequence[Any]]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(list(row))
    book.save(path)
    return path


def _check(project: Path, path: Path, *options: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """Return the result for one file as `data check --json` prints it, and its notes or its error as one text."""
    done = command("data", "check", path, *options, "--json", "--project", project)
    assert done.code == code, done.stderr
    (file,) = json.loads(done.stdout)["files"]
    error = file["unreadable"]
    return file, "\n".join([str(error[key]) for key in ("where", "what", "fix")] if error else file["notes"])


# The habits


def test_german_excel_export_is_read(project: Path, tmp_path: Path) -> None:
    text = "sep=;\r\n" + _table([HEADER, *ROWS])
    file, notes = _check(project, _save(tmp_path / "a.csv", text, "cp1252"), *MAPPED)
    assert (file["examples"], file["faulty"]) == (20, 0)
    assert "read as cp1252" in notes
    assert "semicolon-separated, as its first line says" in notes
    command("data", "add", tmp_path / "a.csv", *MAPPED, "--project", project)
    shown = json.loads(command("data", "show", "a.csv:3", "--json", "--project", project).stdout)
    assert shown["metadata"]["Preis"] == "0,50"  # a decimal comma stays text
    assert "über\nzwei Zeilen; so" in json.dumps(shown, ensure_ascii=False).replace("\\n", "\n")


def test_english_excel_export_is_read(project: Path, tmp_path: Path) -> None:
    path = _save(tmp_path / "a.csv", _table([HEADER, *ROWS], ","), "utf-8-sig")
    file, notes = _check(project, path, *MAPPED)
    assert (file["examples"], file["faulty"]) == (20, 0)
    assert "comma-separated" in notes


def test_libreoffice_export_is_read(project: Path, tmp_path: Path) -> None:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, delimiter="\t", lineterminator="\n").writerows([HEADER, *ROWS])
    file, notes = _check(project, _save(tmp_path / "a.csv", text.getvalue(), "utf-16"), *MAPPED)
    assert (file["examples"], file["faulty"]) == (20, 0)
    assert "tab-separated" in notes


def test_ticket_systems_export_is_read_below_its_titles(project: Path, tmp_path: Path) -> None:
    titles = 'Ticket export: open, solved\r\n"Created 1 Dec 2026, 10:00"\r\n\r\n'
    path = _save(tmp_path / "a.csv", titles + _table([HEADER, *ROWS, ("",) * 6, ("",) * 4]))
    _, error = _check(project, path, *MAPPED, code=2)
    assert error.startswith(f'{path}:1\nNo column named "Frage", but line 4 has this name')
    assert "--header-row 4" in error
    file, notes = _check(project, path, *MAPPED, "--header-row", "4")
    assert (file["examples"], file["faulty"]) == (20, 0)
    assert "rows above data.header_row are not read: 3" in notes
    assert "rows without a value skipped: 2" in notes
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("#header_row: null", "header_row: 4"))
    command("data", "add", path, *MAPPED, "--project", project)
    assert command("data", "show", "a.csv:5", "--project", project).code == 0


@pytest.mark.parametrize("name", ["a.csv", "a.xlsx"])
def test_title_row_of_a_sheet_is_named_also_without_columns(project: Path, tmp_path: Path, name: str) -> None:
    rows = [("Export 2026", "", "", ""), ("",) * 4, HEADER, *ROWS]
    path = tmp_path / name
    _save(path, _table(rows)) if name == "a.csv" else _workbook(path, rows)
    _, error = _check(project, path, code=2)
    assert "--header-row 3" in error
    assert ", ".join(HEADER) in error
    known = [("Export 2026",), ("id", "prompt", "completion"), *(row[:3] for row in ROWS)]
    _save(path, _table(known)) if name == "a.csv" else _workbook(path, known)
    _, error = _check(project, path, code=2)
    assert "but line 2 has known names" in error
    file, notes = _check(project, path, "--header-row", "2")
    assert file["examples"] == 20
    assert "rows above data.header_row are not read: 1" in notes


def test_header_row_of_a_source_is_for_its_files_only(project: Path, tmp_path: Path) -> None:
    (tmp_path / "titled").mkdir()
    titled = _save(tmp_path / "titled" / "a.csv", _table([("Export 2026",), HEADER, *ROWS[:10]]))
    plain = _save(tmp_path / "b.csv", _table([HEADER, *ROWS[10:]]))
    config = project / "tunewright.yaml"
    sources = [{"path": "../titled", "header_row": 2}, "../b.csv"]
    data = {"sources": sources, "input": "Frage", "output": "Antwort"}
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "data": data}))
    for file in (titled, plain):
        assert _check(project, file)[0]["examples"] == 10
    assert "No column" in _check(project, titled, "--header-row", "1", code=2)[1]  # an option is for every file
    assert command("data", "add", titled, plain, "--project", project).code == 0
    shown = json.loads(command("config", "show", "--json", "--project", project).stdout)
    assert shown["data"]["sources"] == sources
    with pytest.raises(ValueError, match="hub"):
        FileSource(path="hf://datasets/a/b", header_row=2)


def test_header_row_is_refused_without_a_table(project: Path, tmp_path: Path) -> None:
    rows = [{"prompt": asked, "completion": answer} for asked, answer in PAIRS]
    path = _save(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    done = command("data", "check", path, "--header-row", "2", "--json", "--project", project)
    assert done.code == 2
    assert json.loads(done.stdout)["error"]["where"] == "--header-row"
    config = project / "tunewright.yaml"
    config.write_text(config.read_text().replace("#header_row: null", "header_row: 2"))
    assert _check(project, path)[0]["examples"] == 20


def test_rows_without_a_header_are_cut_in_the_error(project: Path, tmp_path: Path) -> None:
    path = _save(tmp_path / "a.csv", _table([("Export 2026", ""), ("a" * 500, "b" * 500)]))
    error = _check(project, path, code=2)[1]
    assert "--header-row 2" in error
    assert "a" * 40 in error and "a" * 41 not in error


# Headers


@pytest.mark.parametrize(("header_row", "words"), [(2, "Row 2 has no values"), (300, "The file has no rows")])
@pytest.mark.parametrize("name", ["a.csv", "a.xlsx"])
def test_header_row_without_values_is_refused(
    project: Path, tmp_path: Path, name: str, header_row: int, words: str
) -> None:
    rows = [("Export",), (), HEADER, *ROWS]
    path = tmp_path / name
    _save(path, _table(rows)) if name == "a.csv" else _workbook(path, rows)
    _, error = _check(project, path, *MAPPED, "--header-row", str(header_row), code=2)
    assert words in error
    assert "data.header_row" in error


@pytest.mark.parametrize("name", ["a.csv", "a.xlsx"])
def test_header_with_blanks_or_another_case_gets_a_suggestion(project: Path, tmp_path: Path, name: str) -> None:
    rows = [("Nr", " frage ", "ANTWORT", ""), *ROWS]
    path = tmp_path / name
    _save(path, _table(rows)) if name == "a.csv" else _workbook(path, rows)
    _, error = _check(project, path, *MAPPED, code=2)
    assert 'No column named "Frage", did you mean " frage "?' in error
    _, error = _check(project, path, "--input", " frage ", "--output", "Antwrt", code=2)
    assert 'No column named "Antwrt", did you mean "ANTWORT"?' in error
    file, _ = _check(project, path, "--input", " frage ", "--output", "ANTWORT")
    assert file["examples"] == 20


@pytest.mark.parametrize(("name", "cells"), [("a.csv", "C1 and D1"), ("a.xlsx", "D3 and E3")])
def test_repeated_header_is_named_by_its_cells(project: Path, tmp_path: Path, name: str, cells: str) -> None:
    rows = [("Nr", "Frage", "Antwort", "Antwort"), *ROWS]
    path = tmp_path / name
    _save(path, _table(rows)) if name == "a.csv" else _workbook(path, [(), (), *((None, *row) for row in rows)])
    _, error = _check(project, path, *MAPPED, code=2)
    assert f'More than one column named "Antwort": {cells}\nRename one' in error


@pytest.mark.parametrize("columns", [(), MAPPED])
@pytest.mark.parametrize("name", ["a.csv", "a.xlsx"])
def test_file_of_a_header_only_has_no_rows(project: Path, tmp_path: Path, name: str, columns: tuple[str, ...]) -> None:
    path = tmp_path / name
    _save(path, _table([HEADER, ("",) * 4])) if name == "a.csv" else _workbook(path, [HEADER])
    assert "The file has no rows" in _check(project, path, *columns, code=2)[1]


def test_formula_without_a_value_is_a_fault_in_a_used_column_only(project: Path, tmp_path: Path) -> None:
    rows = [(*HEADER, "Summe", "Quote"), *((*row, f"=A{n}+1", "#N/A") for n, row in enumerate(ROWS, start=2))]
    path = _workbook(tmp_path / "a.xlsx", rows)
    file, notes = _check(project, path, *MAPPED)
    assert (file["examples"], file["faulty"]) == (20, 0)
    assert "not kept as metadata: E2 is a formula without a stored value, F2 is the error #N/A" in notes
    assert "37 more" in notes
    assert _check(project, path, "--input", "Frage", "--output", "Summe", code=2)[0]["faulty"] == 20


def test_separator_line_decides_also_for_an_unusual_delimiter(project: Path, tmp_path: Path) -> None:
    rows = [(str(n), f"{asked}; and, more | {n}", "yes") for n, (asked, _) in enumerate(PAIRS)]
    path = _save(tmp_path / "a.csv", "SEP=^\n" + _table([("id", "prompt", "completion"), *rows], "^", "\n"))
    file, notes = _check(project, path)
    assert (file["examples"], file["faulty"]) == (20, 0)
    assert "^-separated" in notes


# Documents


ARRAYS = [[asked, answer] for asked, answer in PAIRS]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("columns", "output"),
    [(("0", "1"), "answer 3"), (("{{ row[0] }}", "{{ row[1] ~ '.' }}"), "answer 3.")],
    ids=["columns", "templates"],
)
def test_array_is_a_row_with_numbered_columns(
    project: Path, tmp_path: Path, name: str, columns: tuple[str, str], output: str
) -> None:
    rows: list[Any] = [[*pair, {"n": 1}] for pair in ARRAYS]
    rows[1] = dict(enumerate(rows[1]))  # an object with the same keys may follow an array
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = _save(tmp_path / name, json.dumps(rows, indent=1) if name == "a.json" else lines)
    assert _check(project, path, code=2)[0]["faulty"] == 20
    command("data", "add", path, "--input", columns[0], "--output", columns[1], "--project", project)
    exported = tmp_path / "out.jsonl"
    command("data", "export", exported, "--project", project)
    outputs = [json.loads(line)["messages"][-1]["content"] for line in exported.read_text().splitlines()]
    assert len(outputs) == 20
    assert output in outputs


@pytest.mark.parametrize(
    ("document", "rows"),
    [
        ({"oos_val": ARRAYS[:5], "val": ARRAYS[5:10], "train": ARRAYS[10:]}, "*[]"),
        ({"version": 2, "train": ARRAYS}, "train"),
        ({"version": 2, "data": [{"title": "t", "paragraphs": [{"text": "c", "qas": ARRAYS}]}]}, None),
        ([{"name": "a", "pairs": ARRAYS}], "[].pairs[]"),
    ],
    ids=["splits", "key", "nested", "array"],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_unread_document_names_options_that_read_it(
    project: Path, tmp_path: Path, document: Any, rows: str | None, indent: int | None
) -> None:
    path = _save(tmp_path / "a.json", json.dumps(document, indent=indent))
    _, error = _check(project, path, code=2)
    options = shlex.split(error.partition("Use ")[2].partition(", or set")[0])
    assert options == ["--rows", rows or "data[].paragraphs[].qas[]", "--input", "0", "--output", "1"]
    assert _check(project, path, *options)[0]["examples"] == 20


def test_unread_document_of_marked_sentences_names_options_that_fit_all_files(project: Path, tmp_path: Path) -> None:
    paths = []
    for name in ("PlayMusic", "AddToPlaylist"):
        rows = [
            {"data": [{"text": "a", "entity": "article"}, {"text": f" {asked}"}, {"text": name, "entity": "intent"}]}
            for asked, _ in PAIRS
        ]
        paths.append(_save(tmp_path / f"train_{name}_full.json", json.dumps({name: rows}, indent=1)))
        ran = command("init", tmp_path / "new", "--data", paths[-1])
        assert "Use --rows '*[]', or set data.rows" in ran.stderr and f"Keys: {name}; of a row: data." in ran.stderr
    columns = ("--input", "{{ data | map(attribute='text') | join }}", "--output", "{{ above[0] }}")
    ran = command("data", "check", *paths, "--rows", "*[]", *columns, "-p", project, "--json")
    assert [file["examples"] for file in ran.document["files"]] == [20, 20]


def test_document_of_columns_is_refused_as_such(project: Path, tmp_path: Path) -> None:
    columns = {name: {str(n): row[at] for n, row in enumerate(ARRAYS)} for at, name in enumerate(("q", "a"))}
    _, error = _check(project, _save(tmp_path / "a.json", json.dumps(columns)), code=2)
    assert "columns instead of rows" in error
    assert "records" in error
