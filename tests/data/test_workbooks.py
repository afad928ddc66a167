"""A sheet of an .xlsx workbook is read as a table of texts; what its cells lose is reported."""

from __future__ import annotations

import csv
import datetime
import io
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openpyxl  # type: ignore[import-untyped]
import pytest
from data_helpers import new_project, unlike_pairs
from hypothesis import given
from hypothesis import strategies as st

import tunewright
from making.command_line import tunewright as command
from tunewright.config import DataConfig
from tunewright.core.errors import UserError
from tunewright.data.options import RemoveOptions
from tunewright.data.readers import ReadResult, read_pairs

HEADER = ("prompt", "completion")
SHEET = "xl/worksheets/sheet1.xml"
STRINGS = "xl/sharedStrings.xml"


def _save(path: Path, rows: Sequence[Sequence[Any]], change: Callable[[Any], object] = lambda sheet: None) -> Path:
    book = openpyxl.Workbook()
    book.active.title = "Replies"
    for row in rows:
        book.active.append(list(row))
    change(book.active)
    book.save(path)
    return path


def _edit(path: Path, part: str, edit: Callable[[bytes], bytes]) -> Path:
    """Change one part of a workbook as written."""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    parts[part] = edit(parts.get(part, b""))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def _shared(path: Path) -> Path:
    """Move a workbook's texts to the shared ones, where Excel keeps them."""
    texts: list[bytes] = []

    def share(match: re.Match[bytes]) -> bytes:
        texts.append(match[2])
        return b'%st="s"><v>%d</v></c>' % (match[1], len(texts) - 1)

    _edit(path, SHEET, lambda xml: re.sub(rb'(<c [^>]*)t="inlineStr"><is>(.*?)</is></c>', share, xml))
    namespace = b"http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    items = b"".join(b"<si>%s</si>" % text for text in texts)
    _edit(path, STRINGS, lambda _: b'<sst xmlns="%s">%s</sst>' % (namespace, items))
    kind = b"application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    part = b'<Override PartName="/%s" ContentType="%s"/></Types>' % (STRINGS.encode(), kind)
    return _edit(path, "[Content_Types].xml", lambda xml: xml.replace(b"</Types>", part))


def _read(path: Path, data: DataConfig | None = None) -> ReadResult:
    return read_pairs(path, data or DataConfig())


def _texts(reading: ReadResult) -> list[tuple[int, str, str]]:
    return [(row.line, row.example.input_text, row.example.output) for row in reading.rows]


def test_sheet_is_read_below_its_header_wherever_it_begins(tmp_path: Path) -> None:
    rows: list[list[Any]] = [
        [],
        [None, None, "prompt", "id", "completion"],
        [None, None, "hi", 7, "ho"],
        [],
        [None, None, "he", 8, "ha"],
    ]
    reading = _read(_save(tmp_path / "a.xlsx", rows))
    assert _texts(reading) == [(3, "hi", "ho"), (5, "he", "ha")]
    assert [row.metadata for row in reading.rows] == [{"id": "7"}, {"id": "8"}]
    assert {row.source for row in reading.rows} == {f"{tmp_path / 'a.xlsx'}:Replies"}
    assert reading.notes == [
        f"{tmp_path / 'a.xlsx'}: sheet Replies: prompt/completion pairs, because rows have prompt and completion"
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (3.0, "3"),
        (-0.25, "-0.25"),
        (1e21, "1000000000000000000000"),
        (True, "TRUE"),
        (datetime.date(2026, 2, 1), "2026-02-01"),
        (datetime.datetime(2026, 2, 1, 10, 30), "2026-02-01T10:30:00"),
        (datetime.time(10, 30), "10:30:00"),
        ("line\nbreak", "line\nbreak"),
        ("carriage_x000D_\nreturn", "carriage\r\nreturn"),
        ("'quoted", "'quoted"),
        (" padded ", " padded "),
        ("<&>\u00e9\U0001f600", "<&>\u00e9\U0001f600"),
    ],
)
def test_cell_is_read_as_text(tmp_path: Path, value: Any, text: str) -> None:
    path = _save(tmp_path / "a.xlsx", [HEADER, ("q", value)])
    assert _texts(_read(path)) == _texts(_read(_shared(path))) == [(2, "q", text)]


_cells = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="_\ufffe\uffff"))


@given(rows=st.lists(st.tuples(_cells, _cells), min_size=1, max_size=5))
def test_sheet_has_the_rows_of_the_same_table_as_csv(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    rows = [row for row in rows if any(row)] or [("a", "b")]
    folder = tmp_path_factory.getbasetemp()
    text = io.StringIO()
    csv.writer(text).writerows([HEADER, *rows])
    (folder / "same.csv").write_text(text.getvalue(), encoding="utf-8", newline="")
    # A text that begins with "=" would be a formula.
    book = _save(folder / "same.xlsx", [HEADER, *rows], _write_as_text)
    sheet, table = _read(book), _read(folder / "same.csv")
    assert [row.example for row in sheet.rows] == [row.example for row in table.rows]
    assert [(f.code, f.reason) for f in sheet.faults] == [(f.code, f.reason) for f in table.faults]


def _write_as_text(sheet: Any) -> None:
    for row in sheet:
        for cell in row:
            if cell.value is not None:
                cell.data_type = "s"


def test_formula_is_its_stored_value_and_a_fault_without_one(tmp_path: Path) -> None:
    rows = [HEADER, ("q", "=1+1"), ("r", "=2+2"), ("s", "#N/A"), ("t", "=1/0"), ("u", "ok")]
    path = _save(tmp_path / "a.xlsx", rows)
    stored = {
        b"<f>1+1</f><v/>": b"<f>1+1</f><v>2</v>",
        b'<c r="B5"><f>1/0</f><v/>': b'<c r="B5" t="e"><v>#DIV/0!</v>',
    }

    def edit(xml: bytes) -> bytes:
        xml = re.sub(b"<v ?/>|<v></v>", b"<v/>", xml)
        for old, new in stored.items():
            assert old in xml
            xml = xml.replace(old, new)
        return xml

    reading = _read(_edit(path, SHEET, edit))
    assert _texts(reading) == [(2, "q", "2"), (6, "u", "ok")]
    assert [(f.line, f.code, f.path, f.reason) for f in reading.faults] == [
        (3, "E109", "$.completion", "B3 is a formula without a stored value"),
        (4, "E109", "$.completion", "B4 is the error #N/A"),
        (5, "E109", "$.completion", "B5 is the error #DIV/0!"),
    ]


def test_merged_cells_are_refused_below_the_header_only(tmp_path: Path) -> None:
    rows = [HEADER, ("q", "a"), ("r", "b"), ("s", "c"), ("t", "d")]
    with pytest.raises(UserError, match=r"^\S+a.xlsx:Replies:3: Merged cells: B3:B4, A4:A5"):
        _read(_save(tmp_path / "a.xlsx", rows, lambda s: (s.merge_cells("A4:A5"), s.merge_cells("B3:B4"))[0]))


def test_merged_cells_apart_from_the_table_are_no_fault(tmp_path: Path) -> None:
    rows = [HEADER, ("q", "a"), ("r", "b")]
    path = _save(tmp_path / "a.xlsx", rows, lambda s: (s.merge_cells("D1:E9"), s.merge_cells("B3:C3")))
    assert len(_read(path).rows) == 2


def test_sheet_is_named_if_several_have_rows(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.title = "Notes"
    for title in ("First", "Second", "Third"):
        sheet = book.create_sheet(title)
        sheet.append(HEADER)
        sheet.append(("q", title))
    book["Third"].sheet_state = "hidden"
    path = tmp_path / "a.xlsx"
    book.save(path)
    with pytest.raises(UserError, match="Several sheets have rows: First, Second") as caught:
        _read(path)
    assert "--sheet" in str(caught.value.fix)
    reading = _read(path, DataConfig(sheet="Third"))
    assert _texts(reading) == [(2, "q", "Third")]
    assert reading.notes[0] == f"{path}: sheets not read: Notes, First, Second"
    with pytest.raises(UserError, match="No sheet named 'Fourth'") as caught:
        _read(path, DataConfig(sheet="Fourth"))
    assert caught.value.fix == "Sheets: Notes, First, Second, Third."


def test_cells_that_are_read_differently_are_reported(tmp_path: Path) -> None:
    rows = [(*HEADER, "share"), ("q", "x" * 32_767, 0.25), ("r", "b", 1), ("s", "c", None, None, "see above")]

    def change(sheet: Any) -> None:
        for cell in ("C2", "C3"):
            sheet[cell].number_format = "0%"

    reading = _read(_save(tmp_path / "a.xlsx", rows, change), DataConfig(max_characters=10**6))
    assert [row.metadata for row in reading.rows] == [{"share": "0.25"}, {"share": "1"}, {}]
    name = f"{tmp_path / 'a.xlsx'}:Replies"
    assert reading.notes[:3] == [
        f"{name}: not read, because their columns have no name: E4",
        f"{name}: numbers are read as stored, not as shown: C2 is 0.25 (shown as 0%), C3 is 1 (shown as 0%)",
        f"{name}: cells of 32,767 characters, where Excel cuts text: B2",
    ]


@pytest.mark.parametrize("rows", [[], [HEADER]])
def test_workbook_without_rows_is_refused(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(UserError, match=r"has rows|has no rows"):
        _read(_save(tmp_path / "a.xlsx", rows))


def test_columns_are_mapped_as_in_csv(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.xlsx", [("q", "a", "who"), ("hi", "ho", 7)])
    with pytest.raises(UserError, match="Unknown columns") as caught:
        _read(path)
    assert caught.value.where == f"{path}:Replies:1"
    reading = _read(path, DataConfig(input="{{ q }}!", output="{{ a }}", group_by=("who",)))
    assert (_texts(reading), reading.rows[0].groups) == ([(2, "hi!", "ho")], {"who": "7"})
    with pytest.raises(UserError, match="requires a JSON document"):
        _read(path, DataConfig(rows="data"))


@pytest.mark.parametrize("cut", [10, 300, -30])
def test_workbook_is_refused_when_truncated(tmp_path: Path, cut: int) -> None:
    path = _save(tmp_path / "a.xlsx", [HEADER, ("q", "a")])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"Unreadable as an [.]xlsx workbook") as caught:
        _read(path)
    assert str(caught.value.where).startswith(str(path))


def test_zip_archive_that_is_no_workbook_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
        archive.writestr("a.jsonl", '{"prompt": "a", "completion": "b"}')
    with pytest.raises(UserError, match=r"Unreadable as an [.]xlsx workbook"):
        _read(tmp_path / "a.xlsx")


_BILLION = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">%s]>' % b"".join(
    b'<!ENTITY %c "%s">' % (letter, b"&%c;" % (letter - 1) * 10) for letter in range(ord("b"), ord("k"))
)


@pytest.mark.parametrize("part", [SHEET, STRINGS, "xl/workbook.xml", "[Content_Types].xml"])
def test_xml_entities_are_refused_or_not_expanded(tmp_path: Path, part: str) -> None:
    def edit(xml: bytes) -> bytes:
        xml = re.sub(rb"^<\?xml.*?\?>\s*", b"", xml)
        end = xml.rindex(b"</")
        return _BILLION + xml[:end] + b"<x>&j;</x>" + xml[end:]

    path = _edit(_shared(_save(tmp_path / "a.xlsx", [HEADER, ("q", "a")])), part, edit)
    with pytest.raises(UserError):
        _read(path)


def test_part_is_refused_when_it_is_a_zip_bomb(tmp_path: Path) -> None:
    path = _shared(_save(tmp_path / "a.xlsx", [HEADER, ("q", "a")]))
    _edit(path, STRINGS, lambda xml: xml.replace(b"<si>", b" " * (70 << 20) + b"<si>", 1))
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match=r"xl/sharedStrings.xml in the workbook has 73,\d+,\d+ bytes"):
        _read(path)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda xml: xml.replace(b'<dimension ref="A1:B2"', b'<dimension ref="A1:XFD1048576"'), None),
        (lambda xml: xml.replace(b'r="2"', b'r="999999999999"'), "row 999999999999 after row 1"),
        (lambda xml: xml.replace(b'r="2"', b'r="1"'), "row 1 after row 1"),
        (lambda xml: xml.replace(b'<row r="2">', b'<row r="2">' + b"<c/>" * 20_000), "a row of over 16,384 cells"),
        (lambda xml: xml.replace(b'r="A1"', b'r="ZZZ1"'), "column"),
        (lambda xml: xml.replace(b"<v>0</v>", b"<v>99</v>"), "index out of range"),
    ],
    ids=["dimension", "far", "repeated", "wide", "column", "index"],
)
def test_sheet_beyond_excels_limits_is_refused_at_once(
    tmp_path: Path, edit: Callable[[bytes], bytes], words: str | None
) -> None:
    path = _edit(_shared(_save(tmp_path / "a.xlsx", [HEADER, ("q", "a")])), SHEET, edit)
    if words is None:
        assert _texts(_read(path)) == [(2, "q", "a")]
    else:
        with pytest.raises(UserError, match=f"Unreadable as an .xlsx workbook: .*{words}"):
            _read(path)


def test_workbook_is_added_and_found_by_its_places(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    pairs = [*unlike_pairs(24)]
    _save(project.root / "a.xlsx", [HEADER, *pairs])
    data = tunewright.open(project.root).data
    added = data.add([project.root / "a.xlsx"])
    assert [(source.name, source.rows) for source in added.version.sources] == [("a.xlsx:Replies", 24)]
    assert data.show("a.xlsx:Replies:2").example.input_text == pairs[0][0]
    assert data.show(f"{project.root / 'a.xlsx'}:Replies:3").example.input_text == pairs[1][0]
    changes = data.fix_file(project.root / "a.xlsx", project.root / "fixed.jsonl")
    assert changes[-1].source == f"{project.root / 'a.xlsx'}:Replies"
    assert not data.add([project.root / "fixed.jsonl"]).created
    with pytest.raises(UserError, match="No train row would be left"):
        data.remove(RemoveOptions(source="a.xlsx", dry_run=True))


def test_sheet_is_refused_without_a_workbook(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    ran = command("data", "check", project.root / "tunewright.yaml", "--sheet", "Replies", "-p", project.root)
    assert (ran.code, "No file is an .xlsx workbook" in ran.stderr) == (2, True)
